"""What a decoder consists of, asked of transformers' own class for it.

The class is built on the meta device, where a model has shapes and no values, and traced there (`trace.py`): which
linears there are, which of them read the same activations, and whether these are a norm's output.
"""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch

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
    from deltamux.compression.checkpoint.trace import traced

    return traced(build_empty(json.loads(config), torch.bfloat16))
