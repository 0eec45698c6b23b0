"""A decoder's forward pass with weights that come and go layer by layer.

transformers' own model class runs on the meta device; each decoder layer is filled from a weight
source right before it runs and emptied right after, so that memory holds one layer, the embedding
and the activations of one batch.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from deltamux.compression.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from deltamux.compression.text import Sample

WeightSource = Callable[[str], torch.Tensor]
"""Tensor name to tensor."""


class StreamedModel:
    """The decoder of a checkpoint's architecture over a weight source.

    Args:
        config_directory: A checkpoint whose `config.json` describes the architecture.
        source: Gives every weight by its checkpoint name.
        dtype: The dtype to compute in.
        tied: Whether lm_head is the embedding.
    """

    def __init__(
        self, config_directory: Path, source: WeightSource, dtype: torch.dtype, tied: bool
    ) -> None:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(config_directory)
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=dtype)
        # Its frequencies are computed, not stored: on the meta device they would be empty.
        model.rotary_emb = type(model.rotary_emb)(config=config)
        self.model = model.eval()
        self.dtype = dtype
        self._source = source
        self._head_name = EMBEDDING if tied else LM_HEAD
        self._stream(model.embed_tokens, EMBEDDING.removesuffix("weight"))
        self._stream(model.norm, FINAL_NORM.removesuffix("weight"))
        for index, layer in enumerate(model.layers):
            self._stream(layer, layer_prefix(index))

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Every linear of the decoder with its checkpoint name."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                yield f"model.{name}.weight", module

    @torch.no_grad()
    def hidden_states(self, samples: list[Sample]) -> torch.Tensor:
        """Final hidden states of the positions that predict a response token.

        The samples run as one right-padded batch; causal attention keeps padding from reaching
        real positions.

        Returns:
            [P, hidden], sample after sample, in the model's dtype.
        """
        longest = max(len(sample.ids) for sample in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample.ids)] = sample.ids
        hidden = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.cat(
            [
                hidden[row, sample.response_start - 1 : len(sample.ids) - 1]
                for row, sample in enumerate(samples)
            ]
        )

    def head(self) -> torch.Tensor:
        """The lm_head's weight [V, hidden]."""
        return self._source(self._head_name).to(self.dtype)

    def _stream(self, module: nn.Module, prefix: str) -> None:
        def fill(module: nn.Module, _args: object) -> None:
            for name, parameter in list(module.named_parameters()):
                weight = self._source(prefix + name)
                if weight.shape != parameter.shape:
                    raise ValueError(
                        f"tensor {prefix + name!r} has shape {tuple(weight.shape)}, "
                        f"the architecture wants {tuple(parameter.shape)}"
                    )
                _set_parameter(module, name, weight.to(self.dtype))

        def empty(module: nn.Module, _args: object, _output: object) -> None:
            for name, parameter in list(module.named_parameters()):
                _set_parameter(module, name, torch.empty_like(parameter, device="meta"))
            release_memory()

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)


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
    """Samples of like length together, at most `max_tokens` padded tokens a batch."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if batch and len(sample.ids) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
