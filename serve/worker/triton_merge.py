"""Products of many rows: by the base's weight with a slot's delta merged into it.

Two products of a long prompt would cost twice the base's; merging moves some four bytes a weight.
Shapes: T rows of a batch, N outputs, K inputs.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

# One buffer a device and type, as large as the largest weight: merged weights are used at once.
_scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def scratch(like: torch.Tensor) -> torch.Tensor:
    """Room for a weight, the same at every call; it must not be kept."""
    key = like.device, like.dtype
    found = _scratch.get(key)
    if found is None or found.numel() < like.numel():
        _scratch.pop(key, None)
        found = _scratch[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    return found[: like.numel()].view(like.shape)


def _rows_of(
    light: Sequence[int], order: torch.Tensor, spans: Sequence[int], rows: int
) -> torch.Tensor:
    """Rows of slots that are not merged, and of the base: those behind the batch, which pad it, are like the base's."""
    pieces = [order[: spans[0]], *(order[spans[s] : spans[s + 1]] for s in light)]
    padding = torch.arange(spans[-1], rows, device=order.device, dtype=order.dtype)
    return torch.cat([*pieces, padding])


def by_merged_weights(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    order: torch.Tensor,
    spans: Sequence[int],
    heavy: Sequence[int],
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
    rank: int,
) -> tuple[torch.Tensor, bool]:
    """y [T, N] = x Wᵀ + bias, with the deltas of the slots in `heavy`; and whether other slots have rows.

    Args:
        x_TK: Input.
        weight_NK: The base's weight.
        bias_N: The base's bias.
        order: Rows of the batch by slot.
        spans: Where each slot's begin.
        heavy: Slots whose weights are merged.
        slots: uint8 [S, bytes], images of experts.
        entries: The record of each slice.
        sizes: Rows of each slice.
        rank: The largest rank of factors that a record may have.
    """
    rows = x_TK.shape[0]
    if spans[heavy[0] + 1] - spans[heavy[0]] == rows:
        merged = _merged(weight_NK, bias_N, heavy[0], slots, entries, sizes, rank)
        return functional.linear(x_TK, *merged), False
    light = [slot for slot in range(len(spans) - 1) if slot not in set(heavy)]
    others = _rows_of(light, order, spans, rows)
    y_TN = x_TK.new_empty(rows, weight_NK.shape[0])
    if len(others):
        y_TN[others] = functional.linear(x_TK[others], weight_NK, bias_N)
    for slot in heavy:
        members = order[spans[slot] : spans[slot + 1]]
        merged = _merged(weight_NK, bias_N, slot, slots, entries, sizes, rank)
        y_TN[members] = functional.linear(x_TK[members], *merged)
    return y_TN, any(spans[slot] < spans[slot + 1] for slot in light)


def _merged(
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    slot: int,
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias with a slot's deltas."""
    from deltamux.serve.worker.triton_dense import launch_dense

    out_NK = scratch(weight_NK)
    bias_out_N = None if bias_N is None else torch.empty_like(bias_N)
    start = 0
    for entry, outputs in zip(entries, sizes, strict=True):
        part = slice(start, start + outputs)
        bias = None
        if bias_N is not None and bias_out_N is not None:
            bias = bias_out_N[part], bias_N[part]
        launch_dense(out_NK[part], slots, slot, entry, weight_NK[part], bias, rank=rank > 0)
        start += outputs
    if start < len(weight_NK):
        out_NK[start:] = weight_NK[start:]
        if bias_N is not None and bias_out_N is not None:
            bias_out_N[start:] = bias_N[start:]
    return out_NK, bias_out_N
