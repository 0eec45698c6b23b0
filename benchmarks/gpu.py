"""The GPU's products at Mistral-7B's shapes, with random weights: unattended, a few minutes on one GPU.

    python -m benchmarks.gpu              all of it, as far as what it needs is installed
    python -m benchmarks.gpu --kernels    the kernels alone

Correctness on real layers first; then each linear's product against the bytes it must read and against
the base's own product; a decode step's linears in one CUDA graph; a prompt of 4,096 tokens; an expert's
copy into a slot, alone and beside decoding: one table and one JSON line. Then, each in a process of its own
with a line of its own: vLLM's engine (gpu_engine.py), one layer compressed (layer_cost.py), and Humming's
kernels beside ours (gpu_humming.py).
"""

import argparse
import multiprocessing
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu_checks import CUDA, SLOTS, check_layers, launch, tensors
from benchmarks.gpu_images import rows_by_slot
from benchmarks.gpu_model import LAYERS, MISTRAL, Batch, Experts, Linear, batch_of, random_experts
from benchmarks.gpu_step import Step
from benchmarks.gpu_timing import copy_bandwidth, graph_milliseconds, graph_of, milliseconds
from benchmarks.record import record
from deltamux.serve.worker import triton_product
from deltamux.serve.worker.triton_launch import Tiling

# Active slots, rows of each.
BATCHES = ((1, 1), (4, 1), (16, 1), (1, 4), (1, 16), (4, 4), (16, 4))
STEPS = ((1, 1), (4, 1), (16, 1), (1, 16), (4, 4), (16, 4))
PROMPT = 4096
# What else is run, and the package that each needs.
OTHERS = {
    "benchmarks.gpu_engine": "vllm",
    "benchmarks.layer_cost": "pydantic",
    "benchmarks.gpu_humming": "humming",
}


@dataclass(frozen=True)
class Product:
    """One linear's product, timed."""

    linear: str
    slots: int
    rows: int
    microseconds: float
    floor_microseconds: float
    base_microseconds: float


def compile_one(job: tuple[int, int, Tiling | None]) -> str | None:
    """Compile the kernels of a linear for one row or for many, in a process of its own."""
    place, rows, tiling = job
    linear, batch = MISTRAL[place], batch_of(1, rows, SLOTS)
    slots = torch.zeros(SLOTS, 1 << 16, dtype=torch.uint8, device=CUDA)
    try:
        launch(linear, batch, slots, (0,) * len(linear.sizes), *tensors(linear, batch), tiling)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{linear.name}, {rows} rows, {tiling}: {error!r}"[:300]
    return None


def compile_ahead(tilings: list[Tiling | None]) -> None:
    """Fill triton's cache, a process for each kernel: compiling is most of the time otherwise."""
    jobs = [(p, r, t) for t in tilings for p in range(len(MISTRAL)) for r in (1, 16)]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        for problem in pool.imap_unordered(compile_one, jobs):
            if problem:
                print(problem)


def product_microseconds(
    linear: Linear, active: int, each: int, experts: Experts, tiling: Tiling | None = None
) -> float:
    """Time of one product, over layers enough that the cache holds none of them."""
    batch = batch_of(active, each, SLOTS)
    x, y = tensors(linear, batch)
    layers = 32 if linear.outputs * linear.columns < 1 << 25 else 10

    def work() -> None:
        for layer in range(layers):
            launch(linear, batch, experts.slots, experts.entries(layer, linear), x, y, tiling)

    return graph_milliseconds(work, 5) * 1e3 / layers


def base_microseconds(linear: Linear, rows: int, weights: torch.Tensor) -> float:
    x = torch.randn(rows, linear.columns, dtype=torch.bfloat16, device=CUDA)
    layers = min(len(weights), 8)
    work = lambda: [functional.linear(x, weights[layer]) for layer in range(layers)]  # noqa: E731
    return graph_milliseconds(work, 5) * 1e3 / layers


def time_products(experts: Experts, step: Step, bandwidth: float) -> list[Product]:
    found = []
    for active, each in BATCHES:
        for linear in MISTRAL:
            floor = active * experts.delta_bytes[linear.name] / bandwidth * 1e6
            found.append(
                Product(
                    linear.name,
                    active,
                    each,
                    product_microseconds(linear, active, each, experts),
                    floor,
                    base_microseconds(linear, active * each, step.weights[linear.name]),
                )
            )
    return found


