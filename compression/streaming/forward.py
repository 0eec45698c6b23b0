"""A decoder's forward pass with weights that come and go layer by layer.

transformers' own model class runs on the meta device; each decoder layer is filled from a weight
source, runs over all batches, and is emptied again, so that memory holds one layer and the
activations between two layers.
"""

import copy
import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltamux.compression.checkpoint.architecture import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    architecture,
    build_empty,
    layer_prefix,
)
from deltamux.compression.streaming.text import Sample

# A batch of at least so many tokens takes no sample with which its padded ones are more than so many times its own. On
# a core, products of 500 rows are as fast a row as those of 5,000; chosen, not measured further.
LEAST_TOKENS, MOST_PADDING = 512, 1.1

WeightSource = Callable[[str], torch.Tensor]
"""Tensor name to tensor."""


@dataclass
class Activations:
    """One batch on its way through the layers.

    Attributes:
        hidden_BTH: What enters the next layer.
        layer_arguments: Mask, positions and rotary embeddings, for each layer.
        inside_BT: Which positions are tokens, not padding.
        predicting_BT: Which positions predict a response token.
        targets_P: The tokens predicted there, sample after sample, on the CPU.
    """

    hidden_BTH: torch.Tensor
    layer_arguments: list[dict[str, Any]]
    inside_BT: torch.Tensor
    predicting_BT: torch.Tensor
    targets_P: torch.Tensor


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StreamedModel:
    """The decoder of a checkpoint's architecture over a weight source.

    Args:
        config: The content of the checkpoint's `config.json`.
        source: Gives every weight by its checkpoint name.
        dtype: The dtype to compute in.
        tied: Whether lm_head is the embedding.
        device: Where to compute; None: the GPU if there is one.
    """

    def __init__(
        self,
        config: dict[str, Any],
        source: WeightSource,
        dtype: torch.dtype,
        tied: bool,
        device: torch.device | None = None,
    ) -> None:
        device = device or best_device()
        self._causal = build_empty(config, dtype)
        _compute_buffers(self._causal, device)
        self.model = self._causal.model
        self.stacked = architecture(config).stacked
        self.dtype = dtype
        self.device = device
        self.running: Activations | None = None  # the batch that a hook is called for
        self._source = source
        self._head_name = EMBEDDING if tied else LM_HEAD

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.model.layers)

    def linears(self, layer: int) -> Iterator[tuple[str, nn.Linear]]:
        """Every linear of a decoder layer with its checkpoint name."""
        for name, module in self.model.layers[layer].named_modules():
            if isinstance(module, nn.Linear):
                yield f"{layer_prefix(layer)}{name}.weight", module

    @torch.no_grad()
    def start(self, plan: list[list[Sample]]) -> list[Activations]:
        """Each batch of samples as it enters the first layer.

        Samples of a batch are padded on the right; causal attention keeps padding from reaching real
        positions.
        """
        return [self._start(samples) for samples in plan]

    @torch.no_grad()
    def advance(self, states: list[Activations], layer: int) -> None:
        """Run one layer over all batches, in place; its weights are read once."""
        with self.filled(self.model.layers[layer], layer_prefix(layer)) as module:
            for state in states:
                self.running = state
                state.hidden_BTH = module(state.hidden_BTH, **state.layer_arguments[layer])

    @torch.no_grad()
    def hidden_states(
        self, plan: list[list[Sample]], done: Callable[[], object] = lambda: None
    ) -> torch.Tensor:
        """Final hidden states of the positions that predict a response token.

        Args:
            plan: Batches of samples.
            done: Called after every layer.

        Returns:
            [P, hidden], sample after sample, in the model's dtype.
        """
        states = self.start(plan)
        for layer in range(self.num_layers):
            self.advance(states, layer)
            done()
        return torch.cat([self.final(state) for state in states])

    def final(self, state: Activations) -> torch.Tensor:
        """The final norm's output at the positions that predict a response token, [P, hidden]."""
        with self.filled(self.model.norm, FINAL_NORM.removesuffix("weight")) as norm:
            hidden: torch.Tensor = norm(state.hidden_BTH[state.predicting_BT])
        return hidden

    def head(self) -> torch.Tensor:
        """The lm_head's weight [V, hidden]."""
        return self._source(self._head_name).to(self.device, self.dtype)

    def logits(self, final_PH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
        """Logits [P, V] of final hidden states, scaled and capped as the model's own class does it."""
        vocabulary, hidden = head_VH.shape
        head = nn.Linear(hidden, vocabulary, bias=False, device="meta")
        _set_parameter(head, "weight", head_VH)
        around = copy.copy(self._causal)
        around._modules = self._causal._modules | {"model": _Given(final_PH), "lm_head": head}
        logits: torch.Tensor = around(inputs_embeds=final_PH.unsqueeze(0), use_cache=False).logits[
            0
        ]
        return logits

    def experts(self, layer: int) -> Iterator[tuple[nn.Module, tuple[tuple[str, ...], ...]]]:
        """The stacks of a mixture's experts in a layer, with the names of their matrices, expert by expert.

        The first ones read the block's input, the last one what they make of it.
        """
        for name, module in self.model.layers[layer].named_modules():
            own = dict(module.named_parameters(recurse=False))
            if any(parameter.ndim == 3 for parameter in own.values()):
                prefix = f"{layer_prefix(layer)}{name}"
                yield module, tuple(row for each in own for row in self.stacked[f"{prefix}.{each}"])

    @contextmanager
    def filled(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        """The module with its weights inside the block, empty again behind it."""
        for name, parameter in list(module.named_parameters()):
            weight = self._parameter(prefix + name, parameter.ndim)
            if weight.shape != parameter.shape:
                raise ValueError(
                    f"tensor {prefix + name!r} has shape {tuple(weight.shape)}, "
                    f"the architecture wants {tuple(parameter.shape)}"
                )
            _set_parameter(module, name, weight.to(self.device, self.dtype))
        yield module
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta"))
        release_memory()

    def _parameter(self, name: str, dimensions: int) -> torch.Tensor:
        """A parameter of transformers' class, put together from the checkpoint's tensors."""
        rows = self.stacked.get(name, ((name,),))
        if dimensions < 3:
            return self._source(rows[0][0])
        return torch.cat([torch.stack([self._source(part) for part in row]) for row in rows], dim=1)

    def _start(self, samples: list[Sample]) -> Activations:
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        starts = torch.tensor([sample.response_start for sample in samples])
        position = torch.arange(int(lengths.max()))
        ids = torch.zeros(len(samples), len(position), dtype=torch.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample.ids)] = sample.ids
        ids = ids.to(self.device)
        seen: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def record(hidden: torch.Tensor, *_: Any, **named: Any) -> torch.Tensor:
            seen.append(hidden)
            arguments.append(named)
            return hidden

        # The model prepares masks and rotary embeddings itself; its layers only note them.
        with ExitStack() as stack:
            for layer in self.model.layers:
                stack.callback(setattr, layer, "forward", layer.forward)
                layer.forward = record
            stack.enter_context(
                self.filled(self.model.embed_tokens, EMBEDDING.removesuffix("weight"))
            )
            stack.enter_context(self.filled(self.model.norm, FINAL_NORM.removesuffix("weight")))
            self.model(input_ids=ids, use_cache=False)
        inside = position < lengths.unsqueeze(1)
        predicting = (position >= starts.unsqueeze(1) - 1) & (position < lengths.unsqueeze(1) - 1)
        targets = torch.cat([sample.predicted for sample in samples])
        return Activations(
            seen[0], arguments, inside.to(self.device), predicting.to(self.device), targets
        )


class _Given(nn.Module):
    """Stands for the decoder, and gives final hidden states that are known already."""

    def __init__(self, hidden_PH: torch.Tensor) -> None:
        super().__init__()
        self._hidden_PH = hidden_PH

    def forward(self, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self._hidden_PH.unsqueeze(0))


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Fill what is computed and not stored, such as rotary frequencies: on the meta device it is empty."""
    for module in model.modules():
        computed = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        if computed:
            for name, buffer in computed.items():
                module._buffers[name] = torch.empty_like(buffer, device=device)
            with torch.no_grad():
                model._init_weights(module)


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps freed blocks below 32 MB: over the layers of a small model they would add up to
    several times its size. Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def batches(samples: list[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """Samples of like length together, at most `max_tokens` padded tokens a batch.

    A batch that is large enough takes no sample that would leave much of it to padding.
    """
    batch: list[Sample] = []
    tokens = 0
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        length = len(sample.ids)
        padded = length * (len(batch) + 1)
        wasteful = tokens >= LEAST_TOKENS and padded > MOST_PADDING * (tokens + length)
        if batch and (padded > max_tokens or wasteful):
            yield batch
            batch, tokens = [], 0
        batch.append(sample)
        tokens += length
    if batch:
        yield batch
