"""The weights that leave no choice: embedding, lm_head, norms and biases; and every weight of a lossless artifact."""

import torch
from tqdm import tqdm

from deltamux.compression.artifact.lossless import encode_exact
from deltamux.compression.artifact.matrices import Coded
from deltamux.compression.artifact.stored import BiasDelta, Encoded, Exact, Replacement
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.recipe import EmbeddingRecipe
from deltamux.compression.rounding.quantize import quantize_changed_rows


def fixed_weights(difference: Difference, recipe: EmbeddingRecipe) -> list[Encoded]:
    """Whatever changed besides the linears."""
    found = []
    for spec in difference.specs:
        if spec.name in difference.replaced:
            weight_N = difference.expert.load(spec.name).float()
            found.append(Encoded.of(spec, Replacement(weight_N)))
        elif spec.role not in (Role.NORM, Role.LINEAR):
            delta = difference.delta(spec)
            if delta.any():
                found.append(_encoded(spec, delta, recipe))
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


def _encoded(spec: TensorSpec, delta: torch.Tensor, recipe: EmbeddingRecipe) -> Encoded:
    if spec.role is Role.BIAS:
        return Encoded.of(spec, BiasDelta(delta))
    quantized = quantize_changed_rows(delta, recipe.fixed_scheme, recipe.step)
    rest, whole = (delta - quantized.dequantize()).norm(), delta.norm()
    error = float(rest / whole.clamp_min(torch.finfo(torch.float32).tiny)) ** 2
    return Encoded.of(spec, Coded(quantized), error=error)
