"""Packing of unsigned codes into words, row by row.

- 1, 2, 4 and 8 bits: as compressed-tensors packs them. 32/b codes a 32-bit word, the first code in
  the lowest bits, rows padded with zeros to a whole word.
- 3 bits: a 2-bit plane of the low bits followed by a 1-bit plane of the high bits, each packed as
  above, so that every code is read by aligned loads.
- ternary: codes 0, 1, 2 as base-3 digits, five a byte (3^5 = 243 ≤ 256), the first code the lowest
  digit, rows padded with zeros to a whole byte: 1.6 bits a code.
- deflated: all codes of a matrix, row after row, as base-L digits of bytes (L levels, as many digits as
  L^n ≤ 256 allows, the first the lowest, the last byte filled up with the level nearest to zero), the
  bytes as one raw deflate stream (RFC 1951) of run lengths and Huffman codes. From half a bit a code
  up this is within a few per cent of the entropy; below, where bytes of zeros only repeat, it takes
  up to half more.

Shapes: N rows, K codes a row, W words a row.
"""

import zlib

import torch

WORD_BITS = 32
TRITS_PER_BYTE = 5
# Runs pay where nearly all codes are zero, plain Huffman codes where fewer are. Strings of codes repeat
# only by chance: deflate's default search for them made streams of real deltas up to a third larger,
# at a tenth of the speed.
DEFLATE_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)
_POWERS_OF_3 = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32)


