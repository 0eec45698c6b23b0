"""Inputs as whole numbers of 16 bits, cut into digits of 8: what the products with codes multiply.

A row x becomes scale · q with a power of two as scale and |q| < 2^15; q = 256 h + l with h and l of
8 bits. Products with codes are then exact in int32, whatever their order: a row's result depends
neither on the rows beside it nor on how a launch is cut up. A bfloat16 keeps all its bits if it is
at least 2^-7 of the row's largest; smaller ones are rounded to 2^-15 of that.

Rows are written by groups of up to `GROUP` rows of one slot: see `Digits` for the buffers.
Shapes: G groups, M places of a group, K columns, B bytes of a plane's row (four columns each).
"""

import torch
import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import GROUP, group_of

# Bytes of a plane's row that a program writes digits for.
CHUNK = 512

_WIDTH: tl.constexpr = tl.constexpr(GROUP)
_CHUNK_BYTES: tl.constexpr = tl.constexpr(CHUNK)
# Largest q whose digits are in range: 127 · 256 + 127.
_LARGEST: tl.constexpr = tl.constexpr(32639.0)


@triton.jit
def _power(exponent):
    """2^exponent, float32."""
    field = tl.minimum(tl.maximum(exponent + 127, 1), 254)
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _shift_of(x, K: tl.constexpr, BLOCK: tl.constexpr):
    """The power of two that takes a row's largest value below `_LARGEST`, and that value."""
    k_K = tl.arange(0, BLOCK)
    largest = tl.max(tl.abs(tl.load(x + k_K, mask=k_K < K, other=0.0).to(tl.float32)), 0)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    shift = 14 - exponent
    return shift - tl.where(largest * _power(shift) > _LARGEST, 1, 0), largest


@triton.jit
def _write(
    digits, levels, columns, level_B4, b_B, group, m, count, BYTES: tl.constexpr
):  # fmt: skip
    """Write the levels of some bytes' columns, and their digits, to place m of a group."""
    q_4 = tl.arange(0, 4)
    k_B4 = b_B[:, None] * 4 + q_4[None, :]
    high_B4 = (level_B4 + 128) >> 8
    inside = b_B[:, None] < BYTES
    place = group.to(tl.int64) * _WIDTH + m
    at = digits + (place * 8 + q_4[None, :]) * BYTES + b_B[:, None]
    tl.store(at, high_B4.to(tl.int8), mask=inside)
    tl.store(at + 4 * BYTES, (level_B4 - high_B4 * 256).to(tl.int8), mask=inside)
    tl.store(levels + place * (4 * BYTES) + k_B4, level_B4.to(tl.int16), mask=inside)
    if count > 1:
        turned = columns + (group.to(tl.int64) * (4 * BYTES) + k_B4) * _WIDTH + m
        tl.store(turned, level_B4.to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["most", "skipped"])
