"""Deltas as singular vectors, Δ = U diag(σ) Vᵀ, for the published compressors in peers.py.

Delta-CoMe (Ping et al. 2024, arXiv 2406.08903) gives the vectors with the largest σ more bits. V is
rounded with feedback against the layer's inputs x, then U against diag(σ) V̂ᵀ x. In the released
configuration the first 2 vectors take 8 bits, the next 32 take 3 and the others 2; codes are in
groups of 128 along a vector of V and along a row of U, each with an fp16 step and a zero point as
wide as a code. Where that takes more than fp16 would, as in rows of U of two 8-bit codes, vectors
stay in fp16, as singular values do. Columns are rounded in the order of their energy, as in the
released configuration, on grids fixed beforehand, so that the order need not be stored.

Shapes: N output rows, K input channels; R singular vectors, C of one width.
"""

from collections.abc import Callable

import torch

from benchmarks.peers.feedback import Curvature, asymmetric_groups, curvature, feedback, half

# Width and number of the leading vectors, and the width of all others.
LEADING_VECTORS = ((8, 2), (3, 32))
OTHER_BITS = 2
GROUP_SIZE = 128


def mixed_precision(
    delta_NK: torch.Tensor, moment_KK: torch.Tensor, budget_bits: float
) -> tuple[torch.Tensor, int]:
    """Delta-CoMe at the largest rank that fits a budget.

    Args:
        delta_NK: The delta, float32.
        moment_KK: E[x xᵀ] of the linear's inputs, float32.
        budget_bits: Most bits of the file; ignored at rank 1.

    Returns:
        The rebuilt delta, float32 [N, K], and the bits of its file.
    """
    rows, columns = delta_NK.shape
    left_NR, values_R, right_RK = torch.linalg.svd(delta_NK, full_matrices=False)
    rank = _largest_rank(
        lambda rank: _mixed_bits(rows, columns, rank) <= budget_bits, len(values_R)
    )
    inputs = curvature(moment_KK, by_energy=True)
    rebuilt_NK = torch.zeros_like(delta_NK)
    for num_bits, span in _vector_classes(rank):
        right_CK = _stored_vectors(right_RK[span], num_bits, inputs)
        inner_CK = half(values_R[span]).unsqueeze(1) * right_CK
        inner_inputs = curvature(inner_CK @ moment_KK @ inner_CK.T, by_energy=True)
        rebuilt_NK += _stored_vectors(left_NR[:, span], num_bits, inner_inputs) @ inner_CK
    return rebuilt_NK, _mixed_bits(rows, columns, rank)


def truncated(delta_NK: torch.Tensor, budget_bits: float) -> tuple[torch.Tensor, int]:
    """The most leading vectors that fit a budget, in two fp16 factors U √σ and √σ Vᵀ.

    Args:
        delta_NK: The delta, float32.
        budget_bits: Most bits of the file; ignored at rank 1.

    Returns:
        The rebuilt delta, float32 [N, K], and the bits of its file.
    """
    left_NR, values_R, right_RK = torch.linalg.svd(delta_NK, full_matrices=False)
    vector_bits = 16 * sum(delta_NK.shape)
    rank = _largest_rank(lambda rank: rank * vector_bits <= budget_bits, len(values_R))
    root_C = values_R[:rank].sqrt()
    left_NC = half(left_NR[:, :rank] * root_C)
    return left_NC @ half(root_C.unsqueeze(1) * right_RK[:rank]), rank * vector_bits


def _largest_rank(fits: Callable[[int], bool], full_rank: int) -> int:
    return max((rank for rank in range(1, full_rank + 1) if fits(rank)), default=1)


def _vector_classes(rank: int) -> list[tuple[int, slice]]:
    """Width and span of each class of vectors, largest singular values first."""
    classes: list[tuple[int, slice]] = []
    start = 0
    for num_bits, count in (*LEADING_VECTORS, (OTHER_BITS, rank)):
        stop = min(start + count, rank)
        if stop > start:
            classes.append((num_bits, slice(start, stop)))
        start = stop
    return classes


def _stored_vectors(rows_NC: torch.Tensor, num_bits: int, inputs: Curvature) -> torch.Tensor:
    """Rows as the file holds them: in codes, or in fp16 where that takes no more bits."""
    length = rows_NC.shape[1]
    if _coded_bits(length, num_bits) >= 16 * length:
        return half(rows_NC)
    return feedback(rows_NC, asymmetric_groups(rows_NC, num_bits, GROUP_SIZE), inputs)


def _coded_bits(length: int, num_bits: int) -> int:
    """Bits of a row in codes: each code, and a step and a zero point a group."""
    return num_bits * length + (16 + num_bits) * -(-length // GROUP_SIZE)


def _mixed_bits(rows: int, columns: int, rank: int) -> int:
    bits = 16 * rank
    for num_bits, span in _vector_classes(rank):
        count = span.stop - span.start
        bits += count * min(_coded_bits(columns, num_bits), 16 * columns)
        bits += rows * min(_coded_bits(count, num_bits), 16 * count)
    return bits
