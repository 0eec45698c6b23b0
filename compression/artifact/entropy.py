"""The entropy code of a matrix of codes: by classes of its lines, runs of the commonest code, deflated.

Low-bit codes of a delta are mostly zero, and how many differs from line to line. Lines, which are either
the rows or the columns, are put into classes (`code_classes.py`). The codes of a class, the matrix's rows one
after another, become symbols for runs of the commonest of them (`run_lengths.py`). The stream is raw deflate
(RFC 1951), its content, with numbers little-endian:

| bytes | content |
|---|---|
| 4, 4 | uint32 rows and columns of the matrix |
| 1 | uint8: 0 where the lines are the rows, 1 where they are the columns |
| 1 | uint8: C, number of classes |
| 7 C | of each class: uint8 lowest, commonest and highest code, uint32 number of symbols |
| lines | uint8 class of each line, from 0; absent where C = 1 |
| the rest | the symbols, one class after another |

Every class starts a deflate block, for Huffman tables of its own; decoders need not know. Streams carry no
checksum: damage that breaks no rule is found by the hash of the file, not here.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch

from deltamux.compression.artifact.code_classes import best_classes
from deltamux.compression.artifact.deflate import ShortestDeflate, inflate_bytes
from deltamux.compression.artifact.run_lengths import Alphabet, Bytes, from_symbols, to_symbols
from deltamux.compression.image.unpack import expand

HEADER = struct.Struct("<IIBB")
RECORD = struct.Struct("<BBBI")


class _Content(NamedTuple):
    """An inflated stream: the axis of its lines, its classes, those of its lines, all symbols."""

    axis: int
    alphabets: list[Alphabet]
    members: Bytes
    symbols: Bytes


def deflate(codes_NK: torch.Tensor) -> torch.Tensor:
    """Entropy-code a matrix of codes from 0 to 255: uint8 [bytes]."""
    codes = codes_NK.to(torch.uint8).contiguous().numpy()
    classes = best_classes(codes)
    header = [HEADER.pack(*codes.shape, classes.axis, classes.count)]
    streams = []
    for index in range(classes.count):
        lines = np.flatnonzero(classes.members == index)
        alphabet, symbols = to_symbols(codes.take(lines, axis=classes.axis).reshape(-1))
        header.append(RECORD.pack(*alphabet))
        streams.append(symbols)
    if classes.count > 1:
        header.append(classes.members.tobytes())
    encoder = ShortestDeflate()
    encoder.add(b"".join(header))
    for symbols in streams:
        encoder.start_block()
        for part in symbols:
            encoder.add(part.data)
    return torch.frombuffer(bytearray(encoder.finish()), dtype=torch.uint8)


def inflate(stream: torch.Tensor, levels: int, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `deflate`: uint8 codes, shape [rows, columns].

    Never inflates more than a matrix of that shape can take.

    Raises:
        ValueError: The stream is damaged, or holds a matrix of another shape or of more levels.
    """
    content = _parsed(_inflated(stream, rows, columns), levels, (rows, columns))
    codes = np.empty((rows, columns), np.uint8)
    commonest = np.array([each.commonest for each in content.alphabets], np.uint8)[content.members]
    codes[:] = np.expand_dims(commonest, 1 - content.axis)
    start = 0
    for index, alphabet in enumerate(content.alphabets):
        symbols = content.symbols[start : start + alphabet.length]
        start += alphabet.length
        lines = content.members == index
        try:
            if not expand(symbols, alphabet, lines, content.axis, codes):
                _expand(symbols, alphabet, lines, content.axis, codes)
        except ValueError as error:
            raise _damaged(f"class {index} has {error}") from error
    return torch.from_numpy(codes)


def _expand(symbols: Bytes, alphabet: Alphabet, lines: Bytes, axis: int, codes_NK: Bytes) -> None:
    """As `expand`, in numpy."""
    places = np.flatnonzero(lines)
    rows, columns = codes_NK.shape
    shape = (len(places), columns) if axis == 0 else (rows, len(places))
    part = from_symbols(symbols, alphabet, shape[0] * shape[1]).reshape(shape)
    codes_NK[places if axis == 0 else (slice(None), places)] = part


def _inflated(stream: torch.Tensor, rows: int, columns: int) -> Bytes:
    # A line is in one class, no class is empty, and no symbol stands for less than a code.
    most = HEADER.size + (RECORD.size + 1) * max(rows, columns, 1) + rows * columns
    try:
        content = inflate_bytes(stream, most)
    except zlib.error as error:
        raise _damaged(str(error)) from error
    if content is None:
        raise _damaged(f"it does not end with the {most} bytes that {rows} by {columns} may take")
    return np.frombuffer(content, np.uint8)


def _parsed(content: Bytes, levels: int, shape: tuple[int, int]) -> _Content:
    if len(content) < HEADER.size:
        raise _damaged(f"{len(content)} bytes are no header")
    *found, axis, count = HEADER.unpack(content[: HEADER.size].data)
    if tuple(found) != shape:
        raise _damaged(f"it holds {found[0]} by {found[1]} codes, not {shape[0]} by {shape[1]}")
    if axis > 1 or count == 0:
        raise _damaged(f"it has {count} classes along axis {axis}")
    lines = shape[axis]
    behind_records = HEADER.size + RECORD.size * count
    behind_header = behind_records + (lines if count > 1 else 0)
    if len(content) < behind_header:
        raise _damaged(f"{len(content)} bytes are no header of {count} classes")
    records = RECORD.iter_unpack(content[HEADER.size : behind_records].data)
    alphabets = [Alphabet(*record) for record in records]
    for alphabet in alphabets:
        if alphabet.highest >= levels:
            raise _damaged(f"code {alphabet.highest} exceeds {levels} levels")
        if not alphabet.lowest <= alphabet.commonest <= alphabet.highest:
            raise _damaged(f"code {alphabet.commonest} is outside of its class")
    symbols = content[behind_header:]
    wanted = sum(alphabet.length for alphabet in alphabets)
    if wanted != len(symbols):
        raise _damaged(f"it holds {len(symbols)} symbols, not {wanted}")
    members = content[behind_records:behind_header] if count > 1 else np.zeros(lines, np.uint8)
    if members.max(initial=0) >= count:
        raise _damaged(f"a line is in class {members.max()} of {count}")
    return _Content(axis, alphabets, members, symbols)


def _damaged(finding: str) -> ValueError:
    return ValueError(
        f"a stream of codes is damaged or of another matrix ({finding}): copy the file again"
    )
