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
def escape_spans(starts, row_N, known_N, present, BLOCKS: tl.constexpr):
    """Where each row's escapes begin and end; nought rows of them where there are none."""
    begin_N = tl.zeros_like(row_N)
    end_N = begin_N
    if present:
        begin_N = tl.load(starts + row_N * BLOCKS)
        end_N = tl.load(starts + (row_N + 1) * BLOCKS)
        end_N = tl.where(known_N, end_N, begin_N)
    return begin_N, end_N


@triton.jit
def _entries(escapes, place, end_N):
    """Escapes at `place`; with d nought from `end_N` on."""
    return tl.load(escapes + place, mask=place < end_N[:, None], other=-32768)


@triton.jit
def _parts(entry, place, starts, row_N, BLOCKS: tl.constexpr):
    """Column and d of escapes."""
    entry = entry.to(tl.int32) & 0xFFFF
    column = entry & 4095
    for block in tl.static_range(1, BLOCKS):
        edge_N = tl.load(starts + row_N * BLOCKS + block)
        column += tl.where(place >= edge_N[:, None], _BLOCK, 0)
    return column, ((entry >> 12) - 8).to(tl.float32)


@triton.jit
def escapes_one(
    image, record, x, row_N, known_N, K: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr
):
    """Σ d x over the escapes of each row, float32 [N], for one row of the batch.

    The next escapes are on their way while the inputs of these are read.
    """
    blocks: tl.constexpr = (K + _BLOCK - 1) // _BLOCK
    starts, escapes, present = escape_table(image, record)
    begin_N, end_N = escape_spans(starts, row_N, known_N, present, blocks)
    sum_NE = tl.zeros([BN, WIDTH], tl.float32)
    place = begin_N[:, None] + tl.arange(0, WIDTH)[None, :]
    ahead = _entries(escapes, place, end_N)
    for _ in tl.range(0, tl.max(end_N - begin_N, 0), WIDTH):
        column, d = _parts(ahead, place, starts, row_N, blocks)
        x_NE = tl.load(x + column, mask=place < end_N[:, None], other=0.0)
        place += WIDTH
        ahead = _entries(escapes, place, end_N)
        sum_NE += x_NE.to(tl.float32) * d
    return tl.sum(sum_NE, 1)


@triton.jit
def escapes_many(
    image, record, staged, row_N, known_N, K: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr
):
    """Σ d x over the escapes of each row, float32 [N, M], for a group.

    The inputs of the next escapes are on their way while these are multiplied, and so are the
    escapes after them.
    """
    blocks: tl.constexpr = (K + _BLOCK - 1) // _BLOCK
    m_M = tl.arange(0, _WIDTH)
    starts, escapes, present = escape_table(image, record)
    begin_N, end_N = escape_spans(starts, row_N, known_N, present, blocks)
    sum_NEM = tl.zeros([BN, WIDTH, _WIDTH], tl.float32)
    place = begin_N[:, None] + tl.arange(0, WIDTH)[None, :]
    column, d = _parts(_entries(escapes, place, end_N), place, starts, row_N, blocks)
    at = staged + column[:, :, None] * _WIDTH + m_M[None, None, :]
    x_NEM = tl.load(at, mask=(place < end_N[:, None])[:, :, None], other=0.0)
    place += WIDTH
    ahead = _entries(escapes, place, end_N)
    for _ in tl.range(0, tl.max(end_N - begin_N, 0), WIDTH):
        column, d_next = _parts(ahead, place, starts, row_N, blocks)
        at = staged + column[:, :, None] * _WIDTH + m_M[None, None, :]
        x_next = tl.load(at, mask=(place < end_N[:, None])[:, :, None], other=0.0)
        place += WIDTH
        ahead = _entries(escapes, place, end_N)
        sum_NEM += x_NEM.to(tl.float32) * d[:, :, None]
        x_NEM, d = x_next, d_next
    return tl.sum(sum_NEM, 1)


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
