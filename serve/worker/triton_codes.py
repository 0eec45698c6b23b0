"""Products with two-bit codes: planes go from memory into the tensor cores' registers.

A plane's row is read as 16-bit words of eight codes. Masking bits 2i and up of a word and setting
the exponent of 128 (bfloat16) or 1024 (float16) turns code i into the number OFFSET + 4^(i % 3) c:
three codes fit a mantissa, so eight codes need eight three-input logic operations and two shifts,
and two words are handled at a time. What this adds is taken off again in float32:

    Σ_j c x = Σ_i 4^-(i % 3) (Σ_j (OFFSET + 4^(i % 3) c) x − OFFSET Σ_j x)          j ≡ i mod 8

The sums run over at most 2^24 terms of 24 bits, so that the loss is near 2^-16 of the product.

Shapes: N rows of a tile, J words of a step, M rows of the batch in a group, K columns.
"""

import triton
import triton.language as tl

from deltamux.serve.worker.triton_image import GROUP

_WIDTH: tl.constexpr = tl.constexpr(GROUP)

# Two words in one register: the same eight codes of each, as numbers of the type the magic is of.
_UNPACK = """
{{
.reg .b32 u, v;
shr.u32 u, $8, 6;
shr.u32 v, $8, 12;
lop3.b32 $0, $8, 0x00030003, {0}, 0xEA;
lop3.b32 $1, $8, 0x000C000C, {0}, 0xEA;
lop3.b32 $2, $8, 0x00300030, {0}, 0xEA;
lop3.b32 $3, u, 0x00030003, {0}, 0xEA;
lop3.b32 $4, u, 0x000C000C, {0}, 0xEA;
lop3.b32 $5, u, 0x00300030, {0}, 0xEA;
lop3.b32 $6, v, 0x00030003, {0}, 0xEA;
lop3.b32 $7, v, 0x000C000C, {0}, 0xEA;
}}
"""
_UNPACK_BFLOAT16 = tl.constexpr(_UNPACK.format("0x43004300"))
_UNPACK_FLOAT16 = tl.constexpr(_UNPACK.format("0x64006400"))
_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")


