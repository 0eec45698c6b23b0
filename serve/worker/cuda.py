"""The products of slots on a GPU: Triton kernels where they run, else torch; decided once a process.

    add        y += x Δ̂_s                      one grouped launch over all slots
    multiply   y = x Wᵀ + x Δ̂_s, in one        many rows: by the merged weight, in tiles

Either way grids follow from shapes alone and nothing is read back, so that the ops can be captured.
"""

from collections.abc import Sequence

import torch

from deltamux.serve.worker import triton_product
from deltamux.serve.worker.ops import Add, Multiply
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import Slots


def linear_product(
    slots: Slots, entries: Sequence[int], sizes: Sequence[int], is_table: bool
) -> tuple[Add, Multiply]:
    """The product of a linear's slots, and base and delta in one.

    Args:
        slots: Where experts lie.
        entries: The record of each slice.
        sizes: Its output rows.
        is_table: Whether records may lack rows (lm_head, a tied embedding).
    """
    layer = list(entries), list(sizes), slots.rank, is_table
    # Decided, and kernels tried, before any graph is captured.
    triton_product.usable(slots.buffer.device)

    def add(y: torch.Tensor, x: torch.Tensor, rows: RowMap) -> None:
        triton_product.add_linear(
            y, x, rows.slot_of_row, rows.order, rows.starts, slots.buffer, *layer
        )

    def multiply(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: RowMap
    ) -> torch.Tensor:
        where = rows.slot_of_row, rows.order, rows.starts, rows.starts_host
        return triton_product.linear(x, weight, bias, *where, slots.buffer, *layer[:3])

    return add, multiply


def embedding_product(slots: Slots, entry: int, vocabulary: int) -> Add:
    """The look-up of an embedding's slots."""

    def add(y: torch.Tensor, ids: torch.Tensor, rows: RowMap) -> None:
        triton_product.add_embedding(y, ids, rows.slot_of_row, slots.buffer, entry, vocabulary)

    return add


def norm_product(slots: Slots, entry: int, epsilon: float) -> Add:
    """The replacement of a norm."""

    def replace(y: torch.Tensor, x: torch.Tensor, rows: RowMap) -> None:
        triton_product.replace_norm(y, x, rows.slot_of_row, slots.buffer, entry, epsilon)

    return replace
