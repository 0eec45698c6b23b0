"""Device memory for resident experts, and experts in the form that is copied into it.

A slot holds, for each weight of the model, what one expert changes. The buffers are allocated once
and updated in place, so that their addresses stay valid in captured graphs.

Every scheme of the artifact becomes signed 4-bit levels v with a step per row. Half-integer grids
(sign, 2 and 3 bit) double their levels and halve their step: s (c − z) = (s / 2) · 2 (c − z), which
is exact. Unchanged rows have step 0, dropped channels level 0.
"""

from dataclasses import dataclass

import torch

from deltamux.compression.rounding.quantize import QuantizedDelta
from deltamux.serve.worker.ops import pack_for, pack_nibbles, padded_shape


@dataclass(frozen=True)
class SlotPlan:
    """What slot buffers are sized for.

    Attributes:
        slots: Experts resident at once.
        salient: 16-bit channels of one linear that a slot has room for.
        dtype: The model's dtype.
        device: The model's device.
    """

    slots: int
    salient: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class MatrixPayload:
    """One linear of one expert, ready to be copied into a slot.

    Attributes:
        codes: uint8 [N', K' / 2], packed for the device.
        steps_N: Steps in the model's dtype.
        channels_C: int64 16-bit channels.
        values_NC: Their values in the model's dtype.
        bias_N: Difference of the bias in the model's dtype, None where there is none.
    """

    codes: torch.Tensor
    steps_N: torch.Tensor
    channels_C: torch.Tensor
    values_NC: torch.Tensor
    bias_N: torch.Tensor | None


@dataclass(frozen=True)
class RowsPayload:
    """The input embedding of one expert: nibbles uint8 [V', H' / 2] and steps [V']."""

    codes: torch.Tensor
    steps_V: torch.Tensor


@dataclass(frozen=True)
class NormPayload:
    """A norm that an expert replaces: its weight in the model's dtype."""

    weight_H: torch.Tensor


Payload = MatrixPayload | RowsPayload | NormPayload


def payload_bytes(payload: Payload) -> int:
    """Host memory of a payload."""
    tensors = [value for value in vars(payload).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def signed_levels(quantized: QuantizedDelta) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (int8 [N, K]) and steps (float32 [N]) of a matrix over all its rows and channels."""
    scheme = quantized.scheme
    doubled = scheme.zero_point % 1 != 0
    factor = 2 if doubled else 1
    zero = int(scheme.zero_point * factor)
    levels = quantized.codes_RC.to(torch.int8).mul_(factor).sub_(zero)
    steps = quantized.steps_R.float() / factor
    rows, columns = quantized.shape
    if quantized.channels_C is not None:
        wide = torch.zeros(len(levels), columns, dtype=torch.int8)
        levels = wide.index_copy_(1, quantized.channels_C, levels)
    if quantized.rows_R is not None:
        tall = torch.zeros(rows, columns, dtype=torch.int8)
        levels = tall.index_copy_(0, quantized.rows_R, levels)
        steps = torch.zeros(rows).index_copy_(0, quantized.rows_R, steps)
    return levels, steps


def matrix_payload(
    parts: list[tuple[int, QuantizedDelta | None, torch.Tensor | None]],
    columns: int,
    plan: SlotPlan,
    has_bias: bool,
) -> MatrixPayload:
    """Stack the slices of a (possibly merged) linear.

    Args:
        parts: For each slice its output rows, its delta or None, and its bias delta or None.
        columns: Input channels K.
        plan: Device and dtype of the slots.
        has_bias: Whether the layer has a bias.
    """
    outputs = sum(rows for rows, _, _ in parts)
    rows_padded, columns_padded = padded_shape(outputs, columns)
    levels = torch.zeros(rows_padded, columns_padded, dtype=torch.int8)
    steps = torch.zeros(outputs)
    bias = torch.zeros(outputs) if has_bias else None
    salient: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
    start = 0
    for rows, quantized, bias_delta in parts:
        span = slice(start, start + rows)
        start += rows
        if quantized is not None:
            levels[span, :columns], steps[span] = signed_levels(quantized)
            if quantized.salient_channels_S is not None:
                assert quantized.salient_values_NS is not None
                values = quantized.salient_values_NS.float()
                salient.append((span, quantized.salient_channels_S, values))
        if bias is not None and bias_delta is not None:
            bias[span] = bias_delta
    channels, values = _merge_salient(salient, outputs)
    return MatrixPayload(
        codes=pack_for(plan.device, levels),
        steps_N=steps.to(plan.dtype),
        channels_C=channels,
        values_NC=values.to(plan.dtype),
        bias_N=None if bias is None else bias.to(plan.dtype),
    )


def _merge_salient(
    salient: list[tuple[slice, torch.Tensor, torch.Tensor]], outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of the slices' channels, with zeros where a slice lacks one."""
    if not salient:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(outputs, 0)
    channels = torch.cat([part for _, part, _ in salient]).unique()
    values = torch.zeros(outputs, len(channels))
    for span, part, part_values in salient:
        columns = torch.searchsorted(channels, part)
        values[span] = values[span].index_copy(1, columns, part_values)
    return channels, values


def rows_payload(quantized: QuantizedDelta, dtype: torch.dtype) -> RowsPayload:
    """The input embedding's delta as nibbles."""
    levels, steps = signed_levels(quantized)
    rows, columns = padded_shape(*levels.shape)
    padded = torch.zeros(rows, columns, dtype=torch.int8)
    padded[: levels.shape[0], : levels.shape[1]] = levels
    steps_padded = torch.zeros(rows, dtype=dtype)
    steps_padded[: len(steps)] = steps
    return RowsPayload(pack_nibbles(padded), steps_padded)


class MatrixSlots:
    """Slot buffers of one linear.

    Args:
        plan: Number of slots, device and dtype.
        outputs: N.
        columns: K.
        salient: 16-bit channels a slot has room for, over all slices.
        has_bias: Whether the layer has a bias.
    """

    def __init__(
        self, plan: SlotPlan, outputs: int, columns: int, salient: int, has_bias: bool
    ) -> None:

        def buffer(*shape: int, dtype: torch.dtype = plan.dtype) -> torch.Tensor:
            return torch.zeros(plan.slots, *shape, dtype=dtype, device=plan.device)

        rows_padded, columns_padded = padded_shape(outputs, columns)
        self.codes = buffer(rows_padded, columns_padded // 2, dtype=torch.uint8)
        self.steps = buffer(outputs)
        self.channels = buffer(salient, dtype=torch.int64)
        self.values = buffer(outputs, salient)
        self.bias = buffer(outputs) if has_bias else None

    def clear(self, slot: int) -> None:
        """Make a slot change nothing."""
        self.steps[slot] = 0
        self.values[slot] = 0
        if self.bias is not None:
            self.bias[slot] = 0

    def load(self, slot: int, payload: MatrixPayload) -> None:
        """Copy an expert's matrix into a slot."""
        count = len(payload.channels_C)
        self.codes[slot].copy_(payload.codes, non_blocking=True)
        self.steps[slot].copy_(payload.steps_N, non_blocking=True)
        self.channels[slot, :count].copy_(payload.channels_C, non_blocking=True)
        self.values[slot, :, :count].copy_(payload.values_NC, non_blocking=True)
        self.values[slot, :, count:] = 0
        if self.bias is not None and payload.bias_N is not None:
            self.bias[slot].copy_(payload.bias_N, non_blocking=True)


def slot_bytes(buffers: object) -> int:
    """Device memory of slot buffers."""
    tensors = [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
