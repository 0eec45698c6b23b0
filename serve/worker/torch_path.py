"""Products of slots on a GPU in plain torch, where Triton's kernels do not run.

Records are read on the host: this works without CUDA graphs only, and refuses where one is captured.
Shapes: T rows of a batch, N outputs, K inputs, S slots, H hidden channels.
"""

from collections.abc import Sequence

import torch

from deltamux.compression.image.layout import Field
from deltamux.serve.worker import product


def captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def add_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    entries: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """Y [T, N] += x [T, K] Δ̂_sᵀ + the bias's difference: see `triton_product.add_linear`."""
    with _on(y.device):
        product.add_linear(slots, entries, sizes, y, x, order, starts)


def add_embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    slot_of_row: torch.Tensor,
    slots: torch.Tensor,
    entry: int,
    rows: int,
) -> None:
    """Y [T, H] += Δ̂_s[ids]: see `triton_product.add_embedding`."""
    with _on(y.device):
        grouped = torch.sort(slot_of_row[: len(ids)].long(), stable=True)
        starts = torch.searchsorted(grouped.values, torch.arange(len(slots) + 1))
        product.add_embedding(slots, entry, rows, y, ids, grouped.indices, starts)


def replace_norm(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    slots: torch.Tensor,
    entry: int,
    epsilon: float,
) -> None:
    """Y [T, ..., H] = RMSNorm(x) with the slot's weight: see `triton_product.replace_norm`."""
    with _on(y.device):
        for slot in range(len(slots)):
            record = product.SlotRecord(slots[slot], entry)
            members = (slot_of_row[: len(y)] == slot).nonzero().squeeze(1)
            if len(members) == 0 or not record.number(Field.VECTOR):
                continue
            weight_H = record.section(Field.VECTOR, torch.float32, y.shape[-1])
            y[members] = product.rms_norm(x[members], weight_H, epsilon, y.dtype)


def _on(device: torch.device) -> torch.device:
    """The device as a context for new tensors; refuses where a graph is captured."""
    if captured(device):
        raise RuntimeError(
            "products of slots in torch cannot be captured in a CUDA graph; start with "
            "--enforce-eager, or see the warning above for what the kernels lack"
        )
    return device
