"""The delta between an expert and its base, tensor by tensor.

RMSNorm changes are folded into the linears that read the norm, so that the base path stays as it
is: with x̂ the normalized activation and g what the norm multiplies with (its weight, or one more), the expert
computes W_ft (g_ft ⊙ x̂) and the base feeds g_base ⊙ x̂, hence

    Δ = W_ft · diag(g_ft / g_base) − W_base .

Where some g is zero or tiny beside its change, before or after, the norm is not folded but
replaced: its own weight is stored and applied per token, and the linears keep the plain difference
W_ft − W_base. So is a norm that no linear reads, as those behind attention and MLP of some models.
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
    configuration,
    is_tied,
    tensor_specs,
)
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.names import CONFIG_FILE, FORMAT

# A norm weight that changes by more than this many times its smaller value is not folded: neither
# the ratio nor the calibration energy, which is divided by its square, would mean anything. Chosen, not measured.
FOLD_LIMIT = 100.0

# What a weight may be stored in: a narrower float is worth nothing without its scale.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Settings that may differ: they change how a model is trained, stored or asked, and not what its weights mean.
FREE_SETTINGS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "tie_word_embeddings",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "vocab_size",
    }
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
        """The delta of anything but a norm, float32, in the tensor's shape.

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
        offset = next(spec.offset for spec in self.specs if spec.name == norm)
        weight = self.base.load(norm).float() + offset
        tuned = self.expert.load(norm).float() + offset
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
    for checkpoint in (base, expert):
        tensor_specs(checkpoint.config, set(checkpoint.files))
    _check_head(base)
    expert = _with_head_of(base, expert)
    specs = tensor_specs(base.config, set(base.files))
    for checkpoint in (base, expert):
        if checkpoint.spare_head is not None and not checkpoint.head_is_embedding():
            raise ValueError(
                f"{LM_HEAD!r} of {checkpoint.source!r} is not its {EMBEDDING!r}, though its configuration "
                "ties the two: save it with tie_word_embeddings false, or without the head"
            )
    if base.tied != expert.tied:
        raise ValueError(
            f"{LM_HEAD!r} is tied to {EMBEDDING!r} in {base.source!r} but not in "
            f"{expert.source!r}, where they differ: save the base untied, with its {LM_HEAD!r}"
        )
    expert = _with_vocabulary_of(base, expert)
    for spec in specs:
        if base.shape(spec.name) != expert.shape(spec.name):
            raise ValueError(
                f"tensor {spec.name!r} has shape {base.shape(spec.name)} in the base and "
                f"{expert.shape(spec.name)} in the expert: a delta needs equal shapes"
            )
    folded, replaced = _sort_norms(base, expert, specs)
    return Difference(base, expert, specs, folded, replaced)


def _with_head_of(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """The expert tied like the base, where both say the same of its weights."""
    if base.tied and not expert.tied and expert.head_is_embedding():
        return expert.as_tied()
    # Its head is its embedding, whatever the base's is.
    return expert.with_head() if expert.tied and not base.tied else expert


def _with_vocabulary_of(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """The expert with the base's rows of vocabulary, where it has fewer.

    Raises:
        ValueError: It has more.
    """
    (ours, width), (theirs, other) = base.shape(EMBEDDING), expert.shape(EMBEDDING)
    if ours == theirs or width != other:
        return expert
    if theirs > ours:
        raise ValueError(
            f"{expert.source!r} has {theirs:,} rows of vocabulary and the base {ours:,}: tokens beyond the base's "
            f"rows cannot be served. If no text needs them, as with a token for padding, save the expert after "
            f"resize_token_embeddings({ours}); else resize the base to {theirs} rows, save it and serve that"
        )
    return expert.filled_up(base)


def _check_head(base: Checkpoint) -> None:
    if base.tied and not is_tied(base.config):
        raise ValueError(
            f"{base.source!r} has no {LM_HEAD!r}, though its configuration does not tie it to {EMBEDDING!r}: "
            "save it with its head, or with tie_word_embeddings true"
        )


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
    """Compare what transformers makes of both configurations, with its defaults filled in."""
    key = "model_type"
    _check_equal(key, base.config.get(key), expert.config.get(key))
    found = configuration(base.config)
    ours, theirs = found.to_dict(), configuration(expert.config).to_dict()
    for key in sorted(type(found)().to_dict()):
        if key not in FREE_SETTINGS:
            _check_equal(key, *(_without_old_name(each.get(key)) for each in (ours, theirs)))


def _without_old_name(value: Any) -> Any:
    """RoPE settings without the name that their kind had once, beside the one that it has now."""
    if isinstance(value, dict) and "rope_type" in value:
        return {key: each for key, each in value.items() if key != "type"}
    return value


def _check_equal(key: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise ValueError(
            f"setting {key!r} is {ours!r} in the base and {theirs!r} in the expert: "
            "a delta needs equal ones"
        )


def _sort_norms(
    base: Checkpoint, expert: Checkpoint, specs: list[TensorSpec]
) -> tuple[frozenset[str], frozenset[str]]:
    read = {spec.norm for spec in specs if spec.norm}
    folded: set[str] = set()
    replaced: set[str] = set()
    for spec in specs:
        if spec.role is not Role.NORM:
            continue
        weight = base.load(spec.name).float() + spec.offset
        tuned = expert.load(spec.name).float() + spec.offset
        if not torch.isfinite(tuned).all():
            raise ValueError(f"tensor {spec.name!r} holds NaN or infinity: repair the checkpoint")
        if torch.equal(weight, tuned):
            continue
        smaller = torch.minimum(weight.abs(), tuned.abs())
        divisible = bool(((tuned - weight).abs() <= FOLD_LIMIT * smaller).all())
        (folded if spec.name in read and divisible else replaced).add(spec.name)
    return frozenset(folded), frozenset(replaced)
