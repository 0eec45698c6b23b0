"""How Triton kernels read a slot image: a record's fields, its rows, and which rows of a batch a program has.

Everything that differs between experts is read from the slot on the device; what is baked into a
kernel belongs to the layer: rows of its slices, columns, number of slots.

Shapes: S slots, N rows of a slice, K columns, T rows of a batch, G groups of at most `GROUP` rows.
"""

import triton
import triton.language as tl

# Rows of a batch that one program multiplies: the width of a tensor core tile.
GROUP = 16
# Columns that share a start in the table of escapes.
BLOCK_COLUMNS = 4096


@triton.jit
def record_of(slots, slot_bytes, slot, entry):
    """Address of a slot's image, and of a record in it as int32."""
    image = slots + slot.to(tl.int64) * slot_bytes
    return image, (image + 128 + entry * 128).to(tl.pointer_type(tl.int32))


@triton.jit
def section(image, record, field: tl.constexpr):
    """Address of the section that a field of a record points to."""
    return image + tl.load(record + field).to(tl.int64) * 64


@triton.jit
def number(record, field: tl.constexpr):
    """A field that holds the bits of a float32."""
    return tl.load(record + field).to(tl.float32, bitcast=True)


@triton.jit
def group_of(starts, index, SLOTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The `index`-th tile of up to TILE rows of one slot: slot, first place in `order`, rows.

    Rows are nought where the batch has fewer tiles. WIDTH: SLOTS rounded up to a power of two.
    """
    slot_S = tl.arange(0, WIDTH)
    inside = slot_S < SLOTS
    begin_S = tl.load(starts + slot_S, mask=inside, other=0).to(tl.int32)
    end_S = tl.load(starts + slot_S + 1, mask=inside, other=0).to(tl.int32)
    tiles_S = (end_S - begin_S + TILE - 1) // TILE
    last_S = tl.cumsum(tiles_S, 0)
    mine = (index < last_S) & (index >= last_S - tiles_S)
    slot = tl.sum(tl.where(mine, slot_S, 0), 0)
    first = tl.sum(tl.where(mine, begin_S + (index - last_S + tiles_S) * TILE, 0), 0)
    end = tl.sum(tl.where(mine, end_S, 0), 0)
    return slot, first, tl.minimum(end - first, TILE)


@triton.jit
def ones_in(word):
    """Set bits of 32-bit words (int64 arithmetic, so that no sign is in the way)."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101 & 0xFFFFFFFF) >> 24


@triton.jit
def coded_row(image, record, n, N: tl.constexpr, ROW_MAP: tl.constexpr):
    """Row of codes of output rows `n`, and whether they have one.

    A row without codes gets a row that may be read, so that loads need no mask.
    """
    known = n < N
    if ROW_MAP:
        offset = tl.load(record + 12)
        if offset != 0:
            table = (image + offset.to(tl.int64) * 64).to(tl.pointer_type(tl.int32))
            word = tl.minimum(n, N - 1) // 32
            bits = tl.load(table + word * 2).to(tl.int64) & 0xFFFFFFFF
            below = (tl.full([1], 1, tl.int64) << (n % 32).to(tl.int64)) - 1
            row = tl.load(table + word * 2 + 1) + ones_in(bits & below).to(tl.int32)
            known = known & (((bits >> (n % 32).to(tl.int64)) & 1) != 0)
        else:
            row = n
    else:
        row = n
    last = tl.maximum(tl.load(record + 1) - 1, 0)
    return tl.minimum(row, last), known


@triton.jit
def steps_of(image, record, row):
    """Step of each coded row, float32."""
    offset = tl.load(record + 8)
    step = number(record, 7) + tl.zeros_like(row).to(tl.float32)
    if offset != 0:
        table = (image + offset.to(tl.int64) * 64).to(tl.pointer_type(tl.bfloat16))
        step = tl.load(table + row).to(tl.float32)
    return step


@triton.jit
def vector_of(image, record, n, known):
    """The record's float32 vector at rows `n`, nought where it has none."""
    offset = tl.load(record + 22)
    vector = tl.zeros_like(n).to(tl.float32)
    if offset != 0:
        table = (image + offset.to(tl.int64) * 64).to(tl.pointer_type(tl.float32))
        vector = tl.load(table + n, mask=known, other=0.0)
    return vector
