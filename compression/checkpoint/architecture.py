"""What a decoder consists of, asked of transformers' own class for it.

The class is built on the meta device, where a model has shapes and no values, and a text of shapes runs through it: which
linears there are, which of them read the same activations, and whether these are a norm's output. A mixture's experts
lie stacked in the class and one by one in checkpoints; transformers' own conversion says how they belong together.

    y = W (g ⊙ x̂),  g = weight + offset        what a norm multiplies with: Gemma stores g − 1
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch
from torch import nn

# Held against transformers and vLLM by tests; others may have parts that nothing here knows of.
MODEL_TYPES = (
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "qwen3_moe",
    "mixtral",
)
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
# Computed from the configuration; old checkpoints store it.
COMPUTED = "rotary_emb.inv_freq"
# Tokens of the text of shapes.
TRACED_TOKENS = 4


class Role(StrEnum):
    """What a tensor is to the model; decides how its delta is stored."""

    LINEAR = "linear"
    BIAS = "bias"
    NORM = "norm"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    ROUTER = "router"  # which of a mixture's experts a token goes to


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the architecture.

    Attributes:
        name: Its name in the checkpoint.
        role: What it is.
        layer: Index of the decoder layer, None outside of them.
        norm: For a linear or router, the name of the norm weight it reads.
        reader: For a linear, the first one that reads the same activations; itself where there is no other.
        offset: For a norm, what is added to its weight.
        served: Whether a delta of it can be served: not where one kernel multiplies all of a mixture's experts.
    """

    name: str
    role: Role
    layer: int | None = None
    norm: str | None = None
    reader: str | None = None
    offset: float = 0.0
    served: bool = True


@dataclass(frozen=True)
class Architecture:
    """The tensors of a decoder.

    Attributes:
        specs: In the order of the forward pass, lm_head included.
        stacked: Parameters of transformers' class that a checkpoint has in parts: rows of such parts are stacked, and
            the stacks joined along their second dimension.
    """

    specs: tuple[TensorSpec, ...]
    stacked: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


def layer_prefix(layer: int) -> str:
    """The name in front of every tensor of a decoder layer."""
    return f"model.layers.{layer}."


def known(model_type: object) -> bool:
    """Whether deltamux knows an architecture."""
    return model_type in MODEL_TYPES


def configuration(config: dict[str, Any]) -> Any:
    """Transformers' configuration of a `config.json`, with its defaults filled in.

    Raises:
        ValueError: The architecture is not known; the message lists those that are.
    """
    model_type = config.get("model_type")
    if not known(model_type):
        inner = config.get("text_config")
        inside = inner.get("model_type") if isinstance(inner, dict) else None
        hint = f"; save its language model alone ({inside!r})" if known(inside) else ""
        raise ValueError(
            f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}: this "
            f"architecture's tensors are not known to deltamux{hint}"
        )
    from transformers import AutoConfig

    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **rest)
    # Whatever transformers and its validators raise on values that are of another kind.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the configuration of the {model_type} cannot be used: {reason}"
        ) from error


def build_empty(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Transformers' model of a configuration on the meta device, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    found = configuration(config)
    # Of the attention kernels only the plain one knows soft caps.
    plain = getattr(found, "attn_logit_softcapping", None) is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            found,
            dtype=dtype,
            attn_implementation="eager" if plain else None,
            experts_implementation="eager",
        )
    return model.eval()


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a configuration, or transformers' default for it, ties lm_head to the embedding."""
    if "tie_word_embeddings" in config or not known(config.get("model_type")):
        return bool(config.get("tie_word_embeddings"))
    return bool(configuration(config).tie_word_embeddings)


def architecture(config: dict[str, Any]) -> Architecture:
    """What a configuration's model consists of.

    Raises:
        ValueError: The architecture is not known.
    """
    return _architecture(json.dumps(config, sort_keys=True))


def tensor_specs(config: dict[str, Any], names: set[str]) -> list[TensorSpec]:
    """All tensors of a checkpoint in the order of the forward pass.

    Args:
        config: The model's configuration.
        names: Tensor names present in the checkpoint.

    Raises:
        ValueError: An unknown architecture, a missing tensor, or one that is no part of it.
    """
    specs = [
        spec
        for spec in architecture(config).specs
        if spec.role is not Role.LM_HEAD or spec.name in names
    ]
    wanted = {spec.name for spec in specs}
    for name in sorted(wanted - names):
        raise ValueError(f"tensor {name!r} is missing from the checkpoint; {_why(name, names)}")
    for name in sorted(names - wanted):
        if not name.endswith(COMPUTED):
            model_type = config["model_type"]
            raise ValueError(f"tensor {name!r} is not part of a {model_type} decoder")
    return specs


def _why(missing: str, names: set[str]) -> str:
    """What to do about a missing tensor: wrappers put something in front of every name."""
    longer = next((name for name in sorted(names) if name.endswith(missing)), None)
    if longer is None:
        return "save it whole"
    prefix = longer.removesuffix(missing)
    return f"its names begin with {prefix!r}: save the model inside of what wraps it"


@lru_cache(maxsize=8)
def _architecture(config: str) -> Architecture:
    return _Tracer(build_empty(json.loads(config), torch.bfloat16)).architecture()


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
        stacked: dict[str, tuple[tuple[str, ...], ...]] = {}
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

    def _layer(
        self, layer: int, stacked: dict[str, tuple[tuple[str, ...], ...]]
    ) -> Iterator[TensorSpec]:
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
        stacked: dict[str, tuple[tuple[str, ...], ...]],
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