def time_prompt(experts: Experts, step: Step) -> dict[str, float]:
    """A layer's linears for a prompt: the base's, one expert's, and two experts' halves."""
    mixes = {"base": [-1], "one expert": [0], "two experts": [0, 1]}
    found = {}
    for name, owners in mixes.items():
        rows = owners * (PROMPT // len(owners))
        batch = Batch(PROMPT, *rows_by_slot(rows, SLOTS, CUDA))
        found[name] = sum(
            milliseconds(partial(prompt_product, linear, batch, experts, step))
            for linear in MISTRAL
        )
    return found


def prompt_product(linear: Linear, batch: Batch, experts: Experts, step: Step) -> torch.Tensor:
    x, weight = step.input(linear, batch.rows), step.weights[linear.name][0]
    if batch.host[0] == batch.rows:
        return functional.linear(x, weight)
    return triton_product.linear(
        x, weight, None, batch.slot_of_row, batch.order, batch.starts, batch.host,
        experts.slots, experts.entries(0, linear), linear.sizes, 0,
    )  # fmt: skip


def time_copies(experts: Experts, step: Step) -> dict[str, float]:
    """Milliseconds of an image's copy into a slot, alone and beside a decoding step's replays."""
    image = torch.empty(experts.slots.shape[1], dtype=torch.uint8, pin_memory=True)
    slot = experts.slots[SLOTS - 1]
    batch = batch_of(1, 1, SLOTS)
    graph = graph_of(lambda: step.run(batch, "experts"))
    side = torch.cuda.Stream()
    alone = milliseconds(lambda: slot.copy_(image, non_blocking=True), 3)
    undisturbed = milliseconds(graph.replay)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replays = []
    with torch.cuda.stream(side):
        begin.record()
        slot.copy_(image, non_blocking=True)
        end.record()
    while not end.query():
        replays.append(milliseconds(graph.replay, 1))
    return {
        "copy": alone,
        "copy_while_decoding": begin.elapsed_time(end),
        "step": undisturbed,
        "step_while_copying": max(replays, default=0.0),
    }


def table(result: dict[str, Any]) -> None:
    print(f"\n{'linear':10}{'slots':>6}{'rows':>6}{'us':>9}{'of floor':>10}{'bf16 us':>9}")
    for each in result["products"]:
        share = each["floor_microseconds"] / each["microseconds"]
        print(
            f"{each['linear']:10}{each['slots']:6}{each['rows']:6}{each['microseconds']:9.1f}"
            f"{share:10.0%}{each['base_microseconds']:9.1f}"
        )
    print(f"\n{'step':>16}{'base ms':>10}{'experts ms':>12}{'ratio':>8}")
    for name, each in result["steps"].items():
        ratio = each["experts"] / each["base"]
        print(f"{name:>16}{each['base']:10.2f}{each['experts']:12.2f}{ratio:8.2f}")
    for name in ("prompt", "copies"):
        parts = ", ".join(f"{key} {value:.2f} ms" for key, value in result[name].items())
        print(f"{name}: {parts}")


def measure() -> dict[str, Any]:
    compile_ahead([None])
    error = check_layers()
    print(f"correct: relative error {error:.1e}")
    bandwidth = copy_bandwidth()
    experts = random_experts(SLOTS, LAYERS)
    step = Step(experts, triton_product.capabilities(CUDA))
    steps = {
        f"{active} x {each}": {
            mode: step.milliseconds(batch_of(active, each, SLOTS), mode)
            for mode in ("base", "experts", "delta")
        }
        for active, each in STEPS
    }
    return {
        "error": error,
        "copy_bytes_per_second": bandwidth,
        "slot_bytes": experts.slots.shape[1],
        "products": [asdict(each) for each in time_products(experts, step, bandwidth)],
        "steps": steps,
        "prompt": time_prompt(experts, step),
        "copies": time_copies(experts, step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="leave the rest out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs an NVIDIA GPU that torch sees")
    if not triton_product.usable(CUDA):
        raise SystemExit("the kernels do not run here; the warning above says why")
    result = measure()
    table(result)
    record("gpu-kernels", result)
    if options.kernels:
        return
    torch.cuda.empty_cache()
    for module, needed in OTHERS.items():
        if find_spec(needed) is None:
            print(f"{module}: left out, {needed} is not installed")
        else:
            subprocess.run([sys.executable, "-m", module], check=True)


if __name__ == "__main__":
    main()
