"""Slots, and what every layer's op makes of them."""

import pytest
import torch

from deltamux.compression.image.dense import served_delta
from deltamux.compression.image.layout import ImageReader, Record, assemble
from deltamux.compression.image.weights import adapter_record, coded_record, vector_record
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme
from deltamux.serve.worker import ops
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import Slots

ops.define_ops()

CPU = torch.device("cpu")
NAMES = ["q", "k", "v", "norm"]
SIZES = [12, 6, 20]
COLUMNS = 40
# float32: one rounding of each partial sum.
TOLERANCE = 1e-5


def coded(rows: int, seed: int) -> QuantizedDelta:
    torch.manual_seed(seed)
    codes = torch.randint(4, 13, (rows, COLUMNS), dtype=torch.uint8)
    return QuantizedDelta(Scheme.INT4, (rows, COLUMNS), codes, torch.rand(rows).bfloat16())


def images() -> list[torch.Tensor]:
    """An expert of codes and a bias, and one of a LoRA adapter and a norm."""
    with_bias = coded_record(coded(12, 0))
    with_bias.sections |= vector_record(torch.randn(12)).sections
    first: dict[int, Record] = {
        0: with_bias,
        2: coded_record(coded(20, 1)),
    }
    second: dict[int, Record] = {
        1: adapter_record(torch.randn(3, COLUMNS), torch.randn(6, 3)),
        3: vector_record(torch.rand(COLUMNS) + 0.5),
    }
    return [assemble(first, len(NAMES)), assemble(second, len(NAMES))]


@pytest.fixture
def slots() -> Slots:
    made = Slots(2, 2**16, NAMES, CPU)
    for slot, image in enumerate(images()):
        made.load(slot, image)
    return made


def row_map(slots_of_rows: list[int], slots: int = 2) -> RowMap:
    rows = RowMap(len(slots_of_rows) + 5, slots, CPU)
    rows.update(slots_of_rows)
    return rows


def expected(y: torch.Tensor, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    result = y.clone()
    for row, slot in enumerate(rows):
        if slot < 0:
            continue
        reader = ImageReader(images()[slot])
        deltas = [served_delta(reader, i, size, COLUMNS) for i, size in enumerate(SIZES)]
        result[row] += torch.cat(deltas) @ x[row]
        bias = vector(images()[slot], 0, 12)
        if bias is not None:
            result[row, :12] += bias
    return result


def vector(image: torch.Tensor, index: int, size: int) -> torch.Tensor | None:
    slots = Slots(1, image.numel(), NAMES, CPU)
    slots.load(0, image)
    return slots.vector(0, index, size)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "op"])
@pytest.mark.parametrize("rows", [[0, 1, -1, 0], [-1, -1], [1], [0, 0, 0, 0, 0], []], ids=str)
def test_each_row_gets_its_own_experts_delta_and_the_base_keeps_its_bits(
    slots: Slots, rows: list[int], direct: bool
) -> None:
    delta = ops.LinearDelta(slots, row_map(rows), direct, [0, 1, 2], SIZES, COLUMNS)
    x, y = torch.randn(len(rows), COLUMNS), torch.randn(len(rows), sum(SIZES))
    wanted, before = expected(y, x, rows), y.clone()
    delta(y, x)
    torch.testing.assert_close(y, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    for row, slot in enumerate(rows):
        if slot < 0:
            assert torch.equal(y[row], before[row])


def test_a_row_does_not_depend_on_the_others(slots: Slots) -> None:
    rows = [0, 1, -1, 1, 0, 0]
    x, y = torch.randn(6, COLUMNS), torch.randn(6, sum(SIZES))
    alone = y.clone()
    ops.LinearDelta(slots, row_map(rows), True, [0, 1, 2], SIZES, COLUMNS)(y, x)
    for row, slot in enumerate(rows):
        one = ops.LinearDelta(slots, row_map([slot]), True, [0, 1, 2], SIZES, COLUMNS)
        one(alone[row : row + 1], x[row : row + 1])
    assert torch.equal(y, alone)


def test_an_embedding_looks_up_the_rows_of_slots(slots: Slots) -> None:
    ids, rows = torch.tensor([3, 19, 0, 3]), [0, 0, 1, -1]
    y = torch.randn(4, COLUMNS)
    before = y.clone()
    ops.EmbeddingDelta(slots, row_map(rows), True, 2, 20, COLUMNS)(y, ids)
    table = served_delta(ImageReader(images()[0]), 2, 20, COLUMNS)
    torch.testing.assert_close(y[:2], before[:2] + table[ids[:2]])
    assert torch.equal(y[2:], before[2:])


@pytest.mark.parametrize("shape", [(3, COLUMNS), (3, 2, COLUMNS)], ids=str)
def test_a_norm_is_replaced_where_the_expert_has_its_own(
    slots: Slots, shape: tuple[int, ...]
) -> None:
    x, y = torch.randn(*shape), torch.randn(*shape)
    before = y.clone()
    ops.NormDelta(slots, row_map([0, 1, -1]), True, 3, 1e-6)(y, x)
    weight = slots.vector(1, 3, COLUMNS)
    assert weight is not None
    unit = x[1] * torch.rsqrt(x[1].square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(y[1], unit * weight)
    assert torch.equal(y[0], before[0])
    assert torch.equal(y[2], before[2])


def test_an_expert_leaves_nothing_of_the_one_before(slots: Slots) -> None:
    slots.load(0, images()[1])
    x, fresh = torch.randn(1, COLUMNS), torch.zeros(1, sum(SIZES))
    reused = fresh.clone()
    ops.LinearDelta(slots, row_map([0]), True, [0, 1, 2], SIZES, COLUMNS)(reused, x)
    ops.LinearDelta(slots, row_map([1]), True, [0, 1, 2], SIZES, COLUMNS)(fresh, x)
    assert torch.equal(reused, fresh)
    assert slots.vector(0, 0, 12) is None


def test_a_slot_that_holds_nothing_changes_nothing(slots: Slots) -> None:
    slots.load(0, assemble({}, len(NAMES)))
    y = torch.ones(1, sum(SIZES))
    delta = ops.LinearDelta(slots, row_map([0]), True, [0, 1, 2], SIZES, COLUMNS)
    delta(y, torch.randn(1, COLUMNS))
    assert torch.equal(y, torch.ones(1, sum(SIZES)))


def test_every_slot_starts_on_a_cache_line() -> None:
    slots = Slots(3, 1000, NAMES, CPU)
    assert slots.slot_bytes == 1024
    assert slots.buffer.data_ptr() % 64 == 0


def test_a_part_of_a_batch_has_a_map_of_its_own() -> None:
    part = row_map([0, 1, 1, -1, 0]).span(1, 3)
    assert part.count == 3
    assert part.starts.tolist() == [1, 1, 3]
    assert part.order[:3].tolist() == [2, 0, 1]


def test_a_map_says_whether_any_row_belongs_to_a_slot() -> None:
    assert row_map([-1, 1]).active
    assert not row_map([-1, -1]).active
    assert not row_map([]).active


def test_rows_behind_the_batch_belong_to_nobody() -> None:
    rows = RowMap(6, 2, CPU)
    rows.update([0, 1, 0, 1])
    rows.update([1, 0])
    assert rows.slot_of_row.tolist() == [1, 0, -1, -1, -1, -1]
    assert rows.starts.tolist() == [0, 1, 2]
