"""Humming's kernels with 2-bit weights at Mistral-7B's shapes, beside ours: products of one slot and of 16.

    python -m benchmarks.gpu_humming

Needs `humming-kernels` and the CUDA compiler (nvcc), which it calls for every kernel. Humming knows neither
escapes nor slots that are loaded by a copy: its layout is one tensor for all experts of a layer. Its
products are therefore a bound on what planes alone could take, not a product that can stand in for ours.
"""

from typing import Any

import torch

from benchmarks.gpu_model import MISTRAL, Linear
from benchmarks.gpu_timing import graph_milliseconds
from benchmarks.record import record

ROWS = (1, 4, 16)
LAYERS = 16
CUDA = torch.device("cuda")


def layers(linear: Linear, count: int, experts: int | None) -> list[Any]:
    """Layers with random weights: many, so that the cache holds none of them."""
    from humming.layer import HummingLayer

    made = []
    for _ in range(count):
        layer = HummingLayer(
            linear.outputs, linear.columns, {"dtype": "uint2"}, num_experts=experts,
            torch_dtype=torch.bfloat16,
        ).cuda()  # fmt: skip
        for parameter in layer.parameters():
            if parameter.dtype == torch.int32:
                parameter.data.random_(-(2**31), 2**31 - 1)
            else:
                parameter.data.normal_(std=0.01)
        layer.transform()
        made.append(layer)
    return made


def dense(linear: Linear, rows: int) -> float:
    """Microseconds of a product with one expert's weights."""
    made = layers(linear, LAYERS, None)
    x = torch.randn(rows, linear.columns, dtype=torch.bfloat16, device=CUDA)
    return graph_milliseconds(lambda: [layer(x) for layer in made], 5) * 1e3 / LAYERS


def indexed(linear: Linear, experts: int, block: int = 8) -> float:
    """Microseconds of a product of one row for each of the experts, in one launch."""
    made = layers(linear, 4, experts)
    x = torch.randn(experts, linear.columns, dtype=torch.bfloat16, device=CUDA)
    rows = torch.full((experts, block), experts, dtype=torch.int32, device=CUDA)
    rows[:, 0] = torch.arange(experts, device=CUDA)
    options = {
        "sorted_ids": rows.flatten(),
        "expert_ids": torch.arange(experts, dtype=torch.int32, device=CUDA),
        "num_tokens_padded": torch.tensor(rows.numel(), dtype=torch.int32, device=CUDA),
        "top_k": 1,
        "compute_config": {"gemm_type": "indexed"},
    }
    return graph_milliseconds(lambda: [layer(x, **options) for layer in made], 5) * 1e3 / 4


def main() -> None:
    found: dict[str, float] = {}
    for linear in MISTRAL:
        for rows in ROWS:
            found[f"{linear.name}, 1 slot, {rows} rows"] = dense(linear, rows)
        try:
            found[f"{linear.name}, 16 slots, 1 row"] = indexed(linear, 16)
        # Whatever its kernels object to is the result.
        except Exception as error:
            print(f"{linear.name}, 16 slots: {error!r}"[:300])
        for name, value in found.items():
            if name.startswith(linear.name):
                print(f"{name:28}{value:8.1f} us", flush=True)
    record("gpu-humming", {"microseconds": found})


if __name__ == "__main__":
    main()
