"""A fine-tuned tensor stored exactly, as what its bits differ from the base's.

The bit patterns of both are read as integers in the order of the values, so that a small change is
a small difference, and the differences are entropy coded: the idea of FM-Delta (Ning et al.,
NeurIPS 2024, doi 10.52202/079017-2134), whose map of floats to integers is that of fpzip (Lindstrom
and Isenburg 2006). For bits b of n, taken as a signed integer,

    order(b) = b xor ((b >> n − 1) and 2^(n−1) − 1)
    d = order(tuned) − order(base)   mod 2^n ,     z = (d << 1) xor (d >> n − 1)

order() is its own inverse, so that NaN payloads, infinities and −0.0 come back too; z is small where
|d| is. The bytes of z are grouped into planes, lowest first, because the high ones hardly differ
from zero (ZipNN groups bytes likewise, Hershcovitch et al. 2024, arXiv 2411.05239). Layout, with
P = n / 8 planes:

| bytes | content |
|---|---|
| 8 P | byte length of each plane's stream, little-endian uint64 |
| the rest | the streams: raw deflate (RFC 1951), one byte of plane an element, row by row |

A plane of zeros has no stream: its length is 0. Streams carry no checksum: damage that leaves the
lengths right is found by the hash of the file, not here.
"""

import struct
import zlib

import torch

from deltamux.compression.artifact.deflate import ShortestDeflate, inflate_bytes

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
CHUNK_ELEMENTS = 2**20


def encode_exact(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Code a tensor relative to its base.

    Args:
        tuned: The expert's tensor: bfloat16, float16 or float32.
        base: The base's, of the same dtype and shape.

    Returns:
        uint8 [bytes], see the module's layout.

    Raises:
        ValueError: Another dtype, or the two differ in dtype or shape.
    """
    if (tuned.dtype, tuned.shape) != (base.dtype, base.shape):
        raise ValueError(
            "an exact difference needs one dtype and shape, got "
            f"{tuned.dtype} {list(tuned.shape)} for the expert and {base.dtype} "
            f"{list(base.shape)} for the base: save both alike"
        )
    tuned_bits, base_bits = _bits(tuned), _bits(base)
    planes = [_PlaneEncoder() for _ in range(base.element_size())]
    for chunk in _chunks(base.numel()):
        zigzag = _zigzag(_order(tuned_bits[chunk]) - _order(base_bits[chunk]))
        for index, plane in enumerate(planes):
            plane.add(((zigzag >> (8 * index)) & 0xFF).to(torch.uint8))
    streams = [plane.finish() for plane in planes]
    header = struct.pack(f"<{len(streams)}Q", *map(len, streams))
    return torch.frombuffer(bytearray(b"".join([header, *streams])), dtype=torch.uint8)


def decode_exact(coded: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode_exact`: the expert's tensor, bit for bit.

    Never inflates more than a tensor of the base's size.

    Args:
        coded: uint8 [bytes].
        base: The tensor it was coded against.

    Raises:
        ValueError: The bytes are damaged or belong to a tensor of another size.
    """
    base_bits = _bits(base)
    zigzag = torch.zeros_like(base_bits)
    for index, stream in enumerate(_split(coded, base.element_size())):
        if len(stream) == 0:
            continue
        plane = _inflate(stream, base.numel())
        for chunk in _chunks(base.numel()):
            zigzag[chunk] |= plane[chunk].to(zigzag.dtype) << (8 * index)
    for chunk in _chunks(base.numel()):
        zigzag[chunk] = _order(_unzigzag(zigzag[chunk]) + _order(base_bits[chunk]))
    return zigzag.view(base.dtype).view(base.shape)


class _PlaneEncoder:
    """Codes one plane; one that is zero throughout has no stream."""

    def __init__(self) -> None:
        self._encoder = ShortestDeflate()
        self._changed = False

    def add(self, plane: torch.Tensor) -> None:
        """Code the next bytes of the plane, uint8 [elements]."""
        self._changed = self._changed or bool(plane.any())
        self._encoder.add(plane.numpy().data)

    def finish(self) -> bytes | bytearray:
        """The stream; empty where the plane is zero throughout."""
        return self._encoder.finish() if self._changed else b""


def _split(coded: torch.Tensor, planes: int) -> list[torch.Tensor]:
    header_bytes = 8 * planes
    if coded.dtype != torch.uint8 or coded.dim() != 1 or len(coded) < header_bytes:
        raise _damaged(f"{coded.dtype} {list(coded.shape)} holds no lengths of {planes} planes")
    lengths = struct.unpack(f"<{planes}Q", coded[:header_bytes].numpy().tobytes())
    if sum(lengths) != len(coded) - header_bytes:
        raise _damaged(f"{len(coded) - header_bytes} bytes for planes of {sum(lengths)}")
    return list(coded[header_bytes:].contiguous().split(lengths))


def _inflate(stream: torch.Tensor, num_bytes: int) -> torch.Tensor:
    try:
        plane = inflate_bytes(stream, num_bytes)
    except zlib.error as error:
        raise _damaged(str(error)) from error
    if plane is None or len(plane) != num_bytes:
        raise _damaged(f"a plane does not hold {num_bytes} bytes")
    return torch.frombuffer(plane, dtype=torch.uint8)


def _damaged(finding: str) -> ValueError:
    return ValueError(
        f"an exact difference is damaged or of another tensor ({finding}): copy or compress it again"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in INTEGERS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGERS)
        raise ValueError(
            f"an exact difference takes {names}, got {tensor.dtype}: convert both tensors first"
        )
    return tensor.reshape(-1).view(INTEGERS[tensor.dtype])


def _chunks(elements: int) -> list[slice]:
    return [slice(start, start + CHUNK_ELEMENTS) for start in range(0, elements, CHUNK_ELEMENTS)]


def _order(bits: torch.Tensor) -> torch.Tensor:
    limits = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (limits.bits - 1)) & limits.max)


def _zigzag(difference: torch.Tensor) -> torch.Tensor:
    sign_bit = torch.iinfo(difference.dtype).bits - 1
    return (difference << 1) ^ (difference >> sign_bit)


def _unzigzag(zigzag: torch.Tensor) -> torch.Tensor:
    # The mask clears the sign that >> shifts in.
    magnitude = (zigzag >> 1) & torch.iinfo(zigzag.dtype).max
    return magnitude ^ -(zigzag & 1)
