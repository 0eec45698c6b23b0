"""A text of shapes runs through a model, and what reads whose output is noted.

Two modules read the same activations where their inputs lie in the same storage; these are a norm's output where the
norm's lies there too. A mixture's experts are stacked in transformers' class and one by one in checkpoints: its own
conversion says how they belong together.

    y = W (g ⊙ x̂),  g = weight + offset        what a norm multiplies with: Gemma stores g − 1
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deltamux.compression.checkpoint.architecture import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    Architecture,
    Role,
    TensorSpec,
    layer_prefix,
)

# Tokens of the text of shapes.
TRACED_TOKENS = 4
# A parameter of transformers' class, and the rows of checkpoint tensors that it is put together of.
Stacked = dict[str, tuple[tuple[str, ...], ...]]


def traced(model: Any) -> Architecture:
    """What a model on the meta device consists of."""
    return _Tracer(model).architecture()


class _Tracer:
    """Runs shapes through a model, and notes who reads whose output."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._written: dict[int, str] = {}  # storage → the norm whose output it is
        self._read: dict[str, int] = {}  # module → the storage of its input
        self._kept: list[torch.Tensor] = []  # so that no storage is given out twice
        self._offsets: dict[type, float] = {}

    def architecture(self) -> Architecture:
        self._trace()
        layers = len(self._model.model.layers)
        specs = [TensorSpec(EMBEDDING, Role.EMBEDDING)]
        stacked: Stacked = {}
        for layer in range(layers):
            found = list(self._layer(layer, stacked))
            # Norms first: short names are those of the layer itself.
            norms = [spec for spec in found if spec.role is Role.NORM]
            norms.sort(key=lambda spec: spec.name.count("."))
            specs += norms + [spec for spec in found if spec.role is not Role.NORM]
        offset = self._offset(self._model.model.norm)
        specs += [
            TensorSpec(FINAL_NORM, Role.NORM, offset=offset),
            TensorSpec(LM_HEAD, Role.LM_HEAD),
        ]
        return Architecture(tuple(_with_readers(specs)), stacked)

    def _trace(self) -> None:
        for name, module in self._model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if _is_norm(own):
                module.register_forward_hook(self._note_written(name))
            elif own:
                module.register_forward_pre_hook(self._note_read(name), with_kwargs=True)
            if any(parameter.ndim == 3 for parameter in own.values()):
                # Which of a mixture's experts are asked depends on values.
                module.forward = _same_shape
        shape = (1, TRACED_TOKENS)
        ids = torch.zeros(shape, dtype=torch.int64, device="meta")
        # Given, since making one looks at values.
        mask: Any = torch.zeros(
            1, 1, *shape[1:], TRACED_TOKENS, device="meta", dtype=torch.bfloat16
        )
        kinds = getattr(self._model.config, "layer_types", None)
        if kinds:
            mask = dict.fromkeys(kinds, mask)
        with torch.no_grad():
            self._model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)

    def _note_written(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            self._kept.append(output)
            self._written[output.untyped_storage()._cdata] = f"{name}.weight"

        return hook

    def _note_read(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            seen = args[0] if args else next(iter(named.values()))
            self._kept.append(seen)
            self._read[name] = seen.untyped_storage()._cdata

        return hook

    def _layer(self, layer: int, stacked: Stacked) -> Iterator[TensorSpec]:
        prefix = layer_prefix(layer)
        for name, module in self._model.model.layers[layer].named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not own:
                continue
            whole = f"{prefix}{name}"
            storage = self._read.get(whole)
            norm = None if storage is None else self._written.get(storage)
            if _is_norm(own):
                yield TensorSpec(f"{whole}.weight", Role.NORM, layer, offset=self._offset(module))
            elif isinstance(module, nn.Linear):
                yield TensorSpec(f"{whole}.weight", Role.LINEAR, layer, norm, str(storage))
                if module.bias is not None:
                    yield TensorSpec(f"{whole}.bias", Role.BIAS, layer)
            else:
                yield from self._mixture(
                    whole, own, TensorSpec(whole, Role.ROUTER, layer, norm), stacked
                )

    def _mixture(
        self,
        whole: str,
        own: dict[str, nn.Parameter],
        spec: TensorSpec,
        stacked: Stacked,
    ) -> Iterator[TensorSpec]:
        """The tensors of a router, or of a mixture's experts, under their names in checkpoints."""
        for name, parameter in own.items():
            names = _stored_names(self._model, f"{whole}.{name}", parameter)
            if parameter.ndim != 3:
                yield replace(spec, name=names[0], served=False)
                stacked |= {} if names[0] == f"{whole}.{name}" else {f"{whole}.{name}": (names,)}
                continue
            count = parameter.shape[0]
            rows = tuple(names[start : start + count] for start in range(0, len(names), count))
            stacked[f"{whole}.{name}"] = rows
            # The first matrices read the block's input, the last one what they make of it.
            norm = spec.norm if name != "down_proj" else None
            for each in zip(*rows, strict=True):
                for part in each:
                    yield TensorSpec(part, Role.LINEAR, spec.layer, norm, each[0], served=False)

    def _offset(self, norm: nn.Module) -> float:
        """What a norm adds to its weight: its output where the weight is nought."""
        if type(norm) not in self._offsets:
            small: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
            small.weight.data.zero_()
            size = small.weight.shape[-1]
            with torch.no_grad():
                output = small(torch.ones(1, 1, size))
            self._offsets[type(norm)] = round(float(output.mean()), 3)
        return self._offsets[type(norm)]


def _same_shape(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


def _is_norm(own: dict[str, nn.Parameter]) -> bool:
    return list(own) == ["weight"] and own["weight"].ndim == 1


def _stored_names(model: Any, name: str, parameter: nn.Parameter) -> tuple[str, ...]:
    """The names that a parameter has in checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    return tuple(revert_weight_conversion(model, {name: parameter.detach()}))


def _with_readers(specs: list[TensorSpec]) -> Iterator[TensorSpec]:
    """Specs whose readers are names of tensors: so far they are marks of the activations read."""
    first: dict[tuple[int | None, str], str] = {}
    for spec in specs:
        if spec.role is Role.LINEAR and spec.reader is not None:
            yield replace(spec, reader=first.setdefault((spec.layer, spec.reader), spec.name))
        else:
            yield spec
