"""Which tensors a decoder has, and which norm each linear reads.

Llama, Mistral, Qwen2 and Qwen3 checkpoints share their names: per layer seven linears, two RMSNorms
in front of them, and optionally biases (Qwen2) and query/key norms (Qwen3).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# linear -> the RMSNorm whose output it reads (None: it reads no norm's output directly).
LINEARS: dict[str, str | None] = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": None,
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": None,
}
# linear -> the first linear that reads the same activations.
FIRST_READER: dict[str, str] = {
    linear: next(other for other, read in LINEARS.items() if read == norm) if norm else linear
    for linear, norm in LINEARS.items()
}
FOLDABLE_NORMS = ("input_layernorm", "post_attention_layernorm")
OTHER_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


class Role(StrEnum):
    """What a tensor is to the model; decides how its delta is stored."""

    LINEAR = "linear"
    BIAS = "bias"
    NORM = "norm"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the architecture.

    Attributes:
        name: Its name in the checkpoint.
        role: What it is.
        layer: Index of the decoder layer, None outside of them.
        norm: For a linear, the name of the norm weight it reads.
    """

    name: str
    role: Role
    layer: int | None = None
    norm: str | None = None


def layer_prefix(layer: int) -> str:
    """The name in front of every tensor of a decoder layer."""
    return f"model.layers.{layer}."


def first_reader(linear: str) -> str:
    """The name of the first weight in a linear's layer that reads the same activations."""
    parts = linear.split(".")
    prefix, name = ".".join(parts[:3]), ".".join(parts[3:-1])
    return f"{prefix}.{FIRST_READER[name]}.weight"


def tensor_specs(config: dict[str, Any], names: set[str]) -> list[TensorSpec]:
    """All tensors of a checkpoint in the order of the forward pass.

    Args:
        config: The model's configuration.
        names: Tensor names present in the checkpoint.

    Raises:
        ValueError: An unsupported architecture, a missing tensor, or one that is not known here.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}: "
            "this architecture's tensors are not known to deltamux"
        )
    specs = [TensorSpec(EMBEDDING, Role.EMBEDDING)]
    for layer in range(config["num_hidden_layers"]):
        specs += _layer_specs(layer, names)
    specs.append(TensorSpec(FINAL_NORM, Role.NORM))
    if LM_HEAD in names:
        specs.append(TensorSpec(LM_HEAD, Role.LM_HEAD))
    known = {spec.name for spec in specs}
    for name in sorted(known - names):
        raise ValueError(f"tensor {name!r} is missing from the checkpoint; save it whole")
    for name in sorted(names - known):
        if not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"tensor {name!r} is not part of a {model_type} decoder")
    return specs


def _layer_specs(layer: int, names: set[str]) -> list[TensorSpec]:
    prefix = layer_prefix(layer)
    specs = [TensorSpec(f"{prefix}{norm}.weight", Role.NORM, layer) for norm in FOLDABLE_NORMS]
    specs += [
        TensorSpec(f"{prefix}{norm}.weight", Role.NORM, layer)
        for norm in OTHER_NORMS
        if f"{prefix}{norm}.weight" in names
    ]
    for linear, norm_read in LINEARS.items():
        read = f"{prefix}{norm_read}.weight" if norm_read else None
        specs.append(TensorSpec(f"{prefix}{linear}.weight", Role.LINEAR, layer, read))
        if f"{prefix}{linear}.bias" in names:
            specs.append(TensorSpec(f"{prefix}{linear}.bias", Role.BIAS, layer))
    return specs
