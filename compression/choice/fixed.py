"""The weights that leave no choice: embedding, lm_head, norms, biases and routers; and every weight of a lossless artifact."""

import torch
from tqdm import tqdm

from deltamux.compression.artifact.lossless import encode_exact
from deltamux.compression.artifact.matrices import Coded
from deltamux.compression.artifact.stored import BiasDelta, Encoded, Exact, Replacement
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.recipe import EmbeddingRecipe
from deltamux.compression.rounding.quantize import quantize_changed_rows

# Bits a weight that embedding and lm_head may take in a slot beyond those of a linear, before their step is widened
# by a factor at a time. The embedding is a fifth of SmolLM2-135M: with a step of 1 it takes 3.37 and 3.53 bits in two
# fine-tunes, 2.37 and 2.40 over all weights at 1 bit on disk, and leaves a KL of 1.7e-6 of its own in the first (3e-5
# in all); with 1.2 it takes 3.09 and 3.33 and leaves 1.2e-6, with 1.4 2.98 and 2.53, and 5.4e-6.
TABLE_SLOT_BITS = 0.9
WIDENING = 1.1
# In deviations: beyond, hardly a row keeps anything.
WIDEST_STEP = 4.0


def fixed_weights(
    difference: Difference, recipe: EmbeddingRecipe, slot_bits: float | None = None
) -> list[Encoded]:
    """Whatever changed besides the linears.

    Args:
        difference: Base and expert.
        recipe: Of embedding and lm_head.
        slot_bits: What a linear's weight may take in a slot; None: any.
    """
    found = []
    for spec in difference.specs:
        if spec.name in difference.replaced:
            weight_N = difference.expert.load(spec.name).float()
            found.append(Encoded.of(spec, Replacement(weight_N, spec.offset)))
        elif spec.role is Role.ROUTER:
            delta = difference.delta(spec)
            if delta.any():
                whole = difference.base.load(spec.name).float() + delta
                found.append(Encoded.of(spec, Replacement(whole)))
        elif spec.role not in (Role.NORM, Role.LINEAR):
            delta = difference.delta(spec)
            if delta.any():
                found.append(_encoded(spec, delta, recipe, slot_bits))
    return found


def exact_weights(difference: Difference, progress: bool = True) -> list[Encoded]:
    """Every tensor that differs from the base, bit for bit.

    Raises:
        ValueError: A tensor is of another dtype in base and expert.
    """
    found = []
    base, expert = difference.base, difference.expert
    for spec in tqdm(difference.specs, desc="compress", unit="tensor", disable=not progress):
        before, tuned = base.load(spec.name), expert.load(spec.name)
        if tuned.dtype != before.dtype:
            raise ValueError(
                f"tensor {spec.name!r} is {tuned.dtype} in the expert and {before.dtype} in the "
                "base: a lossless delta needs one dtype; save both alike"
            )
        if not torch.equal(tuned.view(torch.uint8), before.view(torch.uint8)):
            exact = Exact(encode_exact(tuned, before), tuple(tuned.shape))
            found.append(Encoded.of(spec, exact))
    return found


def _encoded(
    spec: TensorSpec, delta: torch.Tensor, recipe: EmbeddingRecipe, slot_bits: float | None
) -> Encoded:
    if spec.role is Role.BIAS:
        return Encoded.of(spec, BiasDelta(delta))
    coded = _table(delta, recipe, slot_bits)
    rest, whole = (delta - coded.delta.dequantize()).norm(), delta.norm()
    error = float(rest / whole.clamp_min(torch.finfo(torch.float32).tiny)) ** 2
    return Encoded.of(spec, coded, error=error)


def _table(delta_VK: torch.Tensor, recipe: EmbeddingRecipe, slot_bits: float | None) -> Coded:
    """An embedding's or lm_head's delta, with the recipe's step, or as wide a one as a slot has room for."""
    step = recipe.step
    while True:
        coded = Coded(quantize_changed_rows(delta_VK, recipe.fixed_scheme, step))
        if slot_bits is None or recipe.fixed_scheme is not None or step > WIDEST_STEP:
            return coded
        if coded.slot_bytes * 8 <= (slot_bits + TABLE_SLOT_BITS) * delta_VK.numel():
            return coded
        step *= WIDENING
