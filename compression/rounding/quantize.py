"""Low-bit quantization of a delta, with a few input channels kept in 16 bit (ME-Switch).

A row i of the delta is written as a step s_i times integer levels, Δ̂_ij = s_i (c_ij − z), with
unsigned codes c and a zero point z that belongs to the scheme. The step minimises the output error
under the calibration activations,

    Σ_j h_j (Δ_ij − s_i (c_ij − z))² ,   h_j = E[x_j²] ,

by alternating nearest codes and the closed-form least-squares step (Lloyd's algorithm restricted to
a uniform grid) from several starts. The salient channels are those whose reconstruction error
h_j Σ_i (Δ_ij − Δ̂_ij)² is largest; what the codes leave over in them is kept in bfloat16. That is
ME-Switch's criterion (Liu et al. 2024, arXiv 2406.09041, section on salient-aware quantization),
with the steps found in closed form instead of by training.

Shapes: N output rows, K input channels; R coded rows, C coded channels, S salient channels.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from deltamux.compression.image.cut import Cut, positions_in

# Steps of fixed widths: starts in units of the Gaussian's, and refits from each; chosen, not measured.
STEP_STARTS = (0.7, 1.0, 1.5)
STEP_ITERATIONS = 4
# Rows whose steps are searched at once: few enough to stay in the cache of one core.
ROW_BLOCK = 128


class Scheme(StrEnum):
    """How codes become levels."""

    SIGN = "sign"
    TERNARY = "ternary"
    QUINARY = "quinary"
    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT8 = "int8"

    @property
    def levels(self) -> int:
        """Number of codes."""
        return {
            "sign": 2,
            "ternary": 3,
            "quinary": 5,
            "int2": 4,
            "int3": 8,
            "int4": 16,
            "int8": 256,
        }[self.value]

    @property
    def zero_point(self) -> float:
        """The code, possibly between two codes, that stands for zero."""
        wide = self in (Scheme.INT4, Scheme.INT8)
        return self.levels / 2 if wide else (self.levels - 1) / 2

    @property
    def unit_step(self) -> float:
        """A starting step in standard deviations: near-optimal for a Gaussian (Max 1960)."""
        return {
            "sign": 1.6,
            "ternary": 1.22,
            "quinary": 0.84,
            "int2": 1.0,
            "int3": 0.59,
            "int4": 0.335,
            "int8": 0.03,
        }[self.value]


@dataclass(frozen=True)
class QuantizedDelta:
    """A delta matrix [N, K] in codes.

    Attributes:
        scheme: What the codes mean.
        shape: (N, K).
        codes_RC: uint8 codes of the coded rows and channels.
        steps_R: bfloat16 step of each coded row.
        rows_R: int64 rows that have codes, ascending; None: all N.
        channels_C: int64 input channels that have codes, ascending; None: all K.
        salient_channels_S: int64 input channels with a 16-bit part, ascending.
        salient_values_NS: bfloat16 what the codes leave over in those channels.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes_RC: torch.Tensor
    steps_R: torch.Tensor
    rows_R: torch.Tensor | None = None
    channels_C: torch.Tensor | None = None
    salient_channels_S: torch.Tensor | None = None
    salient_values_NS: torch.Tensor | None = None

    @classmethod
    def from_levels(
        cls, scheme: Scheme, levels_NK: torch.Tensor, steps_N: torch.Tensor
    ) -> "QuantizedDelta":
        """Levels c − z of every row and channel, float32, on any device, and their steps."""
        codes_NK = (levels_NK + scheme.zero_point).to("cpu", torch.uint8)
        shape = codes_NK.shape[0], codes_NK.shape[1]
        return cls(scheme, shape, codes_NK, steps_N.to("cpu", torch.bfloat16))

    def scaled(self, factor: float) -> "QuantizedDelta":
        """The same with its steps times a factor; the 16-bit parts stay."""
        return replace(self, steps_R=(self.steps_R.float() * factor).to(torch.bfloat16))

    def without_salient(self) -> "QuantizedDelta":
        """The codes alone."""
        return replace(self, salient_channels_S=None, salient_values_NS=None)

    def part(self, cut: Cut) -> "QuantizedDelta":
        """The rows and channels of a cut."""
        rows_N, span = cut.row_index(self.shape[0]), cut.channel_slice()
        channels_K = torch.arange(self.shape[1])[span]
        kept, rows_R = rows_N, None
        if self.rows_R is not None:
            mask, rows_R = positions_in(self.rows_R, rows_N, self.shape[0])
            kept = mask.nonzero().squeeze(1)
        coded: slice | torch.Tensor = span
        channels_C = None
        if self.channels_C is not None:
            coded, channels_C = positions_in(self.channels_C, channels_K, self.shape[1])
        part = QuantizedDelta(
            self.scheme,
            (len(rows_N), len(channels_K)),
            self.codes_RC[kept][:, coded],
            self.steps_R[kept],
            rows_R,
            channels_C,
        )
        if self.salient_channels_S is None or self.salient_values_NS is None:
            return part
        mask, salient_S = positions_in(self.salient_channels_S, channels_K, self.shape[1])
        if not mask.any():
            return part
        values = self.salient_values_NS[rows_N][:, mask]
        return replace(part, salient_channels_S=salient_S, salient_values_NS=values)

    def largest(self) -> torch.Tensor:
        """A bound of |Δ̂|, one number; not finite where a step or a 16-bit part is not."""
        largest = self.steps_R.float().abs().amax() if len(self.steps_R) else torch.zeros(())
        largest = largest * self.scheme.levels
        if self.salient_values_NS is not None:
            largest = largest + self.salient_values_NS.float().abs().amax()
        return largest

    def dequantize(self, factor: float = 1.0) -> torch.Tensor:
        """Δ̂, float32 [N, K], with a factor on the steps that is not rounded to bfloat16."""
        delta = (self.codes_RC.float() - self.scheme.zero_point).mul_(
            self.steps_R.float().unsqueeze(1) * factor
        )
        if self.channels_C is not None:
            wide = torch.zeros(len(delta), self.shape[1])
            delta = wide.index_copy_(1, self.channels_C, delta)
        if self.rows_R is not None:
            delta = torch.zeros(self.shape).index_copy_(0, self.rows_R, delta)
        if self.salient_channels_S is not None and self.salient_values_NS is not None:
            delta[:, self.salient_channels_S] += self.salient_values_NS.float()
        return delta


