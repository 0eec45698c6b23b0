"""Packing of unsigned codes into words, row by row.

- 1, 2, 4 and 8 bits: as compressed-tensors packs them. 32/b codes a 32-bit word, the first code in
  the lowest bits, rows padded with zeros to a whole word.
- 3 bits: a 2-bit plane of the low bits followed by a 1-bit plane of the high bits, each packed as
  above, so that every code is read by aligned loads.
- ternary: codes 0, 1, 2 as base-3 digits, five a byte (3^5 = 243 ≤ 256), the first code the lowest
  digit, rows padded with zeros to a whole byte: 1.6 bits a code.

Raw deflate streams (RFC 1951), of entropy-coded matrices and of exact differences, are written and read here too.

Shapes: N rows, K codes a row, W words a row.
"""

import zlib

import torch

WORD_BITS = 32
TRITS_PER_BYTE = 5
# Repeated bytes pay where nearly all codes are zero, plain Huffman codes elsewhere. Strings of codes repeat
# only by chance: deflate's default search for them made streams of real deltas 4 to 15 % larger.
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


class ShortestDeflate:
    """Deflates bytes with every strategy and gives the shortest raw stream."""

    def __init__(self) -> None:
        self._streams = [bytearray() for _ in DEFLATE_STRATEGIES]
        self._encoders = [
            zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            for strategy in DEFLATE_STRATEGIES
        ]

    def add(self, content: bytes | memoryview) -> None:
        """Code the next bytes."""
        for stream, encoder in zip(self._streams, self._encoders, strict=True):
            stream.extend(encoder.compress(content))

    def start_block(self) -> None:
        """Give the bytes that follow Huffman tables of their own."""
        for stream, encoder in zip(self._streams, self._encoders, strict=True):
            stream.extend(encoder.flush(zlib.Z_BLOCK))

    def finish(self) -> bytearray:
        """The stream."""
        for stream, encoder in zip(self._streams, self._encoders, strict=True):
            stream.extend(encoder.flush())
        return min(self._streams, key=len)


def inflate_bytes(stream: torch.Tensor, most: int) -> bytearray | None:
    """The content of a raw deflate stream; None unless it ends with `most` bytes or fewer.

    Raises:
        zlib.error: It is no such stream.
    """
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    # One byte more than wanted, never all that a damaged stream might grow to.
    content = decoder.decompress(stream.numpy().tobytes(), most + 1)
    whole = len(content) <= most and decoder.eof and not decoder.unused_data
    return bytearray(content) if whole else None


def pack_bitmap(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean vector [R] eight a byte, the first in the lowest bit: uint8 [ceil(R / 8)]."""
    padded = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.int32)
    padded[: len(mask)] = mask
    return (padded.view(-1, 8) << torch.arange(8)).sum(dim=-1).to(torch.uint8)


def unpack_bitmap(packed: torch.Tensor, length: int) -> torch.Tensor:
    """The inverse of `pack_bitmap`: bool [length]."""
    bits = (packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8)) & 1
    return bits.view(-1)[:length].bool()
