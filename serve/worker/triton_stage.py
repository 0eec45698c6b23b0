"""The rows of each group of a batch, transposed, with the sums that products with codes need.

A group is up to `GROUP` rows of one slot. Transposed, one column of all its rows is 32 bytes in a
line: the tensor cores' second operand is read as it lies, and an escape costs one read.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import GROUP, group_of

# Columns a program transposes.
CHUNK = 512

_WIDTH: tl.constexpr = tl.constexpr(GROUP)
_CHUNK: tl.constexpr = tl.constexpr(CHUNK)


def padded_columns(columns: int) -> int:
    """Columns of the transposed rows: a step of a product may read behind the last."""
    return -(-columns // CHUNK) * CHUNK


@triton.jit
def stage_kernel(
    staged, sums, x, x_stride, order, starts,
    SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr, K: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Transpose CHUNK columns of one group; groups of a single row need none of this.

    Args:
        staged: [G, columns rounded up, M] of x's type; rows that the group lacks become nought.
        sums: float32 [G, CHUNKS, 3, M]: sums over the columns of each i % 3, i a column mod 8.
        x: [T, K].
        x_stride: Elements from row to row.
        order: Rows of the batch by slot.
        starts: Where each slot's begin [S + 1].
    """
    if DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    _, first, count = group_of(starts, group, SLOTS, SLOTS_WIDTH, _WIDTH)
    if count > 1:
        m_M = tl.arange(0, _WIDTH)
        k_K = chunk * _CHUNK + tl.arange(0, _CHUNK)
        row_M = tl.load(order + first + m_M, mask=m_M < count, other=0).to(tl.int64)
        inside = (k_K < K)[:, None] & (m_M < count)[None, :]
        x_KM = tl.load(x + row_M[None, :] * x_stride + k_K[:, None], mask=inside, other=0.0)
        chunks = tl.num_programs(1)
        place = group.to(tl.int64) * chunks + chunk
        at = staged + place * (_CHUNK * _WIDTH)
        tl.store(at + tl.arange(0, _CHUNK)[:, None] * _WIDTH + m_M[None, :], x_KM)
        kind_K = k_K % 8 % 3
        wide_KM = x_KM.to(tl.float32)
        for kind in tl.static_range(3):
            sum_M = tl.sum(tl.where((kind_K == kind)[:, None], wide_KM, 0.0), 0)
            tl.store(sums + (place * 3 + kind) * _WIDTH + m_M, sum_M)
