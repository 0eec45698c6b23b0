"""Experts in the form that slots take."""

import pytest
import torch

from deltamux.compression.rounding.quantize import Scheme, quantize, quantize_changed_rows
from deltamux.serve.worker import ops
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import (
    MatrixSlots,
    SlotPlan,
    matrix_payload,
    rows_payload,
    signed_levels,
    slot_bytes,
)

ops.define_ops()

CPU = torch.device("cpu")
PLAN = SlotPlan(slots=2, salient=3, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("scheme", [scheme for scheme in Scheme if scheme.levels <= 16])
def test_signed_levels_stand_for_exactly_the_same_delta(scheme: Scheme) -> None:
    quantized = quantize(torch.randn(20, 40), scheme, torch.ones(40))
    levels, steps = signed_levels(quantized)
    assert int(levels.min()) >= -8
    assert int(levels.max()) <= 7
    assert torch.equal(levels.float() * steps.unsqueeze(1), quantized.dequantize())


def test_dropped_channels_and_unchanged_rows_become_zeros() -> None:
    delta = torch.randn(400, 64)
    delta[:, 10:50] = 0
    dropped = quantize(delta, Scheme.INT2, torch.ones(64))
    assert dropped.channels_C is not None
    levels, _ = signed_levels(dropped)
    assert not levels[:, 10:50].any()
    delta[5:300] = 0
    rows = quantize_changed_rows(delta, Scheme.INT4)
    levels, steps = signed_levels(rows)
    assert not steps[5:300].any()
    assert torch.equal(levels.float() * steps.unsqueeze(1), rows.dequantize())


def test_a_merged_linear_keeps_its_slices_apart() -> None:
    torch.manual_seed(0)
    first = quantize(torch.randn(12, 40), Scheme.INT2, torch.ones(40), salient_channels=3)
    third = quantize(torch.randn(20, 40), Scheme.TERNARY, torch.ones(40), salient_channels=2)
    bias = torch.randn(12)
    parts = [(12, first, bias), (6, None, None), (20, third, None)]
    payload = matrix_payload(parts, 40, PLAN, has_bias=True)
    slots = MatrixSlots(PLAN, 38, 40, 9, has_bias=True)
    slots.load(1, payload)
    rows = RowMap(4, 2, CPU)
    rows.update([1, 0])
    x, y = torch.randn(2, 40), torch.zeros(2, 38)
    torch.ops.deltamux.add_linear(
        y,
        x,
        rows.slot_of_row,
        rows.order,
        rows.starts,
        slots.codes,
        slots.steps,
        slots.channels,
        slots.values,
        slots.bias,
    )
    whole = torch.cat([first.dequantize(), torch.zeros(6, 40), third.dequantize()])
    expected = whole @ x[0] + torch.cat([bias, torch.zeros(26)])
    torch.testing.assert_close(y[0], expected, atol=1e-4, rtol=1e-4)
    assert not y[1].any()


def test_loading_an_expert_leaves_nothing_of_the_one_before() -> None:
    torch.manual_seed(0)
    rich = quantize(torch.randn(16, 32), Scheme.INT2, torch.ones(32), salient_channels=3)
    plain = quantize(torch.randn(16, 32), Scheme.INT2, torch.ones(32))
    reused, fresh = (MatrixSlots(PLAN, 16, 32, 3, has_bias=False) for _ in range(2))
    reused.load(0, matrix_payload([(16, rich, None)], 32, PLAN, has_bias=False))
    for slots in (reused, fresh):
        slots.load(0, matrix_payload([(16, plain, None)], 32, PLAN, has_bias=False))
    assert torch.equal(reused.codes[0], fresh.codes[0])
    assert torch.equal(reused.steps[0], fresh.steps[0])
    assert torch.equal(reused.values[0], fresh.values[0])
    reused.clear(0)
    assert not reused.steps[0].any()
    assert not reused.values[0].any()


def test_an_embeddings_rows_are_its_delta() -> None:
    delta = torch.randn(20, 40)
    delta[3:9] = 0
    quantized = quantize_changed_rows(delta, Scheme.INT4)
    payload = rows_payload(quantized, torch.float32)
    levels = ops.unpack_nibbles(payload.codes, torch.float32)[:20, :40]
    actual = levels * payload.steps_V[:20].unsqueeze(1)
    assert torch.equal(actual, quantized.dequantize())


def test_slot_bytes_counts_every_buffer() -> None:
    slots = MatrixSlots(PLAN, 16, 32, 3, has_bias=True)
    per_slot = 16 * 16 + 16 * 4 + 3 * 8 + 16 * 3 * 4 + 16 * 4
    assert slot_bytes(slots) == 2 * per_slot


def test_rows_are_grouped_by_slot_in_order() -> None:
    rows = RowMap(10, 3, CPU)
    rows.update([2, -1, 0, 2, -1, 0])
    assert rows.starts.tolist() == [2, 4, 4, 6]
    assert rows.order[2:4].tolist() == [2, 5]
    assert rows.order[4:6].tolist() == [0, 3]
    assert rows.slot_of_row.tolist() == [2, -1, 0, 2, -1, 0, -1, -1, -1, -1]


def test_a_span_of_rows_is_numbered_from_its_start() -> None:
    rows = RowMap(10, 3, CPU)
    rows.update([2, -1, 0, 2, -1, 0])
    span = rows.span(2, 3)
    assert span.slot_of_row.tolist() == [0, 2, -1]
    assert span.starts.tolist() == [1, 2, 2, 3]
