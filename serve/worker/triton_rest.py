"""What a record holds beside planes: escapes and 16-bit channels, for one row or for a group.

q are a row's inputs as whole numbers (see `triton_digits.py`).
An escape adds d to the code of one weight: 12 bits of column in a block of 4,096, 4 bits d + 8.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import (
    BLOCK,
    CHANNEL_INDEX,
    CHANNEL_VALUES,
    CHANNELS,
    ESCAPES,
    GROUP,
    STARTS,
    section,
)
from deltamux.serve.worker.triton_parts import span_of_part

_WIDTH: tl.constexpr = tl.constexpr(GROUP)


@triton.jit
def escape_table(image, record):
    """Addresses of the escapes' starts and of the escapes; whether there are any."""
    starts = section(image, record, STARTS, tl.int32)
    return starts, section(image, record, ESCAPES, tl.int16), tl.load(record + ESCAPES) != 0


@triton.jit
def escape_spans(starts, row_N, known_N, present, BLOCKS: tl.constexpr):
    """Where each row's escapes begin and end; at the same place where there are none."""
    begin_N = tl.zeros_like(row_N)
    end_N = begin_N
    if present:
        begin_N = tl.load(starts + row_N * BLOCKS)
        end_N = tl.load(starts + (row_N + 1) * BLOCKS)
        end_N = tl.where(known_N, end_N, begin_N)
    return begin_N, end_N


@triton.jit
def _entries(escapes, place, end):
    """Escapes at `place`; with d nought from `end` on."""
    return tl.load(escapes + place, mask=place < end, other=-32768)


@triton.jit
def _parts(entry, place, starts, row, BLOCKS: tl.constexpr):
    """Column and d of escapes."""
    entry = entry.to(tl.int32) & 0xFFFF
    column = entry & 4095
    for block in tl.static_range(1, BLOCKS):
        edge = tl.load(starts + row * BLOCKS + block)
        column += tl.where(place >= edge, BLOCK, 0)
    return column, (entry >> 12) - 8


@triton.jit
def first_escapes(
    image, record, row_N, known_N, part, parts, K: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Where a part of each row's escapes begins and ends [N], and its first WIDTH [N, E]."""
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    starts, escapes, present = escape_table(image, record)
    begin_N, end_N = escape_spans(starts, row_N, known_N, present, blocks)
    begin_N, end_N = span_of_part(begin_N, end_N, part, parts)
    at = begin_N[:, None] + tl.arange(0, WIDTH)[None, :]
    return begin_N, end_N, _entries(escapes, at, end_N[:, None])


@triton.jit
def escapes_one(
    image, record, levels, row_N, begin_N, end_N, ahead, K: tl.constexpr, BN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ d q over the escapes of each row, int32 [N], for one row of the batch.

    The next escapes are on their way while the inputs of these are read; the first are given.
    """
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    starts, escapes, _ = escape_table(image, record)
    sum_NE = tl.zeros([BN, WIDTH], tl.int32)
    at = begin_N[:, None] + tl.arange(0, WIDTH)[None, :]
    for _ in tl.range(0, tl.max(end_N - begin_N, 0), WIDTH):
        column, d = _parts(ahead, at, starts, row_N[:, None], blocks)
        # Not so; but it makes lanes lie along the row as for the escapes, and loads stay single
        # because nothing is known of their alignment.
        q_NE = tl.load(tl.max_contiguous(levels + column, (1, 2)))
        at += WIDTH
        ahead = _entries(escapes, at, end_N[:, None])
        sum_NE += q_NE.to(tl.int32) * d
    return tl.sum(sum_NE, 1)


@triton.jit
def escapes_many(
    image, record, columns, row_N, known_N, part, parts, K: tl.constexpr, BN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ d q over a part of the escapes of each row, int32 [N, M], for a group.

    The inputs of the next escapes are on their way while these are multiplied, and so are the
    escapes after them.
    """
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    m_M = tl.arange(0, _WIDTH)
    starts, escapes, present = escape_table(image, record)
    begin_N, end_N = escape_spans(starts, row_N, known_N, present, blocks)
    begin_N, end_N = span_of_part(begin_N, end_N, part, parts)
    sum_NEM = tl.zeros([BN, WIDTH, _WIDTH], tl.int32)
    at = begin_N[:, None] + tl.arange(0, WIDTH)[None, :]
    column, d = _parts(_entries(escapes, at, end_N[:, None]), at, starts, row_N[:, None], blocks)
    q_NEM = _column(columns, column, m_M)
    at += WIDTH
    ahead = _entries(escapes, at, end_N[:, None])
    for _ in tl.range(0, tl.max(end_N - begin_N, 0), WIDTH):
        column, d_next = _parts(ahead, at, starts, row_N[:, None], blocks)
        q_next = _column(columns, column, m_M)
        at += WIDTH
        ahead = _entries(escapes, at, end_N[:, None])
        sum_NEM += q_NEM.to(tl.int32) * d[:, :, None]
        q_NEM, d = q_next, d_next
    return tl.sum(sum_NEM, 1)


@triton.jit
def _column(columns, column, m_M):
    """q of all rows of a group at columns [N, E]: [N, E, M]."""
    return tl.load(columns + column[:, :, None] * _WIDTH + m_M[None, None, :])


@triton.jit
def channels_one(image, record, levels, n_N, known_N, BN: tl.constexpr):
    """Σ_c values q[channel c], float32 [N], for one row of the batch."""
    sum_N = tl.zeros([BN], tl.float32)
    count = tl.load(record + CHANNELS)
    if count > 0:
        index = section(image, record, CHANNEL_INDEX, tl.int32)
        values = section(image, record, CHANNEL_VALUES, tl.bfloat16)
        for c in tl.range(0, count):
            q = tl.load(levels + tl.load(index + c)).to(tl.float32)
            v_N = tl.load(values + n_N.to(tl.int64) * count + c, mask=known_N, other=0.0)
            sum_N += v_N.to(tl.float32) * q
    return sum_N


@triton.jit
def channels_many(image, record, columns, n_N, known_N, BN: tl.constexpr):
    """Σ_c values q[channel c], float32 [N, M], for a group."""
    m_M = tl.arange(0, _WIDTH)
    sum_NM = tl.zeros([BN, _WIDTH], tl.float32)
    count = tl.load(record + CHANNELS)
    if count > 0:
        index = section(image, record, CHANNEL_INDEX, tl.int32)
        values = section(image, record, CHANNEL_VALUES, tl.bfloat16)
        for c in tl.range(0, count):
            q_M = tl.load(columns + tl.load(index + c) * _WIDTH + m_M).to(tl.float32)
            v_N = tl.load(values + n_N.to(tl.int64) * count + c, mask=known_N, other=0.0)
            sum_NM += v_N.to(tl.float32)[:, None] * q_M[None, :]
    return sum_NM
