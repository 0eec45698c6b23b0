"""The arithmetic of an expert's delta over the rows of a mixed batch.

Custom ops of the torch library `deltamux`, so that torch.compile and CUDA graphs see one opaque call
each. All of them write into `y`, and only into the rows of slots: rows of the base keep their bits.

Codes are kept as signed 4-bit integers v with one step a row, Δ̂ = s_i v_ij: every scheme of the
artifact is exactly representable (see `slots.py`). Two ways to multiply:

- CPU: `aten::_weight_int4pack_mm_for_cpu` on the packed codes, one call a slot over that slot's rows.
  Its result for a row does not depend on the other rows of the batch.
- elsewhere: codes are unpacked and multiplied slot by slot over the whole batch and masked; no
  control flow depends on data, so the sequence can be captured in a CUDA graph.

Shapes: T rows, S slots, N outputs, K inputs, C 16-bit channels, V vocabulary, H hidden.
"""

from functools import lru_cache

import torch
from torch.nn import functional

# The int4 kernel wants rows by 16 and columns by its quantization group.
ROW_MULTIPLE = 16
GROUP_SIZES = (256, 128, 64, 32)

_library = torch.library.Library("deltamux", "DEF")


def define_ops() -> None:
    """Register the ops; a second call does nothing."""
    if hasattr(torch.ops.deltamux, "add_linear"):
        return
    rows = "Tensor slot_of_row, Tensor order, Tensor starts"
    _library.define(
        f"add_linear(Tensor(a!) y, Tensor x, {rows}, Tensor codes, Tensor steps, "
        "Tensor channels, Tensor values, Tensor? bias) -> ()"
    )
    _library.define(
        f"add_embedding(Tensor(a!) y, Tensor ids, {rows}, Tensor codes, Tensor steps) -> ()"
    )
    _library.define(
        f"replace_norm(Tensor(a!) y, Tensor x, {rows}, Tensor weights, Tensor replaced, "
        "float epsilon) -> ()"
    )
    for name, on_cpu, elsewhere in (
        ("add_linear", add_linear_cpu, add_linear_masked),
        ("add_embedding", add_embedding, add_embedding),
        ("replace_norm", replace_norm_cpu, replace_norm_masked),
    ):
        _library.impl(name, on_cpu, "CPU")
        _library.impl(name, elsewhere, "CUDA")
        torch.library.register_fake(f"deltamux::{name}", _nothing, lib=_library)


def _nothing(*_args: object) -> None:
    """What an op that only writes into its first argument does to shapes: nothing."""


def add_linear_cpu(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    codes: torch.Tensor,
    steps_SN: torch.Tensor,
    channels_SC: torch.Tensor,
    values_SNC: torch.Tensor,
    bias_SN: torch.Tensor | None,
) -> None:
    """y[rows of s] += x Δ̂_sᵀ + x[:, channels_s] values_sᵀ + bias_s, packed int4 kernel.

    Args:
        y_TN: Output of the base, written in place.
        x_TK: Input.
        slot_of_row: See `rows.py`, like the two that follow.
        order: Rows by slot.
        starts: Spans in `order`.
        codes: uint8 [S, N', K' / 2], each slot packed by `_convert_weight_to_int4pack_for_cpu`.
        steps_SN: Step of each row, in y's dtype.
        channels_SC: int64 16-bit channels.
        values_SNC: Their values, in y's dtype.
        bias_SN: Difference of the bias, in y's dtype.
    """
    rows_packed, columns_packed = codes.shape[1], codes.shape[2] * 2
    group, unit = _unit_scale(columns_packed, rows_packed, x_TK.dtype)
    outputs = y_TN.shape[-1]
    spans = starts.tolist()
    for slot in range(codes.shape[0]):
        begin, end = spans[slot], spans[slot + 1]
        if begin == end:
            continue
        whole = end - begin == x_TK.shape[0]
        rows = order[begin:end]
        inputs = x_TK if whole else x_TK.index_select(0, rows)
        result = y_TN if whole else y_TN.index_select(0, rows)
        padded = inputs.contiguous()
        if columns_packed != inputs.shape[1]:
            padded = functional.pad(inputs, (0, columns_packed - inputs.shape[1]))
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, codes[slot], group, unit)
        result.addcmul_(product[:, :outputs], steps_SN[slot])
        if channels_SC.shape[1]:
            result.addmm_(inputs.index_select(1, channels_SC[slot]), values_SNC[slot].T)
        if bias_SN is not None:
            result.add_(bias_SN[slot])
        if not whole:
            y_TN.index_copy_(0, rows, result)


