"""A decode step of Mistral-7B's linears in one CUDA graph, with and without experts.

What a step has beside its linears (attention, norms, sampling) is left out: a whole step's ratio is
smaller than the one found here. Shapes: T rows, N outputs, K inputs.
"""

from collections.abc import Callable

import torch
from gpu_model import LAYERS, MISTRAL, Batch, Experts, Linear
from gpu_timing import graph_milliseconds
from torch.nn import functional

from deltamux.serve.worker.triton_product import Capabilities, launch_product


class Step:
    """Weights and buffers of a step; inputs are the same in every layer."""

    def __init__(self, experts: Experts, capabilities: Capabilities, layers: int = LAYERS) -> None:
        self.experts, self.capabilities, self.layers = experts, capabilities, layers
        self.weights = {
            linear.name: torch.randn(
                layers, linear.outputs, linear.columns, dtype=torch.bfloat16, device="cuda"
            )
            for linear in MISTRAL
        }

    def milliseconds(self, batch: Batch, mode: str) -> float:
        """Median time of a step: "base", "experts" (both) or "delta" (what experts add, alone)."""
        inputs = {
            linear.name: torch.randn(
                batch.rows, linear.columns, dtype=torch.bfloat16, device="cuda"
            )
            for linear in MISTRAL
        }
        run: Callable[..., None] = {
            "base": self._base, "experts": self._experts, "delta": self._delta
        }[mode]  # fmt: skip

        def step() -> None:
            for layer in range(self.layers):
                for linear in MISTRAL:
                    run(layer, linear, inputs[linear.name], batch)

        return graph_milliseconds(step)

    def _base(self, layer: int, linear: Linear, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return functional.linear(x, self.weights[linear.name][layer])

    def _launch(
        self, y: torch.Tensor, layer: int, linear: Linear, x: torch.Tensor, batch: Batch
    ) -> None:
        launch_product(
            y, x, batch.order, batch.starts, self.experts.slots,
            self.experts.entries(layer, linear), linear.sizes, False, self.capabilities,
        )  # fmt: skip

    def _experts(self, layer: int, linear: Linear, x: torch.Tensor, batch: Batch) -> None:
        self._launch(self._base(layer, linear, x, batch), layer, linear, x, batch)

    def _delta(self, layer: int, linear: Linear, x: torch.Tensor, batch: Batch) -> None:
        y = x.new_empty(batch.rows, linear.outputs)
        self._launch(y, layer, linear, x, batch)
