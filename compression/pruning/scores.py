"""Which elements of a delta matrix are kept, by the scores of the pruning literature.

Pruning drops the weights whose loss costs the output least. Dropping an element of a delta brings
the base's own weight back, so the scores apply to the delta as they do to a weight:

- magnitude, |Δ_ij|;
- Wanda, |Δ_ij| √E[x_j²] (Sun et al. 2023, arXiv 2306.11695), compared within each output row;
- SparseGPT, Δ_ij² / U_jj² (Frantar and Alistarh 2023, arXiv 2301.00774), with U the upper Cholesky
  factor of the inverse second moment of the inputs. The paper compares 128 columns at a time, each
  after the updates for those before; here the whole matrix competes, before any update.

Patterns: single elements; 2 of every 4 input channels (N:M sparsity, Mishra et al. 2021, arXiv
2104.08378); blocks of 32 output rows that share an input channel (1xN, Lin et al. 2021, arXiv
2105.14713, without its sorting of the rows); or whole input channels and output rows. In the last,
each matrix drops its own, as in DISP-LLM (Gao et al. 2024, arXiv 2410.11988): a delta owes no
dimension to the residual stream. DISP-LLM learns which; here they are chosen greedily.

Shapes: N output rows, K input channels; G groups of L elements that compete; B blocks of rows.
"""

import math
from enum import StrEnum

import torch
from torch.nn import functional

BLOCK_ROWS = 32
GROUP_CHANNELS = 4
GROUP_KEPT = 2
# Below every score: an element that did not change is kept only when nothing else is left.
UNCHANGED = -1.0


class Score(StrEnum):
    """What an element of the delta is worth."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"


class Pattern(StrEnum):
    """Which elements are kept or dropped together."""

    UNSTRUCTURED = "unstructured"
    N_M = "2:4"
    BLOCKS = "1x32"
    STRUCTURED = "structured"


def keep_mask(
    delta_NK: torch.Tensor,
    energy_K: torch.Tensor,
    innovation_K: torch.Tensor,
    *,
    score: Score,
    pattern: Pattern,
    sparsity: float,
) -> torch.Tensor:
    """The elements of a delta that survive pruning; of equals, those of the lower index.

    Args:
        delta_NK: The delta, float32, finite.
        energy_K: E[x_j²] of each input channel.
        innovation_K: 1 / U_jj² of each input channel, what is left of it given those after it.
        score: What is compared.
        pattern: What is kept or dropped together. Unstructured keeps exactly
            `round((1 - sparsity) * N * K)` elements, or by Wanda as many of each row's K; "1x32"
            counts blocks, a last one of fewer rows as a whole; "structured" stops at the first
            channel or row with which at least `sparsity` of the elements are gone.
        sparsity: The share to drop; 0.5 for "2:4", where a last group of fewer than 4 channels
            keeps up to 2.

    Returns:
        bool [N, K], true where kept.

    Raises:
        ValueError: The sparsity is outside [0, 1), or not 0.5 for "2:4".
    """
    _check_sparsity(pattern, sparsity)
    scores_NK = _scores(delta_NK, energy_K, innovation_K, score)
    if pattern is Pattern.STRUCTURED:
        return _keep_lines(scores_NK, sparsity)
    if pattern is Pattern.BLOCKS:
        return _keep_blocks(scores_NK, sparsity)
    if pattern is Pattern.N_M:
        return _keep_of_groups(scores_NK)
    groups_GL = scores_NK if score is Score.WANDA else scores_NK.reshape(1, -1)
    count = round((1 - sparsity) * groups_GL.shape[1])
    return _keep_best(groups_GL, count).view(scores_NK.shape)


def _check_sparsity(pattern: Pattern, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity must be at least 0 and below 1, got {sparsity}: give the share of elements "
            "to drop, 0.5 for half"
        )
    if pattern is Pattern.N_M and sparsity != GROUP_KEPT / GROUP_CHANNELS:
        raise ValueError(
            f"pattern {pattern.value!r} always drops half, got sparsity {sparsity}: set it to 0.5 "
            f"or choose the pattern {Pattern.UNSTRUCTURED.value!r}"
        )


def _scores(
    delta_NK: torch.Tensor, energy_K: torch.Tensor, innovation_K: torch.Tensor, score: Score
) -> torch.Tensor:
    """Scores in units of |Δ|: SparseGPT's as its root, which ranks alike and does not underflow."""
    scores_NK = delta_NK.abs()
    if score is not Score.MAGNITUDE:
        scores_NK *= (energy_K if score is Score.WANDA else innovation_K).sqrt()
    return scores_NK.masked_fill_(delta_NK == 0, UNCHANGED)