def digits_kernel(
    digits, levels, columns, meta, x, x_stride, order, starts, most, skipped,
    SLOTS: tl.constexpr, SLOTS_WIDTH: tl.constexpr, K: tl.constexpr, BYTES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SINGLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """CHUNK bytes' columns of one place of a group; grid (chunks, rows of a group, groups).

    Args:
        x: [T, K], `x_stride` elements from row to row.
        order: Rows of the batch by slot; each slot's begin at `starts`.
        most: Slots with more rows are left out.
        skipped: Groups in front of the first.
        SINGLE: Whether the batch has one row, which then is taken for a slot's.
        EARLY: Whether this launch and the next may begin before the one ahead of them has ended.
    """
    m, group = tl.program_id(1), tl.program_id(2)
    first, count = 0, 1
    row = m.to(tl.int64)
    if not SINGLE:
        _, first, count = group_of(starts, group + skipped, most, SLOTS, SLOTS_WIDTH, _WIDTH)
        # Which rows a batch has was written before the launch ahead began: only x has to be waited for.
        row = tl.load(order + first + m, mask=m < count, other=0).to(tl.int64)
    if EARLY:
        # What is ahead has ended before the next launch begins: that one may read its output at once.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if m >= count:
        return
    x += row * x_stride
    shift, largest = _shift_of(x, K, BLOCK)
    b_B = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    k_B4 = b_B[:, None] * 4 + tl.arange(0, 4)[None, :]
    scaled_B4 = tl.load(x + k_B4, mask=k_B4 < K, other=0.0).to(tl.float32) * _power(shift)
    # To the nearest, halves away from zero: what a conversion to whole numbers cuts off.
    level_B4 = (scaled_B4 + tl.where(scaled_B4 < 0, -0.5, 0.5)).to(tl.int32)
    _write(digits, levels, columns, level_B4, b_B, group, m, count, BYTES)
    place, chunks = group.to(tl.int64) * _WIDTH + m, tl.num_programs(0)
    sum = tl.sum(tl.sum(level_B4, 1), 0)
    tl.store(meta + place * (1 + chunks), tl.where(largest > 0, _power(-shift), 0.0))
    tl.store(meta + place * (1 + chunks) + 1 + tl.program_id(0), sum.to(tl.float32))


@triton.jit
def meta_size(K: tl.constexpr):
    """Numbers of a place in `meta`: its scale and the sums of its chunks."""
    bytes: tl.constexpr = (K + 63) // 64 * 16
    return 1 + (bytes + _CHUNK_BYTES - 1) // _CHUNK_BYTES


@triton.jit
def inputs_of(digits, meta, group, K: tl.constexpr):
    """A group's digits, its first place in `levels` and `columns`, and its numbers in `meta`."""
    columns: tl.constexpr = (K + 63) // 64 * 64
    place = group.to(tl.int64) * _WIDTH
    return digits + place * (2 * columns), place * columns, meta + place * meta_size(K)


@triton.jit
def total_of(meta, places, inside, K: tl.constexpr):
    """Σ q of places."""
    bytes: tl.constexpr = (K + 63) // 64 * 16
    total = tl.load(meta + places * meta_size(K) + 1, mask=inside, other=0.0)
    for chunk in tl.static_range(1, (bytes + _CHUNK_BYTES - 1) // _CHUNK_BYTES):
        total += tl.load(meta + places * meta_size(K) + 1 + chunk, mask=inside, other=0.0)
    return total


class Digits:
    """Buffers of a batch's inputs.

    Attributes:
        digits: int8 [G, M, 8, B]: h of columns 4b, 4b + 1, 4b + 2, 4b + 3 and their l.
        levels: int16 [G, M, 4 B]: q.
        columns: int16 [G, 4 B, M]: q transposed, written for groups of more than one row; not there
            if no group can have two.
        meta: float32 [G, M, 1 + chunks]: scale, then Σ q of each chunk.
        chunks: Chunks of a row.
    """

    def __init__(self, groups: int, columns: int, many: bool, device: torch.device) -> None:
        self.bytes = -(-columns // 64) * 16
        padded = 4 * self.bytes
        shape = (groups, GROUP)
        self.digits = torch.empty(*shape, 8, self.bytes, dtype=torch.int8, device=device)
        self.levels = torch.empty(*shape, padded, dtype=torch.int16, device=device)
        self.columns = torch.empty(
            groups if many else 0, padded, GROUP, dtype=torch.int16, device=device
        )
        self.chunks = -(-self.bytes // CHUNK)
        self.meta = torch.empty(*shape, 1 + self.chunks, dtype=torch.float32, device=device)


def launch_digits(
    x_TK: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: int,
    groups: tuple[int, int, int],
    early: bool,
) -> Digits:
    """The digits of the rows of slots, in groups.

    Args:
        x_TK: bfloat16, float16 or float32, last stride 1.
        order: Rows of the batch by slot.
        starts: Where each slot's begin.
        slots: S.
        groups: Groups of the launch, groups in front of them, most rows of a slot.
        early: Whether launches may begin before those ahead of them have ended.
    """
    rows, columns = x_TK.shape
    count, skipped, most = groups
    made = Digits(count, columns, rows > 1, x_TK.device)
    options: dict[str, object] = {"launch_pdl": True} if early else {}
    digits_kernel[(made.chunks, min(rows, GROUP), count)](
        made.digits, made.levels, made.columns, made.meta, x_TK, x_TK.stride(0), order, starts,
        most, skipped, SLOTS=slots, SLOTS_WIDTH=triton.next_power_of_2(slots), K=columns,
        BYTES=made.bytes, BLOCK=triton.next_power_of_2(columns), CHUNK=CHUNK, SINGLE=rows == 1,
        EARLY=early, num_warps=warps_for(columns), **options,
    )  # fmt: skip
    return made


def warps_for(columns: int) -> int:
    """Warps of a program that reads a row of this length."""
    return 1 if columns < 1024 else 4 if columns < 4096 else 8 if columns < 8192 else 16
