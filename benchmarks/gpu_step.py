"""A decode step of Mistral-7B's linears in one CUDA graph, with and without experts.

What a step has beside its linears (attention, norms, sampling) is left out: a whole step's ratio is
smaller than the one found here. Shapes: T rows, N outputs, K inputs.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.gpu_model import LAYERS, MISTRAL, Batch, Experts, Linear
from benchmarks.gpu_timing import graph_milliseconds
from deltamux.serve.worker.triton_launch import Capabilities, launch_product


class Step:
    """Weights and buffers of a step; inputs are the same in every layer."""

    def __init__(self, experts: Experts, capabilities: Capabilities, layers: int = LAYERS) -> None:
        self.experts, self.capabilities, self.layers = experts, capabilities, layers
        self._inputs: dict[tuple[str, int], torch.Tensor] = {}
        self.weights = {
            linear.name: torch.randn(
                layers, linear.outputs, linear.columns, dtype=torch.bfloat16, device="cuda"
            )
            for linear in MISTRAL
        }

    def milliseconds(self, batch: Batch, mode: str) -> float:
        """Median time of a step: "base", "experts" (both) or "delta" (what experts add, alone)."""
        return graph_milliseconds(lambda: self.run(batch, mode))

    def run(self, batch: Batch, mode: str) -> None:
        """All linears of a step."""
        run: Callable[..., object] = getattr(self, f"_{mode}")
        for layer in range(self.layers):
            for linear in MISTRAL:
                run(layer, linear, self.input(linear, batch.rows), batch)

    def input(self, linear: Linear, rows: int) -> torch.Tensor:
        """Random inputs, the same at every call."""
        key = linear.name, rows
        if key not in self._inputs:
            shape = rows, linear.columns
            self._inputs[key] = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        return self._inputs[key]

    def _base(self, layer: int, linear: Linear, x: torch.Tensor, _: Batch) -> torch.Tensor:
        return functional.linear(x, self.weights[linear.name][layer])

    def _launch(
        self, y: torch.Tensor, layer: int, linear: Linear, x: torch.Tensor, batch: Batch
    ) -> None:
        launch_product(
            y, x, batch.slot_of_row,
            batch.order, batch.starts, self.experts.slots,
            self.experts.entries(layer, linear), linear.sizes, 0, False, self.capabilities,
        )  # fmt: skip

    def _experts(self, layer: int, linear: Linear, x: torch.Tensor, batch: Batch) -> None:
        self._launch(self._base(layer, linear, x, batch), layer, linear, x, batch)

    def _delta(self, layer: int, linear: Linear, x: torch.Tensor, batch: Batch) -> None:
        y = x.new_empty(batch.rows, linear.outputs)
        self._launch(y, layer, linear, x, batch)