def _keep_best(scores_GL: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best elements of each group."""
    if count == 0:
        return torch.zeros_like(scores_GL, dtype=torch.bool)
    rank = scores_GL.shape[1] - count + 1
    threshold_G1 = scores_GL.kthvalue(rank, dim=1, keepdim=True).values
    kept_GL = scores_GL > threshold_G1
    missing_G1 = count - kept_GL.sum(dim=1, keepdim=True)
    tied_GL = scores_GL == threshold_G1
    return kept_GL.logical_or_(tied_GL & (tied_GL.cumsum(dim=1, dtype=torch.int32) <= missing_G1))


def _keep_of_groups(scores_NK: torch.Tensor) -> torch.Tensor:
    """Keep the best channels of every group of each row."""
    rows, columns = scores_NK.shape
    padding = -columns % GROUP_CHANNELS
    padded = functional.pad(scores_NK, (0, padding), value=-torch.inf)
    kept_GL = _keep_best(padded.view(-1, GROUP_CHANNELS), GROUP_KEPT)
    return kept_GL.view(rows, -1)[:, :columns].contiguous()


def _keep_blocks(scores_NK: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep the best blocks by the sum of squared scores; 1xN itself sums magnitudes."""
    rows, columns = scores_NK.shape
    padded = functional.pad(scores_NK, (0, 0, 0, -rows % BLOCK_ROWS), value=UNCHANGED)
    blocks = padded.view(-1, BLOCK_ROWS, columns)
    energy_BK = blocks.clamp_min(0).square_().sum(dim=1)
    energy_BK.masked_fill_((blocks == UNCHANGED).all(dim=1), UNCHANGED)
    count = round((1 - sparsity) * energy_BK.numel())
    kept_BK = _keep_best(energy_BK.view(1, -1), count).view_as(energy_BK)
    return kept_BK.repeat_interleave(BLOCK_ROWS, dim=0)[:rows]


def _keep_lines(scores_NK: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Drop the channel or row of least energy per element still kept, one after the other.

    Energies of the lines that stay are updated by subtraction: O(N + K) a step. Of equals, a channel
    goes before a row.
    """
    energy_NK = scores_NK.clamp_min(0).square_()
    # A second layout, so that a channel is read as fast as a row.
    energy_KN = energy_NK.T.contiguous()
    energy_N = energy_NK.sum(dim=1, dtype=torch.float64)
    energy_K = energy_KN.sum(dim=1, dtype=torch.float64)
    # An infinity stays what it is under subtraction: unchanged lines go first, dropped ones last.
    energy_N[(scores_NK == UNCHANGED).all(dim=1)] = -torch.inf
    energy_K[(scores_NK == UNCHANGED).all(dim=0)] = -torch.inf
    rows, columns = scores_NK.shape
    # The margin is for rounding: (1 - 0.8) * 100 is a little less than 20.
    most = math.floor((1 - sparsity) * rows * columns + 1e-6)
    while rows * columns > most:
        row, column = int(energy_N.argmin()), int(energy_K.argmin())
        if energy_N[row] / columns < energy_K[column] / rows:
            energy_N[row] = torch.inf
            energy_K -= energy_NK[row]
            rows -= 1
        else:
            energy_K[column] = torch.inf
            energy_N -= energy_KN[column]
            columns -= 1
    return (energy_N < torch.inf).unsqueeze(1) & (energy_K < torch.inf)
