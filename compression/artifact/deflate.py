"""Raw deflate streams (RFC 1951): the last stage of entropy-coded matrices and of exact differences."""

import zlib
from importlib import import_module
from types import ModuleType

import torch


def _inflater() -> ModuleType:
    """ISA-L, which takes a third of zlib's time, where its bindings are installed."""
    try:
        return import_module("isal.isal_zlib")
    except ImportError:
        return zlib


INFLATER = _inflater()

# Repeated bytes pay where nearly all codes are zero, plain Huffman codes elsewhere. Strings of codes repeat
# only by chance: deflate's default search for them made streams of real deltas 4 to 15 % larger.
DEFLATE_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)


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
    decoder = INFLATER.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than wanted, never all that a damaged stream might grow to.
        content = decoder.decompress(stream.numpy().data, most + 1)
    except INFLATER.error as error:
        raise zlib.error(str(error)) from error
    whole = len(content) <= most and decoder.eof and not decoder.unused_data
    return bytearray(content) if whole else None
