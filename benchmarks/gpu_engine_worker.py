"""What the engine's benchmark does inside of vLLM's worker (`collective_rpc`)."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_engine_base import random_record
from deltamux.compression.image.layout import assemble
from deltamux.serve import compat

ROUNDS = 3


def manager_of(worker: Any) -> Any:
    """Deltamux's manager."""
    return _runner(worker).lora_manager


def _runner(worker: Any) -> Any:
    return getattr(worker, "worker", worker).model_runner


def fill_host_cache(worker: Any, count: int) -> int:
    """Put a random image under every expert's id; a slot's bytes."""
    manager = manager_of(worker)
    # Dummy weights are some 1e-3, norms too: with those of 1 activations are of order 1.
    _, _, norm = compat.hooked_layers()
    for module in _runner(worker).get_model().modules():
        if isinstance(module, norm):
            module.weight.data.fill_(1)
    rng = np.random.default_rng(0)
    records = {
        index: random_record(*shape, rng)
        for index, shape in enumerate(manager.shapes.values())
        if len(shape) == 2
    }
    image = assemble(records, len(manager.shapes))
    if torch.cuda.is_available():
        image = image.pin_memory()
    for expert_id in range(1, count + 1):
        manager.residency.host.put(expert_id, image)
    assert image.numel() <= manager.slots.slot_bytes
    return int(manager.slots.slot_bytes)


def merge_first_expert(worker: Any) -> None:
    """Add the delta of slot 0, the first expert's image, to the base's weights."""
    from deltamux.serve.worker.triton_dense import launch_dense

    manager = manager_of(worker)
    manager.slots.load(0, manager.residency.host.get(1))
    model = _runner(worker).get_model()
    linear, _, _ = compat.hooked_layers()
    linears = [(name, each) for name, each in model.named_modules() if isinstance(each, linear)]
    tables = [("lm_head", model.lm_head), ("model.embed_tokens", model.model.embed_tokens)]
    for name, module in [*linears, *tables]:
        parent, dot, leaf = name.rpartition(".")
        start = 0
        for part in model.packed_modules_mapping.get(leaf, [leaf]):
            weight = f"{parent}{dot}{part}.weight"
            rows = manager.shapes[weight][0]
            target = module.weight.data[start : start + rows]
            merged = torch.empty_like(target)
            launch_dense(merged, manager.slots.buffer, 0, manager.slots.index(weight), target)
            target.copy_(merged)
            start += rows


def time_copies(worker: Any) -> dict[str, float]:
    """Seconds of a plain copy of an image to the device, and of one into a slot."""
    manager = manager_of(worker)
    image = manager.residency.host.get(1)
    device = manager.slots.buffer.device
    target = torch.empty(image.numel(), dtype=torch.uint8, device=device)

    def spent(copy: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS + 1):
            _wait(device)
            start = time.perf_counter()
            copy()
            _wait(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return {
        "plain": spent(lambda: target.copy_(image, non_blocking=True)),
        "slot": spent(lambda: manager.slots.load(0, image)),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_memory(worker: Any) -> dict[str, int]:
    """Bytes: what NVML says is used, what torch allocated, and the parts that the metrics name."""
    parts = dict(manager_of(worker).residency.status.memory_bytes)
    if not torch.cuda.is_available():
        return parts
    used, total = compat.device_memory()
    return parts | {"nvml": used, "card": total, "allocated": torch.cuda.memory_allocated()}
