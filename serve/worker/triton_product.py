"""The products of slots on a GPU: what layers call, by Triton kernels where they run, else by torch.

`usable` decides once a process, and says in one line why where it must be torch (`torch_path.py`).

Nothing here reads a value back from the device, and grids follow from shapes: the calls can be
captured. `linear` also looks at the batch's spans on the host, which is no reading back; while a graph
is captured it does not.

Shapes: T rows of a batch, N outputs, K inputs, S slots, H hidden channels.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from torch.nn import functional

from deltamux.serve.worker import torch_path

if TYPE_CHECKING:
    from deltamux.serve.worker.triton_launch import Capabilities

logger = logging.getLogger(__name__)

OLDEST_TRITON = "3.4"
# bfloat16 tensor cores and asynchronous copies: A100 and later.
OLDEST_DEVICE = (8, 0)
# Launches that begin before the one ahead of them has ended: H100 and later.
EARLY_START = (9, 0)
# Rows of one slot from which on its weight is merged with the base's: what merging costs (some four
# bytes moved a weight) is then less than a second product's cost.
MERGE_ROWS = 384


def add_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    row_map: bool,
) -> None:
    """y[rows of s] += x Δ̂_sᵀ + the bias's difference.

    Args:
        y: The base's output [T, N], last stride 1, written in place.
        x: Input [T, K], last stride 1.
        slot_of_row: Slot of each row, −1: the base.
        order: Rows of the batch by slot.
        starts: Where each slot's begin in `order` [S + 1], on the device.
        slots: uint8 [S, bytes], images of experts.
        entries: The record of each slice.
        sizes: Rows of each slice.
        rank: The largest rank of factors that a record may have.
        row_map: Whether records may lack rows.
    """
    if not usable(y.device):
        torch_path.add_linear(y, x, order, starts, slots, entries, sizes)
        return
    _add(y, x, slot_of_row, order, starts, slots, entries, sizes, rank, row_map, None)


def _add(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    row_map: bool,
    most: int | None,
) -> None:
    from deltamux.serve.worker.triton_launch import launch_product

    launch_product(
        y, x, slot_of_row, order, starts, slots, tuple(entries), tuple(sizes), rank, row_map,
        capabilities(y.device), most=most,
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    starts_host: torch.Tensor,
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
    rank: int,
) -> torch.Tensor:
    """y [..., N] = x Wᵀ + bias, and for the rows of slots the delta too.

    Slots with at least `MERGE_ROWS` rows multiply by W + Δ̂_s, rounded to W's type, instead of W: a
    long prompt costs one product. Their rows differ from those of `add_linear` by that rounding, so
    that none is merged where vLLM is to be batch-invariant (VLLM_BATCH_INVARIANT).

    Args:
        x: [..., K].
        weight: The base's [N, K], contiguous.
        bias: The base's [N], or None.
        slot_of_row: As for `add_linear`, like all that follow but `starts_host`.
        starts_host: `starts` on the CPU.
    """
    x_TK = x.reshape(-1, x.shape[-1])
    where, layer = (slot_of_row, order, starts), (slots, entries, sizes)
    mergeable = len(x_TK) >= MERGE_ROWS and usable(x.device) and weight.is_contiguous()
    if mergeable and not torch_path.captured(x.device) and not _batch_invariant():
        spans: list[int] = starts_host.tolist()
        heavy = [s for s, end in enumerate(spans[1:]) if end - spans[s] >= MERGE_ROWS]
        if heavy:
            y_TN = _merged(x_TK, weight, bias, spans, heavy, *where, *layer, rank)
            return y_TN.view(*x.shape[:-1], -1)
    y = functional.linear(x, weight, bias)
    add_linear(y.view(-1, y.shape[-1]), x_TK, *where, *layer, rank, False)
    return y


def _merged(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spans: Sequence[int],
    heavy: Sequence[int],
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
    rank: int,
) -> torch.Tensor:
    """y of a batch in which slots have many rows: theirs by merged weights, the others' added."""
    from deltamux.serve.worker.triton_merge import by_merged_weights

    layer = slots, entries, sizes
    y_TN, rest = by_merged_weights(x_TK, weight, bias, order, spans, heavy, *layer, rank)
    if rest:
        _add(y_TN, x_TK, slot_of_row, order, starts, *layer, rank, False, MERGE_ROWS - 1)
    return y_TN


