"""A matrix of codes as one or two planes of two bits, and escapes for the codes that do not fit.

Most codes of a delta are nought and nearly all others its neighbours: of a 1-bit expert 76 % are 0, 23 % ±1,
0.7 % beyond. Four neighbouring codes w … w + 3 fit into a plane; what lies outside is clipped, and an escape
says how much was cut off. Two planes hold all sixteen codes; no plane and escapes alone are a sparse matrix. Of these
forms the smallest is taken, each is exact:

    Δ̂_ij = s_i ( c_ij − z + Σ d_ij ) ,   c = plane 0 + 4 · plane 1 ,   z = zero point − w

- plane: column j of a row is in bits 2 (j mod 4) and up of byte ⌊j / 4⌋; rows are padded to 16 bytes.
- escapes: uint16, the low 12 bits a column within its block of 4096, the high 4 bits d + 8 with −8 ≤ d ≤ 7; by row,
  block and column. A difference beyond takes several. Code and escapes of a place come to −16 … 31. `starts` [R · blocks + 1] says where each row's block begins.

Shapes: R coded rows, K columns, L codes that occur, E escapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltamux.compression.image.layout import (
    Bytes,
    Field,
    Record,
    float_bits,
    section_bytes,
)
from deltamux.compression.image.unpack import count_codes, pack_codes

CODES_PER_BYTE = 4
ROW_MULTIPLE = 16  # bytes: one vector of 128 bits
PLANE_CODES = 4
MOST_CODES = 16  # of two planes
BLOCK_COLUMNS = 4096
ESCAPE_BITS = 12
LOWEST_DIFFERENCE, HIGHEST_DIFFERENCE = -8, 7


@dataclass(frozen=True)
class Form:
    """How a matrix of codes is laid out.

    Attributes:
        planes: 0, 1 or 2.
        window: The first code of the plane's four (one plane), or the code of nought (no plane).
        escapes: Escapes that are needed.
        num_bytes: Bytes of planes, starts and escapes in an image.
    """

    planes: int
    window: int
    escapes: int
    num_bytes: int


def row_stride(columns: int) -> int:
    """Bytes of a row of a plane."""
    per_multiple = ROW_MULTIPLE * CODES_PER_BYTE
    return -(-columns // per_multiple) * ROW_MULTIPLE


def smallest_form(counts_L: npt.NDArray[np.int64], rows: int, columns: int, zero: float) -> Form:
    """The form of fewest bytes for codes that occur so often.

    Args:
        counts_L: How many elements have code 0, 1, …, at most 15.
        rows: R.
        columns: K.
        zero: The zero point; between two codes, no code stands for nought.
    """
    return min(_forms(counts_L, rows, columns, zero), key=lambda form: form.num_bytes)


def _forms(counts_L: npt.NDArray[np.int64], rows: int, columns: int, zero: float) -> Iterator[Form]:
    plane = section_bytes(rows * row_stride(columns))
    starts = section_bytes(4 * (rows * blocks(columns) + 1))
    yield Form(2, 0, 0, 2 * plane)
    counts: list[int] = counts_L.tolist()
    for window in range(max(1, len(counts) - PLANE_CODES + 1)):
        escapes = _count_escapes(counts, window, window + PLANE_CODES - 1)
        yield _escaped(1, window, escapes, plane, starts)
    if zero == int(zero):
        yield _escaped(0, int(zero), _count_escapes(counts, int(zero), int(zero)), 0, starts)


def _escaped(planes: int, window: int, escapes: int, plane: int, starts: int) -> Form:
    rest = starts + section_bytes(2 * escapes) if escapes else 0
    return Form(planes, window, escapes, plane + rest)


def _count_escapes(counts: list[int], lowest: int, highest: int) -> int:
    """How many escapes codes outside of a window take: one each step of what an escape can say."""
    below = sum(
        count * -((code - lowest) // -LOWEST_DIFFERENCE)
        for code, count in enumerate(counts[:lowest])
    )
    above = sum(
        count * -((highest - code) // HIGHEST_DIFFERENCE)
        for code, count in enumerate(counts)
        if code > highest
    )
    return below + above


def blocks(columns: int) -> int:
    """Blocks of columns that escapes are counted in."""
    return -(-columns // BLOCK_COLUMNS)


def code_record(codes_RK: Bytes, zero: float) -> Record:
    """The record of a matrix of codes, uint8 [R, K] below 16, without its steps."""
    rows, columns = codes_RK.shape
    form = smallest_form(code_counts(codes_RK, MOST_CODES), rows, columns, zero)
    numbers = {
        Field.PLANES: form.planes,
        Field.ROWS: rows,
        Field.COLUMNS: columns,
        Field.STRIDE: row_stride(columns),
        Field.BLOCKS: blocks(columns),
        Field.ZERO: float_bits(zero - form.window),
    }
    record = Record(numbers, {})
    planes, starts, escapes = _packed(codes_RK, form)
    for field, plane in zip((Field.PLANE0, Field.PLANE1), planes, strict=False):
        record.sections[field] = plane
    if form.escapes:
        record.sections[Field.STARTS] = starts
        record.sections[Field.ESCAPES] = escapes
    return record


Packed = tuple[list[Bytes], npt.NDArray[np.uint32], npt.NDArray[np.uint16]]


def _packed(codes_RK: Bytes, form: Form) -> Packed:
    """Planes, starts and escapes of codes in a form."""
    rows, columns = codes_RK.shape
    packed = pack_codes(
        codes_RK,
        planes=form.planes,
        window=form.window,
        stride=row_stride(columns),
        starts=rows * blocks(columns) + 1 if form.escapes else 0,
        escapes=form.escapes,
    )
    return packed or _packed_by_numpy(codes_RK, form)


def _packed_by_numpy(codes_RK: Bytes, form: Form) -> Packed:
    nothing = np.zeros(0, np.uint32), np.zeros(0, np.uint16)
    if form.planes == 2:
        return [pack_plane(codes_RK & np.uint8(3)), pack_plane(codes_RK >> np.uint8(2))], *nothing
    highest = form.window + (PLANE_CODES - 1 if form.planes else 0)
    clipped_RK = codes_RK.clip(np.uint8(form.window), np.uint8(highest))
    planes = [pack_plane(clipped_RK - np.uint8(form.window))] if form.planes else []
    return planes, *(_escapes(codes_RK, clipped_RK) if form.escapes else nothing)


def code_counts(codes_RK: Bytes, levels: int) -> npt.NDArray[np.int64]:
    """How many elements have code 0, 1, …, levels − 1; passes over bytes are faster than one over wide numbers."""
    found = count_codes(codes_RK)
    if found is None:
        found = np.array([np.count_nonzero(codes_RK == level) for level in range(levels)], np.int64)
    return found[:levels]


def pack_plane(codes_RK: Bytes) -> Bytes:
    """Codes 0 to 3, four a byte: uint8 [R, stride]."""
    rows, columns = codes_RK.shape
    stride = row_stride(columns)
    wide = np.zeros((rows, stride * CODES_PER_BYTE), np.uint8)
    wide[:, :columns] = codes_RK
    packed = np.zeros((rows, stride), np.uint8)
    for place in range(CODES_PER_BYTE):
        packed |= wide[:, place::CODES_PER_BYTE] << np.uint8(2 * place)
    return packed


def unpack_plane(plane_RB: Bytes, columns: int) -> Bytes:
    """The inverse of `pack_plane`: uint8 [R, columns]."""
    wide = np.empty((len(plane_RB), plane_RB.shape[1] * CODES_PER_BYTE), np.uint8)
    for place in range(CODES_PER_BYTE):
        wide[:, place::CODES_PER_BYTE] = plane_RB >> np.uint8(2 * place) & np.uint8(3)
    return wide[:, :columns]


def _escapes(
    codes_RK: Bytes, clipped_RK: Bytes
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
    rows, columns = codes_RK.shape
    places = np.flatnonzero(codes_RK != clipped_RK)
    left = codes_RK.reshape(-1)[places].astype(np.int64) - clipped_RK.reshape(-1)[places]
    found, order = [], []
    while len(places):
        part = left.clip(LOWEST_DIFFERENCE, HIGHEST_DIFFERENCE)
        column = places % columns % BLOCK_COLUMNS
        found.append(column | part - LOWEST_DIFFERENCE << ESCAPE_BITS)
        order.append(places)
        left -= part
        places, left = places[left != 0], left[left != 0]
    place = np.concatenate(order)
    ascending = place.argsort(kind="stable")
    entries = np.concatenate(found)[ascending].astype(np.uint16)
    place = place[ascending]
    group = place // columns * blocks(columns) + place % columns // BLOCK_COLUMNS
    counts = np.bincount(group, minlength=rows * blocks(columns))
    starts = np.zeros(len(counts) + 1, np.uint32)
    starts[1:] = counts.cumsum()
    return starts, entries
