"""The delta between an expert and its base, tensor by tensor.

RMSNorm changes are folded into the linears that read the norm, so that the base path stays as it
is: with x̂ the normalized activation, the expert computes W_ft (g_ft ⊙ x̂) and the base feeds
g_base ⊙ x̂, hence

    Δ = W_ft · diag(g_ft / g_base) − W_base .

Where some weight of the norm is zero or tiny beside its change, before or after, the norm is not folded but
replaced: its own weight is stored and applied per token, and the linears keep the plain difference
W_ft − W_base.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from deltamux.compression.checkpoint.architecture import (
    EMBEDDING,
    LM_HEAD,
    Role,
    TensorSpec,
    tensor_specs,
)
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.names import CONFIG_FILE, FORMAT

# A norm weight that changes by more than this many times its smaller value is not folded: neither
# the ratio nor the calibration energy, which is divided by its square, would mean anything. Chosen, not measured.
FOLD_LIMIT = 100.0

# What a weight may be stored in: a narrower float is worth nothing without its scale.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Settings that change what the weights mean: a delta across two values of them is undefined.
SAME_SETTINGS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class Difference:
    """A checked pair of checkpoints.

    Attributes:
        base: The shared model.
        expert: The full fine-tune.
        specs: The tensors of both, in forward order.
        folded: Norm weights whose change is folded into the linears behind them.
        replaced: Norm weights that changed and are stored as they are.
    """

    base: Checkpoint
    expert: Checkpoint
    specs: list[TensorSpec]
    folded: frozenset[str]
    replaced: frozenset[str]

    @cached_property
    def base_hashes(self) -> dict[str, str]:
        """SHA-256 of every base tensor by name, computed once."""
        return {spec.name: self.base.sha256(spec.name) for spec in self.specs}

    def check_finite(self) -> None:
        """Read every tensor of both, and refuse what no delta can be taken of.

        Raises:
            ValueError: A tensor holds NaN or infinity.
        """
        for spec in self.specs:
            for checkpoint in (self.base, self.expert):
                if not torch.isfinite(checkpoint.load(spec.name)).all():
                    raise ValueError(
                        f"tensor {spec.name!r} of {checkpoint.source!r} holds NaN or infinity: "
                        "repair the checkpoint"
                    )

    def delta(self, spec: TensorSpec) -> torch.Tensor:
        """The delta of a linear, bias, embedding or lm_head, float32, in the tensor's shape.

        Raises:
            ValueError: The delta holds NaN or infinity.
        """
        tuned = self.expert.load(spec.name).float()
        if spec.norm in self.folded:
            tuned *= self._norm_ratio(spec.norm)
        delta = tuned - self.base.load(spec.name).float()
        if not torch.isfinite(delta).all():
            raise ValueError(f"tensor {spec.name!r} holds NaN or infinity: repair the checkpoint")
        return delta

    def served_moment(self, spec: TensorSpec, moment_KK: torch.Tensor) -> torch.Tensor:
        """E[x xᵀ] of a linear's input in serving, where a folded norm has the base's weight.

        Args:
            spec: The linear.
            moment_KK: E[x xᵀ] of its input in the expert.
        """
        if spec.norm not in self.folded:
            return moment_KK
        inverse_K = 1 / self._norm_ratio(spec.norm).to(moment_KK.device)
        return moment_KK * inverse_K.unsqueeze(1) * inverse_K

    def _norm_ratio(self, norm: str) -> torch.Tensor:
        weight, tuned = self.base.load(norm).float(), self.expert.load(norm).float()
        # 0 / 0: the channel is dead before and after.
        return torch.where(weight == tuned, 1.0, tuned / weight)


def compare(base: Checkpoint, expert: Checkpoint) -> Difference:
    """Check that an expert is a full fine-tune of a base, before any long work.

    Reads headers, and the norms' values.

    Raises:
        ValueError: One is quantized, the two differ in architecture, shapes, vocabulary, tying or
            RoPE settings, or one lacks a tensor; the message names the first such setting or tensor.
    """
    for checkpoint in (base, expert):
        _check_full_width(checkpoint)
    _check_settings(base, expert)
    if base.tied and not expert.tied and expert.head_is_embedding():
        expert = expert.as_tied()
    specs = tensor_specs(base.config, set(base.files))
    expert_specs = tensor_specs(expert.config, set(expert.files))
    for checkpoint in (base, expert):
        if checkpoint.spare_head is not None and not checkpoint.head_is_embedding():
            raise ValueError(
                f"{LM_HEAD!r} of {checkpoint.source!r} is not its {EMBEDDING!r}, though its configuration "
                "ties the two: save it with tie_word_embeddings false, or without the head"
            )
    if base.tied != expert.tied:
        raise ValueError(
            f"{LM_HEAD!r} is tied to {EMBEDDING!r} in one of {base.source!r} and "
            f"{expert.source!r} but not in the other: save both the same way"
        )
    for spec in expert_specs:
        if spec.name not in base:
            raise ValueError(f"tensor {spec.name!r} of the expert is missing from the base")
    for spec in specs:
        if base.shape(spec.name) != expert.shape(spec.name):
            raise ValueError(
                f"tensor {spec.name!r} has shape {base.shape(spec.name)} in the base and "
                f"{expert.shape(spec.name)} in the expert: a delta needs equal shapes"
            )
    folded, replaced = _sort_norms(base, expert, specs)
    return Difference(base, expert, specs, folded, replaced)


def _check_full_width(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method")
        way_out = "`deltamux merge` it" if method == FORMAT else "save it dequantized"
        raise ValueError(
            f"{checkpoint.source!r} is quantized by {method!r} (quantization_config in "
            f"{CONFIG_FILE}): {way_out} first and take the delta from that checkpoint"
        )
    for name in sorted(checkpoint.files):
        dtype = checkpoint.dtype(name)
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"tensor {name!r} of {checkpoint.source!r} is {str(dtype).removeprefix('torch.')}, "
                "no full-width float: save the checkpoint dequantized, as bfloat16 for instance, "
                "and take the delta from that"
            )


def _check_settings(base: Checkpoint, expert: Checkpoint) -> None:
    for key in SAME_SETTINGS:
        # A setting that one side leaves to transformers' default is not compared.
        if base.config.get(key) is not None and expert.config.get(key) is not None:
            _check_equal(key, base.config[key], expert.config[key])
    ours, theirs = _position_settings(base), _position_settings(expert)
    for key, value in ours.items():
        if key in theirs:
            _check_equal(key, value, theirs[key])


def _check_equal(key: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise ValueError(
            f"setting {key!r} is {ours!r} in the base and {theirs!r} in the expert: "
            "a delta needs equal ones"
        )


def _position_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """RoPE base and scaling under one pair of names, and the attention window.

    transformers 5 renamed and nested the RoPE settings; a window of null means none, as does a
    window that is switched off.
    """
    config = checkpoint.config
    nested = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = nested.pop("rope_theta", config.get("rope_theta"))
    legacy = nested.pop("type", "default")
    nested.setdefault("rope_type", legacy)
    if nested["rope_type"] == "default":
        nested = {}
    settings: dict[str, Any] = {"rope_scaling": nested}
    if theta is not None:
        settings["rope_theta"] = theta
    if "sliding_window" in config:
        on = config.get("use_sliding_window", True)
        settings["sliding_window"] = config["sliding_window"] if on else None
    return settings


def _sort_norms(
    base: Checkpoint, expert: Checkpoint, specs: list[TensorSpec]
) -> tuple[frozenset[str], frozenset[str]]:
    read = {spec.norm for spec in specs if spec.norm}
    folded: set[str] = set()
    replaced: set[str] = set()
    for spec in specs:
        if spec.role is not Role.NORM:
            continue
        weight, tuned = base.load(spec.name).float(), expert.load(spec.name).float()
        if not torch.isfinite(tuned).all():
            raise ValueError(f"tensor {spec.name!r} holds NaN or infinity: repair the checkpoint")
        if torch.equal(weight, tuned):
            continue
        smaller = torch.minimum(weight.abs(), tuned.abs())
        divisible = bool(((tuned - weight).abs() <= FOLD_LIMIT * smaller).all())
        (folded if spec.name in read and divisible else replaced).add(spec.name)
    return frozenset(folded), frozenset(replaced)