@lru_cache
def _unit_scale(columns: int, rows: int, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
    """The int4 kernel's group size, and its scales and zeros set to one and nought."""
    group = next(size for size in GROUP_SIZES if columns % size == 0)
    unit = torch.zeros(columns // group, rows, 2, dtype=dtype)
    unit[..., 0] = 1
    return group, unit


def add_linear_masked(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    codes: torch.Tensor,
    steps_SN: torch.Tensor,
    channels_SC: torch.Tensor,
    values_SNC: torch.Tensor,
    bias_SN: torch.Tensor | None,
) -> None:
    """As `add_linear_cpu`, for codes in plain nibbles and without data-dependent control flow."""
    outputs, inputs = y_TN.shape[-1], x_TK.shape[-1]
    member_T1 = slot_of_row[: x_TK.shape[0]].unsqueeze(1)
    for slot in range(codes.shape[0]):
        levels_NK = unpack_nibbles(codes[slot], x_TK.dtype)[:outputs, :inputs]
        product = (x_TK @ levels_NK.T).float() * steps_SN[slot].float()
        if channels_SC.shape[1]:
            product += x_TK.index_select(1, channels_SC[slot]) @ values_SNC[slot].T
        if bias_SN is not None:
            product += bias_SN[slot]
        y_TN.copy_(torch.where(member_T1 == slot, (y_TN + product).to(y_TN.dtype), y_TN))


def add_embedding(
    y_TH: torch.Tensor,
    ids_T: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    codes_SVB: torch.Tensor,
    steps_SV: torch.Tensor,
) -> None:
    """y[t] += Δ̂_s[ids[t]] for the rows of slots.

    Args:
        y_TH: The base's embeddings, written in place.
        ids_T: Token ids.
        slot_of_row: See `rows.py`, like the two that follow.
        order: Rows by slot.
        starts: Spans in `order`.
        codes_SVB: uint8 nibbles [S, V, H / 2].
        steps_SV: Step of each row, in y's dtype; nought for unchanged rows.
    """
    slots_T = slot_of_row[: ids_T.shape[0]]
    safe_T = slots_T.clamp_min(0)
    levels_TH = unpack_nibbles(codes_SVB[safe_T, ids_T], torch.float32)[:, : y_TH.shape[-1]]
    delta_TH = levels_TH * steps_SV[safe_T, ids_T].float().unsqueeze(1)
    y_TH.copy_(torch.where((slots_T >= 0).unsqueeze(1), (y_TH + delta_TH).to(y_TH.dtype), y_TH))


def replace_norm_cpu(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    weights_SH: torch.Tensor,
    replaced_S: torch.Tensor,
    epsilon: float,
) -> None:
    """As `replace_norm_masked`; returns at once where no slot of the batch replaces the norm."""
    if bool((replaced_S & (starts[1:] > starts[:-1])).any()):
        replace_norm_masked(y, x, slot_of_row, order, starts, weights_SH, replaced_S, epsilon)


def replace_norm_masked(
    y: torch.Tensor,
    x: torch.Tensor,
    slot_of_row: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    weights_SH: torch.Tensor,
    replaced_S: torch.Tensor,
    epsilon: float,
) -> None:
    """y[t] = RMSNorm(x[t]) with the slot's own weight, where the slot has one.

    Args:
        y: The base's normalized output [T, ..., H], written in place.
        x: What was normalized, same shape.
        slot_of_row: See `rows.py`, like the two that follow.
        order: Rows by slot.
        starts: Spans in `order`.
        weights_SH: Norm weights.
        replaced_S: bool, whether a slot replaces this norm.
        epsilon: Added to the mean square.
    """
    slots_T = slot_of_row[: y.shape[0]]
    safe_T = slots_T.clamp_min(0)
    chosen_T = (slots_T >= 0) & replaced_S[safe_T]
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    middle = (1,) * (y.dim() - 2)
    weight = weights_SH[safe_T].view(y.shape[0], *middle, y.shape[-1])
    chosen = chosen_T.view(y.shape[0], *middle, 1)
    y.copy_(torch.where(chosen, unit.to(y.dtype) * weight, y))


def pack_nibbles(levels_NK: torch.Tensor) -> torch.Tensor:
    """Signed levels −8..7 two a byte, offset by 8, the first in the low half: uint8 [N, K / 2]."""
    offset = (levels_NK + 8).to(torch.uint8)
    return offset[:, 0::2] | (offset[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack_nibbles`, in `dtype`."""
    low, high = packed & 15, packed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2).to(dtype) - 8


def pack_for(device: torch.device, levels_NK: torch.Tensor) -> torch.Tensor:
    """Signed levels as the linear op of a device reads them: uint8 [N, K / 2].

    Args:
        device: Where the codes will be used.
        levels_NK: int levels −8..7 with padded shape, on the CPU.
    """
    if device.type == "cpu":
        offset = (levels_NK + 8).to(torch.int32)
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(offset, 1)
        return packed
    return pack_nibbles(levels_NK)


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a code matrix rounded up to what the kernels take."""
    smallest = GROUP_SIZES[-1]
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, -(-columns // smallest) * smallest
