"""`deltamux serve CONFIG`: check the configuration, then become `vllm serve` with the plugin on.

Everything a user could get wrong in deltamux's own settings is reported here, within a second and
in one line, before vLLM takes its time to load a model.
"""

import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from deltamux.compression.paths import resolve_directory, user_path
from deltamux.serve import compat
from deltamux.serve.base_checks import check_base, check_quantized
from deltamux.serve.plugin import PLUGIN_NAME
from deltamux.serve.settings import MULTIPROCESS_VARIABLE, Settings, load_settings

logger = logging.getLogger("deltamux")

# The rank means nothing to experts; the smallest keeps what vLLM reserves for it small.
LORA_RANK = 8
# After SIGTERM, running requests may take so long to end.
DRAIN_SECONDS = 30
# vLLM's.
DEFAULT_PORT = 8000
YAML_ENDINGS = (".yaml", ".yml")


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
        kind = "is a folder" if config.is_dir() else "is not a file"
        raise ValueError(f"{str(config)!r} {kind}: name a deltamux.yaml")
    module, prefix = compat.server_command()
    settings = load_settings(config, environment)
    arguments = vllm_arguments(settings, extra)
    check_port(settings.engine, extra)
    if os.environ.pop(MULTIPROCESS_VARIABLE, None) is not None:
        logger.warning("%s is unset: deltamux has one API server process", MULTIPROCESS_VARIABLE)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, PLUGIN_NAME]))
    os.execv(sys.executable, [sys.executable, "-m", module, *prefix, *arguments])


def found_configuration(words: list[str]) -> tuple[Path, list[str]]:
    """The configuration among the words of a command line, and the others: flags of vLLM and their values.

    It comes first, or is the only YAML file that is there; one behind `--config` is vLLM's own.

    Raises:
        ValueError: There is none, or more than one.
    """
    if words[0].startswith("-"):
        places = [
            place
            for place, word in enumerate(words)
            if word.endswith(YAML_ENDINGS)
            and words[place - 1] != "--config"
            and user_path(word).is_file()
        ]
        if len(places) != 1:
            raise ValueError(
                f"the configuration comes first: deltamux serve deltamux.yaml {words[0]} …; "
                f"found {len(places)} YAML files behind {words[0]!r}"
            )
        words = [words[places[0]], *words[: places[0]], *words[places[0] + 1 :]]
    return user_path(words[0]), words[1:]


def vllm_arguments(settings: Settings, extra: list[str]) -> list[str]:
    """The flags of vLLM's server for a configuration.

    Args:
        settings: The configuration.
        extra: Flags from the command line; they come last and so win.

    Raises:
        ValueError: The base is not there, or cannot be served (see `base_checks.py`).
    """
    engine = dict(settings.engine)
    cache = _given(extra, "--download-dir") or engine.get("download_dir")
    base = settings.base
    root = resolve_directory(base.model, base.revision, cache)
    other_tokenizer = _given(extra, "--tokenizer") or engine.get("tokenizer")
    check_base(root, _ranks(engine, extra), other_tokenizer is None)
    if base.quantized is not None:
        check_quantized(root, resolve_directory(base.quantized, None, cache))
    additional = dict(engine.pop("additional_config", {}))
    additional["deltamux"] = settings.plugin().model_dump(mode="json")
    options: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": settings.slots,
        "max_cpu_loras": max(settings.slots, len(settings.experts), 1),
        "max_lora_rank": LORA_RANK,
        "shutdown_timeout": DRAIN_SECONDS,
        # The files that experts' hashes were taken of, where a repository has the original format too.
        "config_format": "hf",
        "load_format": "hf",
        "additional_config": additional,
    }
    if base.revision and base.quantized is None:
        options["revision"] = base.revision
    arguments = ["--model", base.quantized or base.model]
    for name, value in (options | engine).items():
        arguments += _flag(name, value)
    return arguments + extra


def _given(extra: list[str], flag: str) -> str | None:
    """The value of a flag for vLLM on the command line, the last one; None: it is not given."""
    found = None
    for place, word in enumerate(extra):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else next(iter(extra[place + 1 :]), None)
    return found


def _ranks(engine: dict[str, Any], extra: list[str]) -> int:
    """Devices that share every matrix; what is no number is vLLM's own to refuse."""
    given = _given(extra, "--tensor-parallel-size") or _given(extra, "-tp")
    found = str(given or engine.get("tensor_parallel_size") or 1)
    return int(found) if found.isdecimal() and int(found) > 0 else 1


def check_port(engine: dict[str, Any], extra: list[str]) -> None:
    """Say who is in the way before vLLM, which would end with a traceback.

    Raises:
        ValueError: Something listens on the port.
    """
    if _given(extra, "--uds") or engine.get("uds"):
        return
    host = _given(extra, "--host") or engine.get("host") or ""
    port = _given(extra, "--port") or engine.get("port") or DEFAULT_PORT
    if not str(port).isdecimal() or int(port) == 0:
        return  # vLLM's own to refuse
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise ValueError(
                f"the port {port} of {host or 'this machine'!r} cannot be had: "
                f"{(error.strerror or str(error)).lower()}: end what listens there, or give another --port"
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of a host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


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