@triton.jit
def _number(words, SHIFT: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr):
    magic: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400
    return ((words >> SHIFT) & MASK | magic).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def unpack(words, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16 words -> eight tensors OFFSET + 4^(i % 3) c_i of DTYPE."""
    if ASSEMBLY and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _UNPACK_BFLOAT16, _REGISTERS, [words], (tl.bfloat16,) * 8, is_pure=True, pack=2
        )
    elif ASSEMBLY:
        return tl.inline_asm_elementwise(
            _UNPACK_FLOAT16, _REGISTERS, [words], (tl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        c0 = _number(words, 0, 0x03, DTYPE)
        c1 = _number(words, 0, 0x0C, DTYPE)
        c2 = _number(words, 0, 0x30, DTYPE)
        c3 = _number(words, 6, 0x03, DTYPE)
        c4 = _number(words, 6, 0x0C, DTYPE)
        c5 = _number(words, 6, 0x30, DTYPE)
        c6 = _number(words, 12, 0x03, DTYPE)
        c7 = _number(words, 12, 0x0C, DTYPE)
        return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def dot(a, b, acc, ASSEMBLY: tl.constexpr):
    """acc + a b; the interpreter has no product of bfloat16."""
    if ASSEMBLY:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _scaled(acc, sum, i: tl.constexpr, at, SHIFT: tl.constexpr, OFFSET: tl.constexpr, zero):
    """Where column `at` is i: what the product of code i is without OFFSET and zero."""
    scale: tl.constexpr = 1.0 / (1 << SHIFT)
    return tl.where(at == i, acc * scale - sum * (OFFSET * scale + zero), 0.0)


@triton.jit
def _starts_of(
    plane, x, row_N, WORDS: tl.constexpr, RUN: tl.constexpr, BJ: tl.constexpr, SPLIT: tl.constexpr
):
    """Addresses of the first words and inputs, the words' places in their row, and i.

    With SPLIT parts the words of a row are cut in as many runs, one for each warp.
    """
    j_J = tl.arange(0, BJ)
    i_8 = tl.arange(0, 8)
    words = plane.to(tl.pointer_type(tl.int16))
    if SPLIT == 1:
        w_at = words + row_N[:, None] * WORDS + j_J[None, :]
        return w_at, x + j_J[:, None] * 8 + i_8[None, :], j_J[None, :], j_J[:, None], i_8[None, :]
    else:
        j_PJ = tl.arange(0, SPLIT)[:, None] * RUN + j_J[None, :]
        w_at = words + row_N[None, :, None] * WORDS + j_PJ[:, None, :]
        x_at = x + j_PJ[:, :, None] * 8 + i_8[None, None, :]
        return w_at, x_at, j_PJ[:, None, :], j_PJ[:, :, None], i_8[None, None, :]


@triton.jit
def _inputs(x_at, j, j_x, i, K: tl.constexpr, EVEN: tl.constexpr):
    """Inputs of a step; nought behind the last column."""
    if EVEN:
        return tl.load(x_at + j * 8)
    elif K % 8 == 0:
        return tl.load(x_at + j * 8, mask=(j + j_x < K // 8) & (i >= 0), other=0.0)
    else:
        return tl.load(x_at + j * 8, mask=(j + j_x) * 8 + i < K, other=0.0)


@triton.jit
def product_one(
    plane, x, zero, row_N, K: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    UNROLL: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Σ_k (code − zero) x of one row of the batch, float32 [N].

    A tensor core's tile is eight columns wide: they hold the columns 8j..8j+7 of x. Eight products,
    one for each code of a word, of which column i is wanted of the i-th: so x is read as it lies.
    A ninth, with ones, is Σ x.
    """
    words: tl.constexpr = (K + 63) // 64 * 8
    step: tl.constexpr = BJ * UNROLL
    run: tl.constexpr = (words + step * SPLIT - 1) // (step * SPLIT) * step
    even: tl.constexpr = run * SPLIT == words
    dtype: tl.constexpr = x.dtype.element_ty
    offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    w_at, x_at, j_w, j_x, i = _starts_of(plane, x, row_N, words, run, BJ, SPLIT)
    if SPLIT == 1:
        a0 = tl.zeros([BN, 8], tl.float32)
        ones = tl.full([BN, BJ], 1.0, tl.float32).to(dtype)
    else:
        a0 = tl.zeros([SPLIT, BN, 8], tl.float32)
        ones = tl.full([SPLIT, BN, BJ], 1.0, tl.float32).to(dtype)
    a1, a2, a3, a4, a5, a6, a7, a8 = a0, a0, a0, a0, a0, a0, a0, a0
    for k in tl.range(0, run, step, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            j = k + u * BJ
            if even:
                w = tl.load(w_at + j)
            else:
                w = tl.load(w_at + j, mask=j + j_w < words, other=0)
            x_8 = _inputs(x_at, j, j_x, i, K, even and K % 64 == 0)
            c0, c1, c2, c3, c4, c5, c6, c7 = unpack(w, dtype, ASSEMBLY)
            a8 = dot(ones, x_8, a8, ASSEMBLY)
            a0 = dot(c0, x_8, a0, ASSEMBLY)
            a1 = dot(c1, x_8, a1, ASSEMBLY)
            a2 = dot(c2, x_8, a2, ASSEMBLY)
            a3 = dot(c3, x_8, a3, ASSEMBLY)
            a4 = dot(c4, x_8, a4, ASSEMBLY)
            a5 = dot(c5, x_8, a5, ASSEMBLY)
            a6 = dot(c6, x_8, a6, ASSEMBLY)
            a7 = dot(c7, x_8, a7, ASSEMBLY)
    sum = _scaled(a0, a8, 0, i, 0, offset, zero) + _scaled(a1, a8, 1, i, 2, offset, zero)
    sum += _scaled(a2, a8, 2, i, 4, offset, zero) + _scaled(a3, a8, 3, i, 0, offset, zero)
    sum += _scaled(a4, a8, 4, i, 2, offset, zero) + _scaled(a5, a8, 5, i, 4, offset, zero)
    sum += _scaled(a6, a8, 6, i, 0, offset, zero) + _scaled(a7, a8, 7, i, 2, offset, zero)
    if SPLIT == 1:
        return tl.sum(sum, 1)
    else:
        return tl.sum(tl.sum(sum, 2), 0)


@triton.jit
def product_many(
    plane, staged, sums, row_N, K: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ_k codes x of a group's rows, float32 [N, M], and Σ_k x [M].

    Args:
        staged: The group's rows of x, transposed: [columns rounded up, M] (see `triton_stage.py`).
        sums: Their sums over the columns of each i % 3: float32 [CHUNKS, 3, M].
    """
    words: tl.constexpr = (K + 63) // 64 * 8
    dtype: tl.constexpr = staged.dtype.element_ty
    offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    m_M = tl.arange(0, _WIDTH)
    j_J = tl.arange(0, BJ)
    w_at = plane.to(tl.pointer_type(tl.int16)) + row_N[:, None] * words + j_J[None, :]
    x_at = staged + j_J[:, None] * (8 * _WIDTH) + m_M[None, :]
    a0 = tl.zeros([BN, _WIDTH], tl.float32)
    a1, a2 = a0, a0
    for j in tl.range(0, words, BJ, num_stages=STAGES):
        if words % BJ == 0:
            w_NJ = tl.load(w_at + j)
        else:
            w_NJ = tl.load(w_at + j, mask=(j + j_J < words)[None, :], other=0)
        c0, c1, c2, c3, c4, c5, c6, c7 = unpack(w_NJ, dtype, ASSEMBLY)
        step = x_at + j * (8 * _WIDTH)
        a0 = dot(c0, tl.load(step), a0, ASSEMBLY)
        a1 = dot(c1, tl.load(step + _WIDTH), a1, ASSEMBLY)
        a2 = dot(c2, tl.load(step + 2 * _WIDTH), a2, ASSEMBLY)
        a0 = dot(c3, tl.load(step + 3 * _WIDTH), a0, ASSEMBLY)
        a1 = dot(c4, tl.load(step + 4 * _WIDTH), a1, ASSEMBLY)
        a2 = dot(c5, tl.load(step + 5 * _WIDTH), a2, ASSEMBLY)
        a0 = dot(c6, tl.load(step + 6 * _WIDTH), a0, ASSEMBLY)
        a1 = dot(c7, tl.load(step + 7 * _WIDTH), a1, ASSEMBLY)
    chunk = tl.arange(0, CHUNK_WIDTH)
    at = sums + chunk[:, None] * (3 * _WIDTH) + m_M[None, :]
    inside = (chunk < CHUNKS)[:, None]
    s0 = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
    s1 = tl.sum(tl.load(at + _WIDTH, mask=inside, other=0.0), 0)
    s2 = tl.sum(tl.load(at + 2 * _WIDTH, mask=inside, other=0.0), 0)
    value = a0 - offset * s0[None, :] + (a1 - offset * s1[None, :]) * 0.25
    return value + (a2 - offset * s2[None, :]) * 0.0625, s0 + s1 + s2
