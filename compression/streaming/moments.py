"""Second moments of every linear's input, collected on the expert layer by layer.

Changing a linear's weight by E changes its output by E x, so that the mean squared change of the
output is tr(E H Eᵀ) with H = E[x xᵀ] (Optimal Brain Compression, Frantar & Alistarh 2022, arXiv
2208.11580). The model runs and the sums are taken in float32: in bfloat16 sums stop growing after a
few hundred terms, and CPUs without matrix units are no faster in it.

Linears that read the same activations (q, k, v; gate, up) share one matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from deltamux.compression.checkpoint.architecture import Role, tensor_specs
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.streaming.forward import Activations, StreamedModel, batches
from deltamux.compression.streaming.text import Sample

BATCH_TOKENS = 8_192
# Of second moments that are kept for another look at the same layers; those of more are collected again. All layers'
# of SmolLM2-135M take 400 MB.
KEPT_BYTES = 2**29


class InputMoments:
    """E[x xᵀ] of the inputs of an expert's linears, layer by layer, as often as they are asked for.

    Args:
        expert: The fine-tuned model the activations come from.
        samples: Calibration conversations.
        kept_bytes: How much may be kept for another look.
    """

    def __init__(self, expert: Checkpoint, samples: list[Sample], kept_bytes: int = 0) -> None:
        self._expert = expert
        self._samples = samples
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._room = kept_bytes

    def of(self, layers: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The moments of some layers, ascending; see `second_moments`."""
        if all(layer in self._kept for layer in layers):
            yield from ((layer, self._kept[layer]) for layer in layers)
            return
        found = second_moments(self._expert, self._samples, lambda layer: layer not in layers)
        for layer, moments in found:
            if moments:
                self._keep(layer, moments)
                yield layer, moments
            if layer == layers[-1]:
                return

    def _keep(self, layer: int, moments: dict[str, torch.Tensor]) -> None:
        size = sum({moment.data_ptr(): moment.nbytes for moment in moments.values()}.values())
        if layer not in self._kept and size <= self._room:
            self._kept[layer] = moments
            self._room -= size


def second_moments(
    expert: Checkpoint,
    samples: list[Sample],
    skip: Callable[[int], bool] = lambda _layer: False,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """E[x xᵀ] of the inputs of each layer's linears over the tokens of the samples.

    Args:
        expert: The fine-tuned model the activations come from.
        samples: Calibration conversations.
        skip: Layers to pass without collecting.

    Yields:
        Layer index, and linear weight name to float32 [K, K] on the computing device; empty for a
        layer that was skipped. The next layer runs when the next item is asked for.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("second moments need at least one conversation: give calibration text")
    streamed = StreamedModel(expert.config, expert.load, torch.float32, expert.tied)
    states = streamed.start(list(batches(samples, BATCH_TOKENS)))
    specs = tensor_specs(expert.config, set(expert.files))
    readers: dict[int | None, dict[str, str]] = {}
    for spec in specs:
        if spec.role is Role.LINEAR:
            readers.setdefault(spec.layer, {})[spec.name] = spec.reader or spec.name
    for layer in range(streamed.num_layers):
        if skip(layer):
            streamed.advance(states, layer)
            yield layer, {}
            continue
        yield layer, _advance_and_average(streamed, states, layer, readers[layer])


def _advance_and_average(
    streamed: StreamedModel, states: list[Activations], layer: int, readers: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Run one layer over all batches; E[x xᵀ] by the name of every linear, whose first readers are given."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x_TK: torch.Tensor) -> None:
        sums[name] = torch.addmm(sums[name], x_TK.T, x_TK) if name in sums else x_TK.T @ x_TK

    hooks = [
        linear.register_forward_pre_hook(_collect(streamed, add, name))
        for name, linear in streamed.linears(layer)
        if readers[name] == name
    ]
    hooks += [
        module.register_forward_pre_hook(_collect_experts(streamed, add, rows))
        for module, rows in streamed.experts(layer)
    ]
    streamed.advance(states, layer)
    for handle in hooks:
        handle.remove()
    tokens = sum(int(state.inside_BT.sum()) for state in states)
    means = {source: total / tokens for source, total in sums.items()}
    return {name: means[reader] for name, reader in readers.items()}


Add = Callable[[str, torch.Tensor], None]
Hook = Callable[[nn.Module, tuple[torch.Tensor, ...]], None]


def _collect(streamed: StreamedModel, add: Add, name: str) -> Hook:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert streamed.running is not None
        add(name, args[0][streamed.running.inside_BT])

    return hook


def _collect_experts(streamed: StreamedModel, add: Add, rows: tuple[tuple[str, ...], ...]) -> Hook:
    """The inputs of a mixture's experts: each sees the tokens that were sent to it.

    Means are taken over all tokens, so that an expert counts for as much as it is used.
    """

    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        assert streamed.running is not None
        hidden_TH, chosen_TK = args[0], args[1]
        inside_T = streamed.running.inside_BT.flatten()
        for expert, names in enumerate(zip(*rows, strict=True)):
            x_TH = hidden_TH[(chosen_TK == expert).any(dim=1) & inside_T]
            add(names[0], x_TH)
            gate, up = (x_TH @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            add(names[-1], module.act_fn(gate) * up)

    return hook
