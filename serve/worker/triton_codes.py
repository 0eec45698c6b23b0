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
def product_one(
    plane, digits, row_N, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    UNROLL: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Σ_k codes q of one row of the batch, float32 [N].

    The eight columns of a tensor core's tile are the digits of the four columns of a byte. Of the
    product with code i, the two columns of i are wanted. With SPLIT parts the bytes of a row are
    cut in as many runs, one for each warp.
    """
    bytes: tl.constexpr = (K + 63) // 64 * 16
    step: tl.constexpr = BB * UNROLL
    run: tl.constexpr = (bytes + step * SPLIT - 1) // (step * SPLIT) * step
    even: tl.constexpr = run * SPLIT == bytes
    n_8, b_B = tl.arange(0, 8), tl.arange(0, BB)
    codes = plane.to(tl.pointer_type(tl.int8))
    if SPLIT == 1:
        c_at, b_c = codes + row_N[:, None] * bytes + b_B[None, :], b_B[None, :]
        d_at, b_d = digits + n_8[:, None] * bytes + b_B[None, :], b_B[None, :]
        a0 = tl.zeros([BN, 8], tl.int32)
    else:
        b_PB = tl.arange(0, SPLIT)[:, None] * run + b_B[None, :]
        c_at, b_c = codes + row_N[None, :, None] * bytes + b_PB[:, None, :], b_PB[:, None, :]
        d_at, b_d = digits + n_8[None, :, None] * bytes + b_PB[:, None, :], b_PB[:, None, :]
        a0 = tl.zeros([SPLIT, BN, 8], tl.int32)
    a1, a2, a3 = a0, a0, a0
    for b in tl.range(0, run, step, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            c = _bytes(c_at, b + u * BB, b_c, bytes, even)
            d = _bytes(d_at, b + u * BB, b_d, bytes, even)
            if SPLIT == 1:
                d = tl.trans(d)
            else:
                d = tl.trans(d, (0, 2, 1))
            c0, c1, c2, c3 = unpack(c, False, ASSEMBLY)
            a0 = tl.dot(c0, d, a0, out_dtype=tl.int32)
            a1 = tl.dot(c1, d, a1, out_dtype=tl.int32)
            a2 = tl.dot(c2, d, a2, out_dtype=tl.int32)
            a3 = tl.dot(c3, d, a3, out_dtype=tl.int32)
    n = n_8[None, :] if SPLIT == 1 else n_8[None, None, :]
    code = n & 3
    sums = tl.where(code == 0, a0, tl.where(code == 1, a1 >> 2, tl.where(code == 2, a2 >> 4, a3)))
    high, low = tl.where(n < 4, sums, 0), tl.where(n < 4, 0, sums)
    if SPLIT == 1:
        high_N, low_N = tl.sum(high, 1), tl.sum(low, 1)
    else:
        high_N, low_N = tl.sum(tl.sum(high, 2), 0), tl.sum(tl.sum(low, 2), 0)
    return high_N.to(tl.float32) * 256.0 + low_N.to(tl.float32)


@triton.jit
def product_many(
    plane, digits, row_N, K: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Σ_k codes q of a group's rows, float32 [N, M]."""
    bytes: tl.constexpr = (K + 63) // 64 * 16
    even: tl.constexpr = bytes % BB == 0
    m_M, b_B = tl.arange(0, _WIDTH), tl.arange(0, BB)
    c_at = plane.to(tl.pointer_type(tl.int8)) + row_N[:, None] * bytes + b_B[None, :]
    d_at = digits + m_M[:, None] * (8 * bytes) + b_B[None, :]
    high_NM = tl.zeros([BN, _WIDTH], tl.int32)
    low_NM = high_NM
    for b in tl.range(0, bytes, BB, num_stages=STAGES):
        codes = unpack(_bytes(c_at, b, b_B[None, :], bytes, even), True, ASSEMBLY)
        for i in tl.static_range(4):
            h = _bytes(d_at + i * bytes, b, b_B[None, :], bytes, even)
            high_NM = tl.dot(codes[i], tl.trans(h), high_NM, out_dtype=tl.int32)
            l = _bytes(d_at + (4 + i) * bytes, b, b_B[None, :], bytes, even)
            low_NM = tl.dot(codes[i], tl.trans(l), low_NM, out_dtype=tl.int32)
    return high_NM.to(tl.float32) * 256.0 + low_NM.to(tl.float32)
