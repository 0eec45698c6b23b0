"""Memory by kind, in parts that add up to what the operating system and the device report.

    host   = resident memory of the server's processes      (their RSS, summed; /proc)
    device = memory in use on the GPU                        (NVML; only with a GPU)

`base`, `slots` and `kv_cache` are exact sizes of buffers on the device, `host_cache` of buffers on the
host; `process` is the rest of host (interpreters, libraries, activations on a CPU) and `workspace` the
rest of device (activations, captured graphs, the CUDA context). On a CPU the device is the host, with all ranks
(tensor parallelism) in it; of several GPUs the first is shown.
Pages that several processes share (the libraries) count in each, as in `ps`.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deltamux.serve import compat

HOST, DEVICE = "host", "device"
# Seconds for which the list of processes is kept; walking /proc costs more than reading their sizes.
# Chosen, not measured.
PROCESSES_SECONDS = 10.0
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Reported:
    """What is in use somewhere, and how much there is, bytes."""

    used: int
    limit: int


class Memory:
    """The memory of a server.

    Args:
        config: vLLM's configuration.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._processes: list[psutil.Process] = []
        self._listed = -PROCESSES_SECONDS

    def reported(self) -> dict[str, Reported]:
        """By place: what the operating system and, with a GPU, the device say."""
        found = {HOST: Reported(self._resident(), host_limit())}
        if compat.on_gpu():
            found[DEVICE] = Reported(*compat.device_memory())
        return found

    def by_kind(self, worker: dict[str, int], reported: dict[str, Reported]) -> dict[str, int]:
        """Bytes by kind.

        Args:
            worker: What the workers publish, all ranks together: base, slots, host_cache.
            reported: What `reported` returned.

        Returns:
            Kinds that sum to what is reported. A buffer that the system has not filled with pages
            yet can make them sum to more; no kind is below 0.
        """
        kinds = {kind: worker.get(kind, 0) for kind in ("base", "slots", "host_cache")}
        ranks = int(self._config.parallel_config.tensor_parallel_size)
        kinds["kv_cache"] = ranks * kv_cache_bytes(self._config)
        if DEVICE in reported:
            kinds |= {kind: kinds[kind] // ranks for kind in ("base", "slots", "kv_cache")}
        on_device = kinds["base"] + kinds["slots"] + kinds["kv_cache"]
        on_host = kinds["host_cache"]
        if DEVICE in reported:
            kinds["workspace"] = max(reported[DEVICE].used - on_device, 0)
        else:
            on_host += on_device
        return kinds | {"process": max(reported[HOST].used - on_host, 0)}

    def _resident(self) -> int:
        now = time.monotonic()
        if now - self._listed > PROCESSES_SECONDS:
            own = psutil.Process()
            self._processes = [own, *own.children(recursive=True)]
            self._listed = now
        return sum(map(_rss, self._processes))


def _rss(process: psutil.Process) -> int:
    try:
        size: int = process.memory_info().rss
    except psutil.Error:
        return 0  # it has ended since it was listed
    return size


def host_limit() -> int:
    """Bytes that the server may use: its container's limit, or the machine's memory."""
    total: int = psutil.virtual_memory().total
    for path in CGROUP_LIMITS:
        if path.is_file() and os.access(path, os.R_OK):
            text = path.read_text().strip()
            return min(int(text), total) if text.isdigit() else total
    return total


def kv_cache_bytes(config: Any) -> int:
    """Bytes of the KV cache on a rank: blocks × tokens × layers × (key and value)."""
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    layers = model.get_num_layers(parallel)
    width = model.get_num_kv_heads(parallel) * model.get_head_size()
    tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    itemsize = 1 if str(cache.cache_dtype).startswith("fp8") else model.dtype.itemsize
    return int(tokens * layers * width * 2 * itemsize)
