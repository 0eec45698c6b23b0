"""The product with slots' deltas as layers call it: compiled where that is possible, else in torch.

Which of the two, and which instructions, is chosen once a process and logged. A layer asks for its
product once, when its slots exist, and calls it in every step; records are read from the slots at every
call, so that a swap is a copy of bytes and nothing else.
"""

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch

from deltamux.compression.image.native import load_library
from deltamux.serve.worker import product

logger = logging.getLogger(__name__)

# What to use instead of the fastest: amx, vnni, avx512, avx2, neon, scalar; or torch.
KERNEL_VARIABLE = "DELTAMUX_CPU_KERNEL"
LIBRARY = "_product"
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MOST_SLICES = 8
HUGE_PAGE = 2**21
# What an OpenMP runtime is asked for; libgomp and libiomp5 both have them.
TEAM_FUNCTIONS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_max_threads")

LinearProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Linear(ctypes.Structure):
    """`Linear` of product.cpp."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("num_slots", ctypes.c_int32),
        ("num_slices", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("entries", ctypes.c_int32 * MOST_SLICES),
        ("rows", ctypes.c_int32 * MOST_SLICES),
    )


class Table(ctypes.Structure):
    """`Table` of embedding.h."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("num_slots", ctypes.c_int32),
        ("entry", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("wide_ids", ctypes.c_int32),
    )


def product_name() -> str:
    """What computes the products in this process: an instruction set, or torch."""
    library = _library()
    return "torch" if library is None else str(library.kernel)


def linear_product(
    slots: torch.Tensor, entries: Sequence[int], slice_rows: Sequence[int], columns: int
) -> LinearProduct:
    """The product of one linear: `add(y_TN, x_TK, order, starts)`, see `product.add_linear`.

    Args:
        slots: uint8 [S, bytes] on the CPU, where it will stay, aligned to 64 bytes.
        entries: The record of each slice of the linear.
        slice_rows: Outputs of each slice.
        columns: K.

    Returns:
        A function that adds to `y` in place; y and x have one dtype and rows whose elements are next
        to each other, order and starts are int64 on the CPU. It raises ValueError where `order` names
        a row that the batch has not.
    """
    library = _library()
    if library is None:
        return partial(product.add_linear, slots, tuple(entries), tuple(slice_rows))
    _check(slots)
    indices = (ctypes.c_int32 * MOST_SLICES)(*entries)
    rows = (ctypes.c_int32 * MOST_SLICES)(*slice_rows)
    place = slots.data_ptr(), slots.stride(0), len(slots), len(entries), columns
    layers = {dtype: Linear(*place, code, indices, rows) for dtype, code in TYPES.items()}
    add = _linear_call(library.add_linear, layers, columns, sum(slice_rows))
    # The addresses are those of structures and slots that nothing else need keep.
    add.kept = (layers, slots)  # type: ignore[attr-defined]
    return add