def pack_bits(codes_NK: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Pack codes of 1, 2, 3, 4 or 8 bits.

    Args:
        codes_NK: Unsigned codes below 2**num_bits, any integer dtype.
        num_bits: Width of a code.

    Returns:
        int32 words, shape [N, words_per_row(K, num_bits)].
    """
    if num_bits == 3:
        low = pack_bits(codes_NK & 3, 2)
        high = pack_bits(codes_NK >> 2, 1)
        return torch.cat([low, high], dim=1)
    per_word = WORD_BITS // num_bits
    rows, columns = codes_NK.shape
    padded = torch.zeros(rows, -(-columns // per_word) * per_word, dtype=torch.int64)
    padded[:, :columns] = codes_NK
    shifts = torch.arange(per_word) * num_bits
    words = (padded.view(rows, -1, per_word) << shifts).sum(dim=-1)
    # Values at or above 2**31 become the negative int32 of the same bits.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words_NW: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 codes, shape [N, columns]."""
    if num_bits == 3:
        split = words_per_row(columns, 2)
        low = unpack_bits(words_NW[:, :split], 2, columns)
        high = unpack_bits(words_NW[:, split:], 1, columns)
        return low | (high << 2)
    shifts = torch.arange(WORD_BITS // num_bits, dtype=torch.int32) * num_bits
    codes: torch.Tensor = (words_NW.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    return codes.to(torch.uint8).view(words_NW.shape[0], -1)[:, :columns].contiguous()


def words_per_row(columns: int, num_bits: int) -> int:
    """int32 words that a row of codes takes."""
    if num_bits == 3:
        return words_per_row(columns, 2) + words_per_row(columns, 1)
    return -(-columns // (WORD_BITS // num_bits))


def pack_trits(codes_NK: torch.Tensor) -> torch.Tensor:
    """Pack codes 0, 1, 2 five a byte: uint8, shape [N, ceil(K / 5)]."""
    rows, columns = codes_NK.shape
    padded = torch.zeros(rows, -(-columns // TRITS_PER_BYTE) * TRITS_PER_BYTE, dtype=torch.int32)
    padded[:, :columns] = codes_NK
    digits = padded.view(rows, -1, TRITS_PER_BYTE)
    return (digits * _POWERS_OF_3).sum(dim=-1).to(torch.uint8)


def unpack_trits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_trits`: uint8 codes, shape [N, columns]."""
    digits = packed.to(torch.int32).unsqueeze(-1) // _POWERS_OF_3 % 3
    return digits.to(torch.uint8).view(packed.shape[0], -1)[:, :columns].contiguous()


def digits_per_byte(levels: int) -> int:
    """How many base-`levels` digits a byte holds."""
    digits = 1
    while levels ** (digits + 1) <= 256:
        digits += 1
    return digits


class ShortestDeflate:
    """Deflates bytes with every strategy and gives the shortest raw stream."""

    def __init__(self) -> None:
        self._streams = [bytearray() for _ in DEFLATE_STRATEGIES]
        self._encoders = [
            zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            for strategy in DEFLATE_STRATEGIES
        ]

    def add(self, content: torch.Tensor) -> None:
        """Code the next bytes, uint8 [bytes]."""
        for stream, encoder in zip(self._streams, self._encoders, strict=True):
            stream.extend(encoder.compress(content.numpy().data))

    def finish(self) -> bytearray:
        """The stream."""
        for stream, encoder in zip(self._streams, self._encoders, strict=True):
            stream.extend(encoder.flush())
        return min(self._streams, key=len)


def inflate_bytes(stream: torch.Tensor, num_bytes: int) -> bytearray | None:
    """The content of a raw deflate stream; None unless it ends with exactly `num_bytes`.

    Raises:
        zlib.error: It is no such stream.
    """
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    # One byte more than wanted, never all that a damaged stream might grow to.
    content = decoder.decompress(stream.numpy().tobytes(), num_bytes + 1)
    whole = len(content) == num_bytes and decoder.eof and not decoder.unused_data
    return bytearray(content) if whole else None


def deflate(codes_NK: torch.Tensor, levels: int, fill: int) -> torch.Tensor:
    """Entropy-code a matrix of codes below `levels`: uint8 [bytes]."""
    digits = digits_per_byte(levels)
    flat = codes_NK.reshape(-1).to(torch.uint8)
    short = -len(flat) % digits
    padded = torch.cat([flat, flat.new_full((short,), fill)]).view(-1, digits)
    packed = padded[:, -1].clone()
    for digit in reversed(range(digits - 1)):
        packed = packed.mul_(levels).add_(padded[:, digit])
    encoder = ShortestDeflate()
    encoder.add(packed)
    return torch.frombuffer(bytearray(encoder.finish()), dtype=torch.uint8)


def inflate(stream: torch.Tensor, levels: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `deflate`: uint8 codes, shape [rows, columns].

    Raises:
        ValueError: The stream is damaged, or holds another number of codes.
    """
    digits = digits_per_byte(levels)
    count = -(-rows * columns // digits)
    try:
        content = inflate_bytes(stream, count)
    except zlib.error as error:
        raise ValueError(f"a stream of codes is damaged ({error}): copy the file again") from error
    if content is None:
        raise ValueError(
            f"a stream of codes does not end with the {count} bytes that are wanted: copy the file "
            "again"
        )
    # Not uint8, in which 256 levels would count as none.
    packed = torch.frombuffer(content, dtype=torch.uint8).to(torch.int16)
    flat = torch.empty(count, digits, dtype=torch.uint8)
    for digit in range(digits):
        flat[:, digit] = packed % levels
        packed = packed // levels
    if int(flat.max()) >= levels or bool(packed.any()):
        raise ValueError(f"a stream of codes exceeds {levels} levels: copy the file again")
    return flat.view(-1)[: rows * columns].view(rows, columns)


def pack_bitmap(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean vector [R] eight a byte, the first in the lowest bit: uint8 [ceil(R / 8)]."""
    padded = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.int32)
    padded[: len(mask)] = mask
    return (padded.view(-1, 8) << torch.arange(8)).sum(dim=-1).to(torch.uint8)


def unpack_bitmap(packed: torch.Tensor, length: int) -> torch.Tensor:
    """The inverse of `pack_bitmap`: bool [length]."""
    bits = (packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8)) & 1
    return bits.view(-1)[:length].bool()
