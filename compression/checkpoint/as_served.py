"""A base's weights as a server has them that quantizes them while it loads them.

vLLM's `quantization: fp8_per_channel` keeps a linear's row w as 8-bit floats (E4M3) and one scale,

    s = max |w| / 448 ,   q = fp8(w / s) ,   ŵ = s q .

A delta from ŵ instead of w takes back what that rounding loses, as far as its own codes reach.
"""

from enum import StrEnum

import torch

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
# vLLM's, so that rows of noughts do not divide by nought.
LEAST_SCALE = 1 / (LARGEST_FP8 * 512)


class BaseQuantization(StrEnum):
    """Ways of vLLM to quantize a 16-bit base while it is loaded, by their names there."""

    FP8_PER_CHANNEL = "fp8_per_channel"


def as_served(weight_NK: torch.Tensor, quantization: BaseQuantization) -> torch.Tensor:
    """A linear's weight after quantization, float32 [N, K].

    Args:
        weight_NK: As the checkpoint has it.
        quantization: How it is quantized.
    """
    assert quantization is BaseQuantization.FP8_PER_CHANNEL
    largest_N = weight_NK.abs().amax(dim=1, keepdim=True).float()
    scale_N = (largest_N / LARGEST_FP8).clamp_min(LEAST_SCALE)
    scaled_NK = (weight_NK / scale_N).clamp_(-LARGEST_FP8, LARGEST_FP8)
    return scaled_NK.to(torch.float8_e4m3fn).float() * scale_N