def _linear_call(
    add_linear: Callable[..., int], layers: dict[torch.dtype, Linear], columns: int, outputs: int
) -> LinearProduct:
    addresses = {dtype: ctypes.addressof(layer) for dtype, layer in layers.items()}

    def add(
        y_TN: torch.Tensor, x_TK: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> None:
        rows, found = x_TK.shape
        x_stride, x_step = x_TK.stride()
        y_stride, y_step = y_TN.stride()
        assert (found, y_TN.shape[1], x_step, y_step) == (columns, outputs, 1, 1), (
            "rows of a product must be whole and their elements next to each other"
        )
        assert x_TK.dtype is y_TN.dtype
        failed = add_linear(
            addresses[x_TK.dtype],
            y_TN.data_ptr(),
            x_TK.data_ptr(),
            rows,
            y_stride,
            x_stride,
            order.data_ptr(),
            starts.data_ptr(),
        )
        if failed:
            raise _outside(rows)

    return add


def embedding_product(slots: torch.Tensor, entry: int, rows: int, columns: int) -> LinearProduct:
    """The delta of an embedding: `add(y_TK, ids_T, order, starts)`, see `product.add_embedding`.

    Args:
        slots: As for `linear_product`.
        entry: The record of the embedding.
        rows: V; ids from V on add nothing.
        columns: K.

    Returns:
        A function that adds to `y` in place; ids are int32 or int64.
    """
    library = _library()
    if library is None:
        return partial(product.add_embedding, slots, entry, rows)
    _check(slots)
    place = slots.data_ptr(), slots.stride(0), len(slots), entry, rows, columns
    tables = {
        (dtype, ids): Table(*place, code, wide)
        for dtype, code in TYPES.items()
        for wide, ids in enumerate((torch.int32, torch.int64))
    }
    add = _embedding_call(library.add_embedding, tables, columns)
    add.kept = (tables, slots)  # type: ignore[attr-defined]
    return add


def _embedding_call(
    add_embedding: Callable[..., int],
    tables: dict[tuple[torch.dtype, torch.dtype], Table],
    columns: int,
) -> LinearProduct:
    addresses = {key: ctypes.addressof(table) for key, table in tables.items()}

    def add(
        y_TK: torch.Tensor, ids_T: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
    ) -> None:
        y_stride, y_step = y_TK.stride()
        assert (y_TK.shape[1], y_step) == (columns, 1)
        assert ids_T.is_contiguous()
        failed = add_embedding(
            addresses[y_TK.dtype, ids_T.dtype],
            y_TK.data_ptr(),
            ids_T.data_ptr(),
            len(ids_T),
            y_stride,
            order.data_ptr(),
            starts.data_ptr(),
        )
        if failed:
            raise _outside(len(ids_T))

    return add


def host_slots(count: int, num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 [count, bytes], in pages of 2 MiB where the system has them.

    A decoding step reads all of a slot once: with pages of 4 KiB a sixth of its products' time goes to
    looking up addresses.
    """
    slots = torch.empty(count, num_bytes, dtype=torch.uint8)
    _ask_for_huge_pages(slots)
    return slots.zero_()


def _ask_for_huge_pages(slots: torch.Tensor) -> None:
    """Advice that must come before the pages are first written; where it is not taken nothing is lost."""
    start = -(-slots.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (slots.data_ptr() + slots.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and length > 0:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


class _Library:
    """The compiled library with its kernels chosen.

    Args:
        kernel: Which to use; empty: the fastest.

    Raises:
        OSError: There is no library, or it has no such kernels for this processor.
    """

    def __init__(self, kernel: str) -> None:
        library = load_library(Path(__file__).parent, LIBRARY)
        choose = library.deltamux_choose
        choose.restype = ctypes.c_char_p
        chosen = choose(kernel.encode())
        if chosen is None:
            raise OSError(f"this processor has no {kernel!r}: unset {KERNEL_VARIABLE}")
        self.kernel = chosen.decode()
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.add_linear = library.deltamux_add_linear
        self.add_linear.argtypes = [pointer] * 3 + [number] * 3 + [pointer] * 2
        self.add_embedding = library.deltamux_add_embedding
        self.add_embedding.argtypes = [pointer] * 3 + [number] * 2 + [pointer] * 2
        self.threaded = _share_threads(library)


@lru_cache
def _library() -> _Library | None:
    wanted = os.environ.get(KERNEL_VARIABLE, "")
    if wanted == "torch":
        logger.info("products with deltas are computed by torch, as %s asks", KERNEL_VARIABLE)
        return None
    try:
        library = _Library(wanted)
    except OSError as error:
        if wanted:
            raise
        logger.warning("products with deltas are computed by torch, slowly: %s", error)
        return None
    threads = "on torch's threads" if library.threaded else "on one thread: no OpenMP is loaded"
    logger.info("products with deltas are computed with %s %s", library.kernel, threads)
    return library


def _share_threads(library: ctypes.CDLL) -> bool:
    """Hand over the OpenMP runtime that torch uses; false if none is to be found."""
    functions = _team_functions()
    if functions is None:
        return False
    library.deltamux_use_team(*functions)
    return True


def _team_functions() -> list[ctypes.c_void_p] | None:
    """Addresses of the functions of the loaded OpenMP runtime.

    torch loads its own runtime for all to see, and a runtime that was preloaded comes before it: both
    are found among the process's own symbols, in the order in which torch finds them.
    """
    process = ctypes.CDLL(None)
    try:
        return [ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in TEAM_FUNCTIONS]
    except AttributeError:
        return None


def _check(slots: torch.Tensor) -> None:
    if slots.data_ptr() % 64 or slots.stride(0) % 64 or slots.stride(1) != 1:
        raise ValueError(
            f"slots start at {slots.data_ptr() % 64} behind a multiple of 64 bytes and are "
            f"{slots.stride(0)} apart: both must be multiples of 64"
        )


def _outside(rows: int) -> ValueError:
    return ValueError(f"the row map names rows that a batch of {rows} has not: update it first")
