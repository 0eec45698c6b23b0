"""The delta ops against a plain float64 computation."""

import pytest
import torch

from deltamux.serve.worker import ops
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import MatrixSlots, SlotPlan

ops.define_ops()

SLOTS = 3
CPU = torch.device("cpu")
# One rounding of the product and one of the sum, at values of order 10.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


def plan(dtype: torch.dtype) -> SlotPlan:
    return SlotPlan(slots=SLOTS, salient=2, dtype=dtype, device=CPU)


def row_map(slots_of_rows: list[int]) -> RowMap:
    rows = RowMap(len(slots_of_rows) + 5, SLOTS, CPU)
    rows.update(slots_of_rows)
    return rows


def arguments(rows: RowMap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rows.slot_of_row, rows.order, rows.starts


class Linear:
    """Random slots of a linear, and what they should compute."""

    def __init__(self, outputs: int, columns: int, dtype: torch.dtype, bias: bool = True) -> None:
        torch.manual_seed(outputs * columns)
        self.slots = MatrixSlots(plan(dtype), outputs, columns, 2, bias)
        self.levels = torch.zeros(SLOTS, *ops.padded_shape(outputs, columns), dtype=torch.int8)
        self.levels[:, :outputs, :columns] = torch.randint(-8, 8, (SLOTS, outputs, columns))
        for slot in range(SLOTS):
            self.slots.codes[slot] = ops.pack_for(CPU, self.levels[slot])
        self.slots.steps.copy_(torch.rand(SLOTS, outputs) * 0.05)
        self.slots.channels.copy_(torch.tensor([[0, 3], [1, 2], [4, 5]]))
        self.slots.values.copy_(torch.randn(SLOTS, outputs, 2) * 0.3)
        if self.slots.bias is not None:
            self.slots.bias.copy_(torch.randn(SLOTS, outputs))
        self.outputs, self.columns = outputs, columns

    def expected(self, y: torch.Tensor, x: torch.Tensor, slots_of_rows: list[int]) -> torch.Tensor:
        result = y.double()
        for row, slot in enumerate(slots_of_rows):
            if slot < 0:
                continue
            levels = self.levels[slot, : self.outputs, : self.columns].double()
            delta = levels * self.slots.steps[slot].double().unsqueeze(1)
            delta[:, self.slots.channels[slot]] += self.slots.values[slot].double()
            result[row] += delta @ x[row].double()
            if self.slots.bias is not None:
                result[row] += self.slots.bias[slot].double()
        return result

    def buffers(self) -> tuple[torch.Tensor | None, ...]:
        slots = self.slots
        return slots.codes, slots.steps, slots.channels, slots.values, slots.bias


MIXES = [[0], [-1], [0, 0, 0], [-1, 2, 0, -1, 2, 1], [1, 1, -1], [2, 1, 0] * 7]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("outputs", "columns"), [(16, 32), (48, 64), (50, 70), (7, 9), (33, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_adds_each_rows_own_delta(
    mix: list[int], outputs: int, columns: int, dtype: torch.dtype
) -> None:
    linear = Linear(outputs, columns, dtype)
    x = torch.randn(len(mix), columns, dtype=dtype)
    y = torch.randn(len(mix), outputs, dtype=dtype)
    expected = linear.expected(y, x, mix)
    actual = y.clone()
    torch.ops.deltamux.add_linear(actual, x, *arguments(row_map(mix)), *linear.buffers())
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=0.02)
    base = torch.tensor(mix) < 0
    assert torch.equal(actual[base], y[base])


def test_a_rows_result_does_not_depend_on_the_batch_around_it() -> None:
    linear = Linear(48, 64, torch.bfloat16)
    x, y = torch.randn(20, 64).bfloat16(), torch.randn(20, 48).bfloat16()
    mix = [0, 1, -1, 2] * 5
    together = y.clone()
    torch.ops.deltamux.add_linear(together, x, *arguments(row_map(mix)), *linear.buffers())
    for row, slot in enumerate(mix):
        alone = y[row : row + 1].clone()
        rows = arguments(row_map([slot]))
        torch.ops.deltamux.add_linear(alone, x[row : row + 1], *rows, *linear.buffers())
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("mix", MIXES)
def test_the_masked_path_equals_the_cpu_path(mix: list[int]) -> None:
    linear = Linear(50, 70, torch.float32)
    x, y = torch.randn(len(mix), 70), torch.randn(len(mix), 50)
    plain = torch.stack([ops.pack_nibbles(levels) for levels in linear.levels])
    masked = y.clone()
    ops.add_linear_masked(masked, x, *arguments(row_map(mix)), plain, *linear.buffers()[1:])
    torch.testing.assert_close(
        masked.double(), linear.expected(y, x, mix), atol=TOLERANCE[torch.float32], rtol=1e-4
    )


def test_nibbles_round_trip() -> None:
    levels = torch.randint(-8, 8, (5, 32), dtype=torch.int8)
    assert torch.equal(ops.unpack_nibbles(ops.pack_nibbles(levels), torch.int8), levels)


@pytest.mark.parametrize("mix", MIXES)
def test_embedding_adds_each_tokens_own_row(mix: list[int]) -> None:
    torch.manual_seed(0)
    levels = torch.randint(-8, 8, (SLOTS, 16, 32), dtype=torch.int8)
    codes = torch.stack([ops.pack_nibbles(each) for each in levels])
    steps = torch.rand(SLOTS, 16)
    ids = torch.randint(0, 16, (len(mix),))
    y = torch.randn(len(mix), 30)
    actual = y.clone()
    torch.ops.deltamux.add_embedding(actual, ids, *arguments(row_map(mix)), codes, steps)
    for row, slot in enumerate(mix):
        expected = y[row]
        if slot >= 0:
            token = ids[row]
            expected = y[row] + levels[slot, token, :30] * steps[slot, token]
        torch.testing.assert_close(actual[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [None, 3])
def test_a_replaced_norm_is_recomputed_for_its_slots_rows_only(heads: int | None) -> None:
    shape = (4, 8) if heads is None else (4, heads, 8)
    x, y = torch.randn(shape), torch.randn(shape)
    weights = torch.randn(SLOTS, 8)
    replaced = torch.tensor([True, False, True])
    actual = y.clone()
    rows = arguments(row_map([0, 1, -1, 2]))
    torch.ops.deltamux.replace_norm(actual, x, *rows, weights, replaced, 1e-6)
    unit = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    for row, slot in ((0, 0), (3, 2)):
        torch.testing.assert_close(actual[row], unit[row] * weights[slot])
    assert torch.equal(actual[1:3], y[1:3])


def test_the_ops_are_opaque_to_the_compiler() -> None:
    linear = Linear(16, 32, torch.float32)
    rows = row_map([0, -1])
    x, y = torch.randn(2, 32), torch.randn(2, 16)

    def step(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = y * 1
        torch.ops.deltamux.add_linear(out, x, *arguments(rows), *linear.buffers())
        return out * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(y, x), step(y, x))
    rows.update([2, 1])
    torch.testing.assert_close(compiled(y, x), step(y, x))


def test_the_schemas_say_what_the_ops_write() -> None:
    linear = Linear(16, 32, torch.float32)
    sample = (torch.randn(2, 16), torch.randn(2, 32), *arguments(row_map([0, -1])))
    torch.library.opcheck(
        torch.ops.deltamux.add_linear.default,
        (*sample, *linear.buffers()),
        test_utils=("test_schema", "test_faketensor"),
    )