def _batch_invariant() -> bool:
    """Whether vLLM is told to make a row's bits independent of its batch."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


def add_embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    slot_of_row: torch.Tensor,
    slots: torch.Tensor,
    entry: int,
    rows: int,
) -> None:
    """y[t] += Δ̂_s[ids[t]] for the rows of slots; ids from `rows` on add nothing.

    Args:
        y: The base's embeddings [T, H], last stride 1, written in place.
        ids: Token ids [T], int32 or int64.
        slot_of_row: Slot of each row, −1: the base.
        slots: uint8 [S, bytes], images of experts.
        entry: The table's record.
        rows: Rows of the table.
    """
    if usable(y.device):
        from deltamux.serve.worker.triton_rows import launch_embedding

        launch_embedding(y, ids, slot_of_row, slots, entry, rows)
    else:
        torch_path.add_embedding(y, ids, slot_of_row, slots, entry, rows)


def replace_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    slots: torch.Tensor,
    entry: int,
    epsilon: float,
) -> None:
    """y[t] = RMSNorm(x[t]) with the slot's own weight, where the slot has one.

    Args:
        y: The base's normalized output [T, ..., H], contiguous, written in place.
        x: What was normalized, of the same shape.
        slot_of_row: Slot of each row, −1: the base.
        slots: uint8 [S, bytes], images of experts.
        entry: The norm's record.
        epsilon: Added to the mean square.
    """
    if usable(y.device):
        from deltamux.serve.worker.triton_rows import launch_norm

        launch_norm(y, x, slot_of_row, slots, entry, epsilon)
    else:
        torch_path.replace_norm(y, x, slot_of_row, slots, entry, epsilon)


@cache
def capabilities(device: torch.device) -> "Capabilities":
    """What the kernels may use on a device."""
    from deltamux.serve.worker.triton_launch import Capabilities

    if os.environ.get("TRITON_INTERPRET") == "1":
        return Capabilities(assembly=False, early_start=False)
    early = torch.cuda.get_device_capability(device) >= EARLY_START
    return Capabilities(assembly=True, early_start=early)


@cache
def usable(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device; logs why not, once."""
    reason = _obstacle(device)
    if reason:
        logger.warning("products of slots run in torch, without CUDA graphs and slowly: %s", reason)
    return reason is None


def _obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run, in one line; None: they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if Version(triton.__version__) < Version(OLDEST_TRITON):
        return f"triton {triton.__version__} is older than {OLDEST_TRITON}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _obstacle_of(device)


def _obstacle_of(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"slots are on {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_DEVICE:
        wanted = ".".join(map(str, OLDEST_DEVICE))
        return f"compute capability {'.'.join(map(str, found))} is below {wanted}"
    try:
        _trial(device)
    # Compilers fail in many ways of their own; whichever it is, torch can do the work.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"a kernel failed: {lines[0]}"
    return None


def _trial(device: torch.device) -> None:
    """Run the product once, for an empty slot, with one row and with two."""
    slots = torch.zeros(1, 1024, dtype=torch.uint8, device=device)
    for rows in (1, 2):
        y = torch.zeros(rows, 64, dtype=torch.bfloat16, device=device)
        order = torch.arange(rows, dtype=torch.int32, device=device)
        starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
        _add(y, y, order * 0, order, starts, slots, (0,), (64,), 0, False, None)
    torch.cuda.synchronize(device)
