"""Codes out of an entropy-coded stream, and into planes, at the speed of compiled code.

Each function does what its counterpart in numpy does (`artifact/run_lengths.py`, `planes.py`); without the
compiled library it says so by returning None or False, and the counterpart is used.
"""

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deltamux.compression.artifact.run_lengths import Alphabet
from deltamux.compression.image.native import load_library

logger = logging.getLogger(__name__)

LIBRARY = "_unpack"
Bytes = npt.NDArray[np.uint8]


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, and a line in the log, where there are none."""
    try:
        found = load_library(Path(__file__).parent, LIBRARY)
    except OSError as error:
        logger.warning("experts are unpacked by numpy, slowly: %s", error)
        return None
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.deltamux_expand.argtypes = [
        *(pointer, number, small, small, small, pointer, number, small, number, number, pointer)
    ]
    found.deltamux_count.argtypes = [pointer, number, pointer]
    found.deltamux_count.restype = None
    found.deltamux_pack.argtypes = [
        *(pointer, number, number, small, small, number, pointer, pointer, pointer, pointer, number)
    ]
    found.deltamux_pack.restype = number
    return found


def expand(symbols: Bytes, alphabet: Alphabet, lines: Bytes, axis: int, codes_NK: Bytes) -> bool:
    """Put the codes of one class into its lines; false if nothing is compiled.

    Args:
        symbols: Of the class, uint8 [symbols].
        alphabet: Of the class.
        lines: bool [N] or [K], which rows (axis 0) or columns (axis 1) are the class's.
        axis: What its lines are.
        codes_NK: uint8, contiguous; lines of the class hold its commonest code, and get their others.

    Raises:
        ValueError: They are not the symbols of so many codes.
    """
    compiled = library()
    if compiled is None:
        return False
    places = np.flatnonzero(lines).astype(np.int32)
    size = len(places) * codes_NK.shape[1 - axis]
    if len(symbols) == 0:
        return True
    if alphabet.others == 0:
        raise ValueError(f"{len(symbols)} symbols for codes that are all the same")
    symbols = np.ascontiguousarray(symbols)
    damage = compiled.deltamux_expand(
        symbols.ctypes.data,
        len(symbols),
        alphabet.lowest,
        alphabet.commonest,
        alphabet.highest,
        places.ctypes.data,
        len(places),
        axis,
        *codes_NK.shape,
        codes_NK.ctypes.data,
    )
    if damage == 1:
        raise ValueError(f"symbol {symbols.max()} of {alphabet.escape + 1}")
    if damage:
        raise ValueError(f"symbols for more than {size} codes")
    return True


def count_codes(codes: Bytes) -> npt.NDArray[np.int64] | None:
    """How often each of the 256 codes occurs, int64 [256]."""
    compiled = library()
    if compiled is None:
        return None
    codes = np.ascontiguousarray(codes)
    counts = np.zeros(256, np.int64)
    compiled.deltamux_count(codes.ctypes.data, codes.size, counts.ctypes.data)
    return counts


def pack_codes(
    codes_RK: Bytes, *, planes: int, window: int, stride: int, starts: int, escapes: int
) -> tuple[list[Bytes], npt.NDArray[np.uint32], npt.NDArray[np.uint16]] | None:
    """Planes [R, stride], starts and escapes of a matrix of codes below 16.

    Args:
        codes_RK: The codes.
        planes: 0, 1 or 2.
        window: The first code of one plane, or the code of nought without one.
        stride: Bytes of a plane's row.
        starts: Entries that `starts` has; 0: nothing escapes.
        escapes: How many escapes there are.
    """
    compiled = library()
    if compiled is None:
        return None
    codes_RK = np.ascontiguousarray(codes_RK)
    rows, columns = codes_RK.shape
    packed = [np.zeros((rows, stride), np.uint8) for _ in range(planes)]
    begins, entries = np.zeros(starts, np.uint32), np.empty(escapes, np.uint16)
    addresses = [*(plane.ctypes.data for plane in packed), None, None][:2]
    found = compiled.deltamux_pack(
        codes_RK.ctypes.data,
        rows,
        columns,
        planes,
        window,
        stride,
        *addresses,
        begins.ctypes.data if starts else None,
        entries.ctypes.data,
        escapes,
    )
    assert found == escapes, f"{found} escapes where {escapes} were counted"
    return packed, begins, entries
