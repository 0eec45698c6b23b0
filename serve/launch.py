"""`deltamux serve CONFIG`: check the configuration, then become `vllm serve` with the plugin on.

Everything a user could get wrong in deltamux's own settings is reported here, within a second and
in one line, before vLLM takes its time to load a model.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from deltamux.compression.paths import resolve_directory
from deltamux.serve import compat
from deltamux.serve.plugin import PLUGIN_NAME
from deltamux.serve.settings import Settings, load_settings

logger = logging.getLogger("deltamux")

# The rank means nothing to experts; the smallest keeps what vLLM reserves for it small.
LORA_RANK = 8


def launch(config: Path, slots: int | None, host_cache: str | None, extra: list[str]) -> NoReturn:
    """Become the server.

    Args:
        config: deltamux.yaml.
        slots: Instead of the file's.
        host_cache: Instead of the file's.
        extra: Flags for `vllm serve`.

    Raises:
        ValueError: The configuration is wrong, or what it names is not there.
        VllmError: No usable vLLM is installed.
    """
    environment = dict(os.environ)
    if slots is not None:
        environment["DELTAMUX_SLOTS"] = str(slots)
    if host_cache is not None:
        environment["DELTAMUX_HOST_CACHE"] = host_cache
    if not config.is_file():
        raise ValueError(f"{str(config)!r} is not a file: name a deltamux.yaml")
    module, prefix = compat.server_command()
    settings = load_settings(config, environment)
    arguments = vllm_arguments(settings, extra)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, PLUGIN_NAME]))
    os.execv(sys.executable, [sys.executable, "-m", module, *prefix, *arguments])


def vllm_arguments(settings: Settings, extra: list[str]) -> list[str]:
    """The flags of vLLM's server for a configuration.

    Args:
        settings: The configuration.
        extra: Flags from the command line; they come last and so win.

    Raises:
        ValueError: The base is not there.
    """
    resolve_directory(settings.base.model, settings.base.revision)
    engine = dict(settings.engine)
    additional = dict(engine.pop("additional_config", {}))
    additional["deltamux"] = settings.plugin().model_dump(mode="json")
    options: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": settings.slots,
        "max_cpu_loras": max(settings.slots, len(settings.experts), 1),
        "max_lora_rank": LORA_RANK,
        "additional_config": additional,
    }
    if settings.base.revision:
        options["revision"] = settings.base.revision
    arguments = ["--model", settings.base.model]
    for name, value in (options | engine).items():
        arguments += _flag(name, value)
    return arguments + extra


def _flag(name: str, value: Any) -> list[str]:
    dashed = name.replace("_", "-")
    if value is None:
        return []
    if value is False and name.startswith("disable_"):
        return []  # vLLM's few switches without a --no- form
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if isinstance(value, dict):
        return [f"--{dashed}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{dashed}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
    return [f"--{dashed}", str(value)]
