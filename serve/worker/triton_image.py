"""How Triton kernels read a slot image: a record's fields, its rows, and which rows of a batch a program has.

Everything that differs between experts is read from the slot on the device; what is baked into a
kernel belongs to the layer: rows of its slices, columns, number of slots.

Shapes: S slots, N rows of a slice, K columns, T rows of a batch, G groups of at most `GROUP` rows.
"""

import triton
import triton.language as tl

from deltamux.compression.image.layout import HEADER_BYTES, RECORD_BYTES, UNIT, Field
from deltamux.compression.image.planes import BLOCK_COLUMNS

# Rows of a batch that one program multiplies: twice the width of a tensor core tile.
GROUP = 16

_HEADER: tl.constexpr = tl.constexpr(HEADER_BYTES)
_RECORD: tl.constexpr = tl.constexpr(RECORD_BYTES)
_UNIT: tl.constexpr = tl.constexpr(UNIT)
# Columns that share a start in the table of escapes.
BLOCK: tl.constexpr = tl.constexpr(BLOCK_COLUMNS)
PLANES: tl.constexpr = tl.constexpr(int(Field.PLANES))
ROWS: tl.constexpr = tl.constexpr(int(Field.ROWS))
PLANE0: tl.constexpr = tl.constexpr(int(Field.PLANE0))
PLANE1: tl.constexpr = tl.constexpr(int(Field.PLANE1))
ZERO: tl.constexpr = tl.constexpr(int(Field.ZERO))
STEP: tl.constexpr = tl.constexpr(int(Field.STEP))
STEPS: tl.constexpr = tl.constexpr(int(Field.STEPS))
STARTS: tl.constexpr = tl.constexpr(int(Field.STARTS))
ESCAPES: tl.constexpr = tl.constexpr(int(Field.ESCAPES))
ROW_MAP: tl.constexpr = tl.constexpr(int(Field.ROW_MAP))
CHANNELS: tl.constexpr = tl.constexpr(int(Field.CHANNELS))
CHANNEL_INDEX: tl.constexpr = tl.constexpr(int(Field.CHANNEL_INDEX))
CHANNEL_VALUES: tl.constexpr = tl.constexpr(int(Field.CHANNEL_VALUES))
RANK: tl.constexpr = tl.constexpr(int(Field.RANK))
FACTOR_KIND: tl.constexpr = tl.constexpr(int(Field.FACTOR_KIND))
RIGHT: tl.constexpr = tl.constexpr(int(Field.RIGHT))
LEFT: tl.constexpr = tl.constexpr(int(Field.LEFT))
RIGHT_STEPS: tl.constexpr = tl.constexpr(int(Field.RIGHT_STEPS))
LEFT_STEPS: tl.constexpr = tl.constexpr(int(Field.LEFT_STEPS))
VECTOR: tl.constexpr = tl.constexpr(int(Field.VECTOR))


@triton.jit
def record_of(slots, slot_bytes, slot, entry):
    """Address of a slot's image, and of a record in it as int32."""
    image = slots + slot.to(tl.int64) * slot_bytes
    return image, (image + _HEADER + entry * _RECORD).to(tl.pointer_type(tl.int32))


@triton.jit
def section(image, record, field, dtype: tl.constexpr):
    """Address of the section that a field of a record points to."""
    offset = tl.load(record + field).to(tl.int64) * _UNIT
    return (image + offset).to(tl.pointer_type(dtype))


@triton.jit
def number(record, field):
    """A field that holds the bits of a float32."""
    return tl.load(record + field).to(tl.float32, bitcast=True)


@triton.jit
def tiles_of(starts, most, SLOTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Where each slot's rows begin and end in `order` [S], and its tiles of up to TILE rows [S].

    Slots with more than `most` rows have none. WIDTH: SLOTS rounded up to a power of two.
    """
    slot_S = tl.arange(0, WIDTH)
    inside = slot_S < SLOTS
    begin_S = tl.load(starts + slot_S, mask=inside, other=0).to(tl.int32)
    end_S = tl.load(starts + slot_S + 1, mask=inside, other=0).to(tl.int32)
    rows_S = end_S - begin_S
    return begin_S, end_S, tl.where(rows_S <= most, (rows_S + TILE - 1) // TILE, 0)


@triton.jit
def group_at(begin_S, end_S, tiles_S, index, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The `index`-th tile of one slot: slot, first place in `order`, rows; none where there are fewer."""
    slot_S = tl.arange(0, WIDTH)
    last_S = tl.cumsum(tiles_S, 0)
    mine = (index < last_S) & (index >= last_S - tiles_S)
    slot = tl.sum(tl.where(mine, slot_S, 0), 0)
    first = tl.sum(tl.where(mine, begin_S + (index - last_S + tiles_S) * TILE, 0), 0)
    end = tl.sum(tl.where(mine, end_S, 0), 0)
    return slot, first, tl.minimum(end - first, TILE)


@triton.jit
def group_of(
    starts, index, most, SLOTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """As `group_at`, of the tiles that `tiles_of` finds."""
    begin_S, end_S, tiles_S = tiles_of(starts, most, SLOTS, WIDTH, TILE)
    return group_at(begin_S, end_S, tiles_S, index, WIDTH, TILE)


@triton.jit
def ones_in(word):
    """Set bits of 32-bit words (int64 arithmetic, so that no sign is in the way)."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101 & 0xFFFFFFFF) >> 24


@triton.jit
def coded_row(image, record, n, N: tl.constexpr, MAPPED: tl.constexpr):
    """Row of codes of output rows `n`, and whether they have one.

    A row without codes gets a row that may be read, so that loads need no mask.
    """
    known = n < N
    if MAPPED:
        if tl.load(record + ROW_MAP) != 0:
            table = section(image, record, ROW_MAP, tl.int32)
            word = tl.minimum(n, N - 1) // 32
            bits = tl.load(table + word * 2).to(tl.int64) & 0xFFFFFFFF
            below = (tl.full([1], 1, tl.int64) << (n % 32).to(tl.int64)) - 1
            row = tl.load(table + word * 2 + 1) + ones_in(bits & below).to(tl.int32)
            known = known & (((bits >> (n % 32).to(tl.int64)) & 1) != 0)
        else:
            row = n
    else:
        row = n
    last = tl.maximum(tl.load(record + ROWS) - 1, 0)
    return tl.minimum(row, last), known


@triton.jit
def steps_of(image, record, row):
    """Step of each coded row, float32."""
    step = number(record, STEP) + tl.zeros_like(row).to(tl.float32)
    if tl.load(record + STEPS) != 0:
        table = section(image, record, STEPS, tl.bfloat16)
        step = tl.load(table + row).to(tl.float32)
    return step


@triton.jit
def vector_of(image, record, n, known):
    """The record's float32 vector at rows `n`, nought where it has none."""
    vector = tl.zeros_like(n).to(tl.float32)
    if tl.load(record + VECTOR) != 0:
        table = section(image, record, VECTOR, tl.float32)
        vector = tl.load(table + n, mask=known, other=0.0)
    return vector
