"""Second moments of every linear's input, collected on the expert layer by layer.

Changing a linear's weight by E changes its output by E x, so that the mean squared change of the
output is tr(E H Eᵀ) with H = E[x xᵀ] (Optimal Brain Compression, Frantar & Alistarh 2022, arXiv
2208.11580). The model runs and the sums are taken in float32: in bfloat16 sums stop growing after a
few hundred terms, and CPUs without matrix units are no faster in it.

Linears that read the same activations (q, k, v; gate, up) share one matrix.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from deltamux.compression.checkpoint.architecture import first_reader
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.streaming.forward import Activations, StreamedModel, batches
from deltamux.compression.streaming.text import Sample

BATCH_TOKENS = 8_192


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
    streamed = StreamedModel(expert.root, expert.load, torch.float32, expert.tied)
    states = streamed.start(list(batches(samples, BATCH_TOKENS)))
    for layer in range(streamed.num_layers):
        if skip(layer):
            streamed.advance(states, layer)
            yield layer, {}
            continue
        yield layer, _advance_and_average(streamed, states, layer)


def _advance_and_average(
    streamed: StreamedModel, states: list[Activations], layer: int
) -> dict[str, torch.Tensor]:
    """Run one layer over all batches; E[x xᵀ] by the name of every linear."""
    sums: dict[str, torch.Tensor] = {}
    linears = dict(streamed.linears(layer))
    sources = {name: first_reader(name) for name in linears}

    def collect(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
            assert streamed.running is not None
            x_TK = args[0][streamed.running.inside_BT]
            sums[name] = torch.addmm(sums[name], x_TK.T, x_TK) if name in sums else x_TK.T @ x_TK

        return hook

    hooks = [
        linears[name].register_forward_pre_hook(collect(name)) for name in set(sources.values())
    ]
    streamed.advance(states, layer)
    for handle in hooks:
        handle.remove()
    tokens = sum(int(state.inside_BT.sum()) for state in states)
    means = {source: total / tokens for source, total in sums.items()}
    return {name: means[source] for name, source in sources.items()}
