"""The backward pass of a streamed decoder, layer by layer.

The forward pass keeps what enters every layer; going back, a layer is filled once more, run again
with gradients, and emptied. Memory holds one layer and the activations between layers (Chen et al.
2016, arXiv 1604.06174, with one checkpoint a layer).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from deltamux.compression.checkpoint.architecture import FINAL_NORM, layer_prefix
from deltamux.compression.streaming.forward import Activations, StreamedModel
from deltamux.compression.streaming.text import Sample

Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Linear weight name, its input [B, T, K], the gradient at its output [B, T, N]."""
Objective = Callable[[torch.Tensor, slice], torch.Tensor]
"""Final hidden states [P, H] of predicting positions, which ones of all they are, to a scalar."""
# Positions whose logits are in memory at once.
HEAD_CHUNK = 256


@dataclass
class Activated:
    """A model that has run forward over batches.

    Attributes:
        model: The model.
        states: The batches behind the last layer.
        entering: For each layer, what each batch entered it with.
    """

    model: StreamedModel
    states: list[Activations]
    entering: list[list[torch.Tensor]]

    @classmethod
    def through(cls, model: StreamedModel, plan: list[list[Sample]]) -> "Activated":
        """Run all layers, keeping what enters each."""
        states = model.start(plan)
        entering = []
        for layer in range(model.num_layers):
            entering.append([state.hidden_BTH for state in states])
            model.advance(states, layer)
        return cls(model, states, entering)


def final_gradients(run: Activated, objective: Objective) -> list[torch.Tensor]:
    """Gradients of an objective at the last layer's output, one tensor a batch.

    Args:
        run: The forward pass.
        objective: From the final hidden states [P, H] of some predicting positions, and which ones of all
            batches' they are, to a sum over them.
    """
    gradients: list[torch.Tensor] = []
    begin = 0
    with run.model.filled(run.model.model.norm, FINAL_NORM.removesuffix("weight")) as norm:
        for state in run.states:
            hidden_BTH = state.hidden_BTH.detach().requires_grad_()
            final_PH = norm(hidden_BTH[state.predicting_BT])
            gradient_PH = _gradient(objective, final_PH.detach(), begin)
            gradients += torch.autograd.grad(final_PH, hidden_BTH, gradient_PH)
            begin += len(final_PH)
    return gradients


def _gradient(objective: Objective, final_PH: torch.Tensor, begin: int) -> torch.Tensor:
    """Its gradient at final hidden states, a chunk at a time: logits of all of them would not fit in memory."""
    parts = [final_PH[:0]]
    for start in range(0, len(final_PH), HEAD_CHUNK):
        chunk_PH = final_PH[start : start + HEAD_CHUNK].requires_grad_()
        places = slice(begin + start, begin + start + len(chunk_PH))
        parts += torch.autograd.grad(objective(chunk_PH, places), chunk_PH)
    return torch.cat(parts)


def layer_gradients(
    run: Activated, layer: int, gradients: list[torch.Tensor], visit: Visit
) -> list[torch.Tensor]:
    """Gradients at a layer's input from those at its output; `visit` sees every linear's."""
    noted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            noted[name] = args[0].detach(), output

        return hook

    handles = [
        linear.register_forward_hook(note(name)) for name, linear in run.model.linears(layer)
    ]
    below = []
    with run.model.filled(run.model.model.layers[layer], layer_prefix(layer)) as module:
        for state, hidden, gradient in zip(run.states, run.entering[layer], gradients, strict=True):
            inputs = hidden.detach().requires_grad_()
            result = module(inputs, **state.layer_arguments[layer])
            outputs = [output for _, output in noted.values()]
            at_input, *at_outputs = torch.autograd.grad(result, [inputs, *outputs], gradient)
            below.append(at_input)
            for (name, (seen, _)), value in zip(noted.items(), at_outputs, strict=True):
                visit(name, seen, value)
    for handle in handles:
        handle.remove()
    return below