def quantize(
    delta_NK: torch.Tensor,
    scheme: Scheme,
    energy_K: torch.Tensor,
    salient_channels: int = 0,
) -> QuantizedDelta:
    """Quantize a linear's delta, keeping its most damaged input channels in 16 bit.

    Input channels whose delta is zero throughout get no codes.

    Args:
        delta_NK: The delta, float32, not all zero.
        scheme: Levels of the low-bit class.
        energy_K: E[x_j²] of each input channel, float32.
        salient_channels: How many channels to keep in 16 bit.
    """
    alive_C = delta_NK.any(dim=0).nonzero().squeeze(1)
    # An index costs 4 bytes a coded channel: dropping pays only when it saves more codes than that.
    pays = (delta_NK.shape[1] - len(alive_C)) * len(delta_NK) > 32 * len(alive_C)
    channels_C = alive_C if pays else torch.arange(delta_NK.shape[1])
    codes_NC, steps_N = quantize_rows(delta_NK[:, channels_C], scheme, energy_K[channels_C])
    coded = QuantizedDelta(
        scheme,
        (delta_NK.shape[0], delta_NK.shape[1]),
        codes_NC,
        steps_N,
        channels_C=channels_C if pays else None,
    )
    residual_NK = delta_NK - coded.dequantize()
    damage_K = energy_K * residual_NK.square().sum(dim=0)
    count = min(salient_channels, int((damage_K > 0).sum()))
    if count == 0:
        return coded
    salient_S = damage_K.topk(count).indices.sort().values
    return replace(
        coded,
        salient_channels_S=salient_S,
        salient_values_NS=residual_NK[:, salient_S].to(torch.bfloat16),
    )


def quantize_changed_rows(
    delta_VK: torch.Tensor, scheme: Scheme | None, step: float = 1.0
) -> QuantizedDelta:
    """Quantize an embedding's or lm_head's delta; rows that did not change get no codes.

    Args:
        delta_VK: The delta, float32 [vocabulary, hidden], not all zero.
        scheme: Levels with a step a row; None: one step for most rows, under an entropy code.
        step: That one step, in standard deviations of the rows that changed.
    """
    changed_R = delta_VK.any(dim=1).nonzero().squeeze(1)
    changed_RK = delta_VK[changed_R]
    if scheme is None:
        codes_RK, steps_R = _round_rows(changed_RK, step)
    else:
        flat_K = torch.ones(delta_VK.shape[1])
        codes_RK, steps_R = quantize_rows(changed_RK, scheme, flat_K)
    return QuantizedDelta(
        scheme or Scheme.INT4,
        (delta_VK.shape[0], delta_VK.shape[1]),
        codes_RK,
        steps_R,
        rows_R=changed_R if len(changed_R) < len(delta_VK) else None,
    )


