"""What a record holds beside planes: escapes and 16-bit channels, for one row or for a group.

An escape adds d to the code of one weight: 12 bits of column in a block of 4,096, 4 bits d + 8.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import BLOCK_COLUMNS, GROUP

_WIDTH: tl.constexpr = tl.constexpr(GROUP)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK_COLUMNS)
# Channels that are multiplied at a time.
_CHANNELS: tl.constexpr = tl.constexpr(16)


@triton.jit
def escape_table(image, record):
    """Addresses of the escapes' starts (int32) and of the escapes (int16); whether there are any."""
    offset = tl.load(record + 10)
    starts = (image + tl.load(record + 9).to(tl.int64) * 64).to(tl.pointer_type(tl.int32))
    return starts, (image + offset.to(tl.int64) * 64).to(tl.pointer_type(tl.int16)), offset != 0


@triton.jit
def _escapes_at(starts, escapes, place, end, row, BLOCKS: tl.constexpr):
    """Column and d of the escapes at `place`; d is nought from `end` on."""
    inside = place < end[:, None]
    entry = tl.load(escapes + place, mask=inside, other=-32768).to(tl.int32) & 0xFFFF
    column = entry & 4095
    for block in tl.static_range(1, BLOCKS):
        edge = tl.load(starts + row * BLOCKS + block)
        column += tl.where(place >= edge[:, None], _BLOCK, 0)
    return column, (entry >> 12) - 8, inside


@triton.jit
def escapes_one(image, record, x, row_N, known_N, K: tl.constexpr, BN: tl.constexpr):
    """Σ d x over the escapes of each row, float32 [N], for one row of the batch."""
    blocks: tl.constexpr = (K + _BLOCK - 1) // _BLOCK
    width: tl.constexpr = 16
    sum_N = tl.zeros([BN], tl.float32)
    starts, escapes, present = escape_table(image, record)
    if present:
        begin_N = tl.load(starts + row_N * blocks)
        end_N = tl.load(starts + (row_N + 1) * blocks)
        end_N = tl.where(known_N, end_N, begin_N)
        longest = tl.max(end_N - begin_N, 0)
        for e in tl.range(0, longest, width):
            place = begin_N[:, None] + (e + tl.arange(0, width))[None, :]
            column, d, inside = _escapes_at(starts, escapes, place, end_N, row_N, blocks)
            x_NE = tl.load(x + column, mask=inside, other=0.0)
            sum_N += tl.sum(x_NE.to(tl.float32) * d.to(tl.float32), 1)
    return sum_N


@triton.jit
def escapes_many(image, record, staged, row_N, known_N, K: tl.constexpr, BN: tl.constexpr):
    """Σ d x over the escapes of each row, float32 [N, M], for a group."""
    blocks: tl.constexpr = (K + _BLOCK - 1) // _BLOCK
    width: tl.constexpr = 2
    m_M = tl.arange(0, _WIDTH)
    sum_NM = tl.zeros([BN, _WIDTH], tl.float32)
    starts, escapes, present = escape_table(image, record)
    if present:
        begin_N = tl.load(starts + row_N * blocks)
        end_N = tl.load(starts + (row_N + 1) * blocks)
        end_N = tl.where(known_N, end_N, begin_N)
        longest = tl.max(end_N - begin_N, 0)
        for e in tl.range(0, longest, width):
            place = begin_N[:, None] + (e + tl.arange(0, width))[None, :]
            column, d, inside = _escapes_at(starts, escapes, place, end_N, row_N, blocks)
            at = staged + column[:, :, None] * _WIDTH + m_M[None, None, :]
            x_NEM = tl.load(at, mask=inside[:, :, None], other=0.0)
            sum_NM += tl.sum(x_NEM.to(tl.float32) * d[:, :, None].to(tl.float32), 1)
    return sum_NM


@triton.jit
def channels_one(image, record, x, n_N, known_N, BN: tl.constexpr):
    """Σ_c values x[channel c], float32 [N], for one row of the batch."""
    sum_N = tl.zeros([BN], tl.float32)
    count = tl.load(record + 13)
    index = (image + tl.load(record + 14).to(tl.int64) * 64).to(tl.pointer_type(tl.int32))
    values = (image + tl.load(record + 15).to(tl.int64) * 64).to(tl.pointer_type(tl.bfloat16))
    for c in tl.range(0, count, _CHANNELS):
        c_C = c + tl.arange(0, _CHANNELS)
        inside = c_C < count
        channel = tl.load(index + c_C, mask=inside, other=0)
        x_C = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        mask = known_N[:, None] & inside[None, :]
        v_NC = tl.load(values + n_N[:, None].to(tl.int64) * count + c_C, mask=mask, other=0.0)
        sum_N += tl.sum(v_NC.to(tl.float32) * x_C[None, :], 1)
    return sum_N


@triton.jit
def channels_many(image, record, staged, n_N, known_N, BN: tl.constexpr):
    """Σ_c values x[channel c], float32 [N, M], for a group."""
    m_M = tl.arange(0, _WIDTH)
    sum_NM = tl.zeros([BN, _WIDTH], tl.float32)
    count = tl.load(record + 13)
    index = (image + tl.load(record + 14).to(tl.int64) * 64).to(tl.pointer_type(tl.int32))
    values = (image + tl.load(record + 15).to(tl.int64) * 64).to(tl.pointer_type(tl.bfloat16))
    for c in tl.range(0, count):
        channel = tl.load(index + c)
        x_M = tl.load(staged + channel * _WIDTH + m_M).to(tl.float32)
        v_N = tl.load(values + n_N.to(tl.int64) * count + c, mask=known_N, other=0.0)
        sum_NM += v_N.to(tl.float32)[:, None] * x_M[None, :]
    return sum_NM
