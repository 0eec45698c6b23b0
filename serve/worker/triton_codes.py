"""Products with two-bit codes: a plane's bytes go from memory into the tensor cores' registers.

A byte holds four codes. Masking bits 2i and 2i + 1 of four bytes at a time leaves four times the
code i of each, times 4^i: an 8-bit operand of the tensor cores without another step. The powers of
four come off the sums, which are exact in int32: at most 48 · 128 · K / 4, below 2^31 to K = 2^20.

Shapes: N rows of a tile, B bytes of a step, P parts of a row, M rows of the batch in a group.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import (
    GROUP,
)
from deltamux.serve.worker.triton_parts import steps_of_part

_WIDTH: tl.constexpr = tl.constexpr(GROUP)
_MASKS: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $4, 6; and.b32 $0, $4, 0x03030303; and.b32 $1, $4, 0x0C0C0C0C; "
    "and.b32 $2, $4, 0x30303030; and.b32 $3, t, 0x03030303; }"
)
_UNITS: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t, u, v; shr.u32 t, $4, 2; shr.u32 u, $4, 4; shr.u32 v, $4, 6; "
    "and.b32 $0, $4, 0x03030303; and.b32 $1, t, 0x03030303; "
    "and.b32 $2, u, 0x03030303; and.b32 $3, v, 0x03030303; }"
)
_REGISTERS: tl.constexpr = tl.constexpr("=r,=r,=r,=r,r")


@triton.jit
def unpack(bytes, UNITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int8 bytes -> the four codes of each, int8; code i times 4^i unless UNITS (i = 3: as it is)."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _UNITS if UNITS else _MASKS, _REGISTERS, [bytes], (tl.int8,) * 4, is_pure=True, pack=4
        )
    else:
        c3 = (bytes >> 6) & 0x03
        if UNITS:
            return bytes & 0x03, (bytes >> 2) & 0x03, (bytes >> 4) & 0x03, c3
        else:
            return bytes & 0x03, bytes & 0x0C, bytes & 0x30, c3


@triton.jit
def _bytes(at, b, b_at, BYTES: tl.constexpr, EVEN: tl.constexpr):
    """A step's bytes, of a plane or of digits; nought behind the row's end."""
    if EVEN:
        return tl.load(at + b)
    else:
        return tl.load(at + b, mask=b + b_at < BYTES, other=0)


@triton.jit
def _places(
    plane, row_N, K: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr
):
    """Addresses of a tile's first bytes, and the bytes' places in their rows, for codes and digits.

    With SPLIT parts the bytes of a row are cut in as many runs, one for each warp.
    """
    bytes: tl.constexpr = (K + 63) // 64 * 16
    codes = plane.to(tl.pointer_type(tl.int8))
    b_B = tl.arange(0, BB)
    if SPLIT == 1:
        b = b_B[None, :]
        return codes + row_N[:, None] * bytes + b, b, b
    else:
        b = (tl.arange(0, SPLIT)[:, None] * RUN + b_B[None, :])[:, None, :]
        return codes + row_N[None, :, None] * bytes + b, b, b


@triton.jit
def _turned(digits, SPLIT: tl.constexpr):
    """Digits with bytes in front: the second operand of a product."""
    if SPLIT == 1:
        return tl.trans(digits)
    else:
        return tl.trans(digits, (0, 2, 1))


@triton.jit
def _sums_by_digit(a0, a1, a2, a3, n, SPLIT: tl.constexpr):
    """Σ codes h and Σ codes l [N], from the products with each code of a byte [N, 8] or [P, N, 8]."""
    code = n & 3
    sums = tl.where(code == 0, a0, tl.where(code == 1, a1 >> 2, tl.where(code == 2, a2 >> 4, a3)))
    high, low = tl.where(n < 4, sums, 0), tl.where(n < 4, 0, sums)
    if SPLIT == 1:
        return tl.sum(high, 1), tl.sum(low, 1)
    else:
        return tl.sum(tl.sum(high, 2), 0), tl.sum(tl.sum(low, 2), 0)


@triton.jit
def product_one(
    plane, digits, row_N, part, parts, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    UNROLL: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Σ_k codes h and Σ_k codes l of one row of the batch, int32 [N], over a part of the columns.

    The eight columns of a tensor core's tile are the digits of the four columns of a byte. Of the
    product with code i, the two columns of i are wanted.
    """
    bytes: tl.constexpr = (K + 63) // 64 * 16
    step: tl.constexpr = BB * UNROLL
    run: tl.constexpr = (bytes + step * SPLIT - 1) // (step * SPLIT) * step
    even: tl.constexpr = run * SPLIT == bytes
    c_at, b_c, b_d = _places(plane, row_N, K, BB, run, SPLIT)
    n_8 = tl.arange(0, 8)
    if SPLIT == 1:
        n = n_8[None, :]
        d_at = digits + n_8[:, None] * bytes + b_d
        a0 = tl.zeros([BN, 8], tl.int32)
    else:
        n = n_8[None, None, :]
        d_at = digits + n_8[None, :, None] * bytes + b_d
        a0 = tl.zeros([SPLIT, BN, 8], tl.int32)
    a1, a2, a3 = a0, a0, a0
    begin, end = steps_of_part(part, parts, run // step)
    for b in tl.range(begin * step, end * step, step, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            c = _bytes(c_at, b + u * BB, b_c, bytes, even)
            d = _turned(_bytes(d_at, b + u * BB, b_d, bytes, even), SPLIT)
            c0, c1, c2, c3 = unpack(c, False, ASSEMBLY)
            a0 = tl.dot(c0, d, a0, out_dtype=tl.int32)
            a1 = tl.dot(c1, d, a1, out_dtype=tl.int32)
            a2 = tl.dot(c2, d, a2, out_dtype=tl.int32)
            a3 = tl.dot(c3, d, a3, out_dtype=tl.int32)
    return _sums_by_digit(a0, a1, a2, a3, n, SPLIT)


@triton.jit
def product_many(
    plane, digits, row_N, part, parts, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """As `product_one`, of a group's rows [N, M]."""
    bytes: tl.constexpr = (K + 63) // 64 * 16
    run: tl.constexpr = (bytes + BB * SPLIT - 1) // (BB * SPLIT) * BB
    even: tl.constexpr = run * SPLIT == bytes
    c_at, b_c, b_d = _places(plane, row_N, K, BB, run, SPLIT)
    m_M = tl.arange(0, _WIDTH)
    if SPLIT == 1:
        d_at = digits + m_M[:, None] * (8 * bytes) + b_d
        high = tl.zeros([BN, _WIDTH], tl.int32)
    else:
        d_at = digits + m_M[None, :, None] * (8 * bytes) + b_d
        high = tl.zeros([SPLIT, BN, _WIDTH], tl.int32)
    low = high
    begin, end = steps_of_part(part, parts, run // BB)
    for b in tl.range(begin * BB, end * BB, BB, num_stages=STAGES):
        codes = unpack(_bytes(c_at, b, b_c, bytes, even), True, ASSEMBLY)
        for i in tl.static_range(4):
            h = _bytes(d_at + i * bytes, b, b_d, bytes, even)
            high = tl.dot(codes[i], _turned(h, SPLIT), high, out_dtype=tl.int32)
            d = _bytes(d_at + (4 + i) * bytes, b, b_d, bytes, even)
            low = tl.dot(codes[i], _turned(d, SPLIT), low, out_dtype=tl.int32)
    if SPLIT > 1:
        return tl.sum(high, 0), tl.sum(low, 0)
    else:
        return high, low