def _round_rows(delta_RK: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of INT4 and steps as `quantize_rows` gives them, one step for most rows.

    Rows that would be cut off at the ends of the grid, such as those of tokens that only the
    fine-tune knows, have wider steps of their own.
    """
    # Squares of a very small delta would underflow.
    largest = float(delta_RK.abs().max())
    unit_RK = delta_RK / largest
    deviation_R = unit_RK.square().mean(dim=1).sqrt()
    common = step * float(deviation_R.square().mean().sqrt())
    steps_R = (deviation_R * Scheme.INT4.unit_step).clamp_min(common)
    levels_RK = (unit_RK / steps_R.unsqueeze(1)).round_().clamp_(-7, 7)
    # What rounding takes off the delta itself is put back (see `ladder.py`).
    overlap_R = (levels_RK * unit_RK).sum(dim=1)
    overlap = float(steps_R @ overlap_R)
    stretch = float(unit_RK.square().sum()) / overlap if overlap > 0 else 1.0
    codes_RK = (levels_RK + Scheme.INT4.zero_point).to(torch.uint8)
    return codes_RK, (steps_R * (stretch * largest)).to(torch.bfloat16)


def quantize_rows(
    delta_NK: torch.Tensor, scheme: Scheme, energy_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8 [N, K]) and error-minimising steps (bfloat16 [N]) of every row."""
    weights_K = energy_K / energy_K.mean().clamp_min(torch.finfo(torch.float32).tiny)
    codes_NK = torch.empty(delta_NK.shape, dtype=torch.uint8)
    steps_N = torch.empty(len(delta_NK), dtype=torch.bfloat16)
    for start in range(0, len(delta_NK), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        steps_N[block] = search_steps(delta_NK[block], scheme, weights_K).to(torch.bfloat16)
        levels = _levels(delta_NK[block], scheme, steps_N[block].float())
        codes_NK[block] = (levels + scheme.zero_point).to(torch.uint8)
    return codes_NK, steps_N


def search_steps(delta_NK: torch.Tensor, scheme: Scheme, weights_K: torch.Tensor) -> torch.Tensor:
    """The step of every row, float32 [N], of least squared error with channels weighted."""
    deviation_N = (delta_NK.square() @ weights_K / delta_NK.shape[1]).sqrt()
    best_steps_N = torch.zeros_like(deviation_N)
    best_error_N = torch.full_like(deviation_N, torch.inf)
    for start in STEP_STARTS:
        steps_N = deviation_N * (scheme.unit_step * start)
        for _ in range(STEP_ITERATIONS):
            steps_N = _least_squares_step(delta_NK, _levels(delta_NK, scheme, steps_N), weights_K)
        residual_NK = delta_NK - _levels(delta_NK, scheme, steps_N) * steps_N.unsqueeze(1)
        error_N = residual_NK.square() @ weights_K
        better_N = error_N < best_error_N
        best_steps_N = torch.where(better_N, steps_N, best_steps_N)
        best_error_N = torch.where(better_N, error_N, best_error_N)
    return best_steps_N


def _levels(delta_NK: torch.Tensor, scheme: Scheme, steps_N: torch.Tensor) -> torch.Tensor:
    inverse_N = torch.where(steps_N > 0, 1 / steps_N, 0.0).nan_to_num(0.0, 0.0)
    scaled_NK = delta_NK * inverse_N.unsqueeze(1)
    codes_NK = scaled_NK.add_(scheme.zero_point).round_().clamp_(0, scheme.levels - 1)
    return codes_NK.sub_(scheme.zero_point)


def _least_squares_step(
    delta_NK: torch.Tensor, levels_NK: torch.Tensor, weights_K: torch.Tensor
) -> torch.Tensor:
    energy_N = levels_NK.square() @ weights_K
    projection_N = (levels_NK * delta_NK) @ weights_K
    return torch.where(energy_N > 0, projection_N / energy_N.clamp_min(1e-38), 0.0).clamp_min(0.0)
