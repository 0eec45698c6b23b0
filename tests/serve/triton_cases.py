"""Products of slots in Triton's interpreter against dense matrices; run by test_triton_product.py.

Prints one JSON line a case: its name, its largest error in units of the last place that y's type has
at the row's largest value, and whether rows of the base kept their bits. Runs in a process of its own, because
Triton decides at its import whether it interprets.
"""

import json
import os
from dataclasses import dataclass, field, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_images import (
    Matrix,
    dense,
    pack,
    random_escapes,
    random_plane,
    rows_by_slot,
)
from deltamux.serve.worker import triton_product
from deltamux.serve.worker.triton_dense import launch_dense
from deltamux.serve.worker.triton_launch import Capabilities, Tiling, launch_product
from deltamux.serve.worker.triton_parts import room_for_sums

CPU = torch.device("cpu")
PLAIN = Capabilities(assembly=False, early_start=False)
SPLIT = Tiling(rows=16, split=4, width=32, warps=4, fetch=True)
SHARED = Tiling(rows=16, bytes=32, bytes_many=32, stages_many=2, halvings=3)
EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = (40,)
    columns: int = 200
    rows: tuple[int, ...] = (-1, 0, 1, 0, -1)
    dtype: torch.dtype = torch.bfloat16
    tiling: Tiling | None = None
    mapped: bool = False
    content: dict[str, Any] = field(default_factory=dict)


CASES = {
    "one row": Case(rows=(1,)),
    "rows of slots and of the base": Case(),
    "an empty slot": Case(rows=(2, 0, 0)),
    "a batch of the base": Case(rows=(-1, -1, -1)),
    "more rows of a slot than a group has": Case(rows=(0,) * 18 + (1,), columns=64),
    "three slices": Case(sizes=(40, 16, 24), rows=(0, 1, 1)),
    "rows and columns that fill no tile": Case(sizes=(37,), columns=130),
    "columns of two blocks": Case(
        sizes=(12,), columns=4200, rows=(0, 1, 1), content={"share": 0.005}
    ),
    "row steps": Case(content={"steps": True}),
    "two planes": Case(content={"planes": 2, "zero": 7.5, "share": 0}),
    "two planes and escapes": Case(content={"planes": 2, "zero": 8.0}),
    "no plane, escapes alone": Case(content={"planes": 0, "share": 0.05}),
    "many escapes": Case(sizes=(12,), columns=100, content={"share": 0.5}),
    "no escapes": Case(content={"share": 0}),
    "channels": Case(content={"channels": 5}),
    "a bias": Case(content={"vector": True}),
    "a bias alone": Case(content={"vector": True, "planes": 0, "share": 0}),
    "some rows coded": Case(sizes=(100,), columns=64, mapped=True, content={"coded": 0.3}),
    "rows without any coded": Case(sizes=(100,), columns=64, mapped=True, content={"coded": 0}),
    "a table with all rows coded": Case(mapped=True),
    "factors in bfloat16": Case(sizes=(40, 24), columns=200, content={"factors": torch.bfloat16}),
    "factors in float32": Case(sizes=(40, 24), columns=200, content={"factors": torch.float32}),
    "coded factors": Case(sizes=(40, 24), columns=200, content={"factors": torch.int8}),
    "float16": Case(dtype=torch.float16),
    "float32": Case(dtype=torch.float32),
    "split rows": Case(rows=(0, 1), tiling=SPLIT),
    "split rows that fill no run": Case(columns=130, rows=(0, 1), tiling=SPLIT),
    "split groups": Case(rows=(0, 0, 1, 0), tiling=SPLIT),
    "a slot's rows shared out": Case(columns=1000, rows=(0,) * 5, tiling=SHARED),
    "groups of one row shared out": Case(columns=1000, rows=(-1,) * 6 + (0, 1), tiling=SHARED),
    "more parts than steps": Case(columns=130, rows=(1, 1, -1), tiling=SHARED),
    "two planes shared out": Case(
        columns=1000, rows=(0, 1, 1), tiling=SHARED, content={"planes": 2, "zero": 8.0}
    ),
    "all kinds shared out": Case(
        sizes=(37, 20),
        columns=600,
        rows=(0, 0, -1, 1),
        tiling=SHARED,
        content={"steps": True, "channels": 3, "vector": True},
    ),
    "unrolled": Case(columns=1000, rows=(0,), tiling=Tiling(rows=16, bytes=32, unroll=2)),
}


def random_matrix(rows: int, columns: int, generator: torch.Generator, **content: Any) -> Matrix:
    asked = {"planes": 1, "zero": 1.0, "share": 0.02} | content
    coded = None
    if "coded" in asked:
        coded = torch.rand(rows, generator=generator) < asked["coded"]
    count = rows if coded is None else int(coded.sum())
    planes = [random_plane(count, columns, generator) for _ in range(asked["planes"])]
    matrix = Matrix(rows, columns, planes, asked["zero"], 0.01, coded=coded)
    if asked["share"] and count:
        matrix.escapes = random_escapes(count, columns, asked["share"], generator)
    if asked.get("steps"):
        matrix.steps = (torch.rand(count, generator=generator) * 0.01).bfloat16()
    if number := asked.get("channels"):
        index = torch.randperm(columns, generator=generator)[:number].sort().values
        values = (torch.randn(rows, number, generator=generator) * 0.01).bfloat16()
        matrix.channels = index, values
    if asked.get("vector"):
        matrix.vector = torch.randn(rows, generator=generator)
    if kind := asked.get("factors"):
        add_factors(matrix, kind, generator)
    return matrix


def add_factors(matrix: Matrix, kind: torch.dtype, generator: torch.Generator) -> None:
    right = torch.randn(19, matrix.columns, generator=generator) * 0.1
    left = torch.randn(matrix.rows, 19, generator=generator) * 0.1
    if kind == torch.int8:
        steps = torch.rand(19, generator=generator), torch.rand(matrix.rows, generator=generator)
        matrix.factor_steps = steps[0] * 0.01, steps[1] * 0.01
        right, left = right * 100, left * 100
    matrix.factors = right.to(kind), left.to(kind)


def slots_of(experts: list[list[Matrix]]) -> torch.Tensor:
    """One slot an expert and one that is empty; record 0 is another weight's."""
    images = [pack([None, *expert]) for expert in experts]
    slots = torch.zeros(len(images) + 1, max(map(len, images)), dtype=torch.uint8)
    for slot, image in zip(slots, images, strict=False):
        slot[: len(image)] = image
    return slots


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a row over the row's largest value."""
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    return float(((found.double() - expected).abs() / scale).max())


def check(case: Case) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    experts = [
        [random_matrix(size, case.columns, generator, **case.content) for size in case.sizes]
        for _ in range(2)
    ]
    slots = slots_of(experts)
    rows = list(case.rows)
    slot_of_row, order, starts = rows_by_slot(rows, len(slots), CPU)
    x = torch.randn(len(rows), case.columns, generator=generator).to(case.dtype)
    base = torch.randn(len(rows), sum(case.sizes), generator=generator).to(case.dtype)
    expected = base.double()
    for row, slot in enumerate(rows):
        if 0 <= slot < len(experts):
            delta = torch.cat([dense(matrix, torch.float64) for matrix in experts[slot]])
            expected[row] += delta @ x[row].double()
            for start, matrix in zip(starts_of(case.sizes), experts[slot], strict=True):
                if matrix.vector is not None:
                    expected[row, start : start + matrix.rows] += matrix.vector.double()
    y = base.clone()
    entries = tuple(range(1, len(case.sizes) + 1))
    launch_product(
        y, x, slot_of_row, order, starts, slots, entries, case.sizes, 32 if "factors" in case.content else 0,
        case.mapped, PLAIN, case.tiling,
    )  # fmt: skip
    kept = [row for row, slot in enumerate(rows) if slot < 0]
    return {"error": relative_error(y, expected), "kept": torch.equal(y[kept], base[kept])}


def starts_of(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]


def same_whatever_the_batch() -> dict[str, object]:
    """A row's bits alone, in a batch of its slot, in a mixed one, and under another tiling."""
    generator = torch.Generator().manual_seed(1)
    content = {"steps": True, "channels": 3, "vector": True}
    slots = slots_of([[random_matrix(48, 300, generator, **content)] for _ in range(2)])
    x = torch.randn(20, 300, generator=generator).bfloat16()
    y = torch.randn(20, 48, generator=generator).bfloat16()
    found = []
    for rows, tiling in (
        ([0], None), ([0], SPLIT), ([0] * 5, None), ([0, -1, 1, 0], None), ([0] * 18, None),
        ([0] * 5, SHARED), ([0, -1, 1, -1, -1], SHARED), ([0, 1] * 9, SHARED),
    ):  # fmt: skip
        where = rows_by_slot(rows, len(slots), CPU)
        out = y[: len(rows)].clone()
        launch_product(out, x[: len(rows)], *where, slots, (1,), (48,), 0, False, PLAIN, tiling)
        found.append(out[0])
    return {"same": all(torch.equal(found[0], other) for other in found[1:])}


def merged_weights() -> dict[str, object]:
    """W + Δ̂ in one matrix, rounded once, and a bias with its difference."""
    generator = torch.Generator().manual_seed(2)
    errors = []
    for rows, columns, content in (
        (10, 330, {"share": 0.3}), (10, 330, {"planes": 2, "zero": 8.0}), (10, 330, {"channels": 4}),
        (10, 330, {"planes": 0, "share": 0.1}), (10, 330, {"factors": torch.float32}),
        (6, 4200, {"share": 0.02, "steps": True}),
    ):  # fmt: skip
        matrix = random_matrix(rows, columns, generator, vector=True, **content)
        slots = slots_of([[matrix]])
        weight = torch.randn(rows, columns, generator=generator).bfloat16()
        bias = torch.randn(rows, generator=generator).bfloat16()
        assert matrix.vector is not None
        # A kernel without factors merges all records that have none.
        for rank in {True, "factors" in content}:
            out, bias_out = torch.empty_like(weight), torch.empty_like(bias)
            launch_dense(out, slots, 0, 1, weight, (bias_out, bias), rank=rank)
            # A channel is added to the rounded weight.
            roundings = 2 if "channels" in content else 1
            expected = weight.double() + dense(matrix, torch.float64)
            errors.append(relative_error(out, expected) / roundings)
            expected = bias.double() + matrix.vector
            errors.append(relative_error(bias_out[None], expected[None]))
    return {"error": max(errors)}


def long_prompts() -> dict[str, object]:
    """Base and delta in one: a slot with many rows by its merged weight, others by codes."""
    generator = torch.Generator().manual_seed(3)
    experts = [[random_matrix(24, 64, generator, vector=True)] for _ in range(2)]
    slots = slots_of(experts)
    triton_product.MERGE_ROWS = 20
    weight = torch.randn(24, 64, generator=generator).bfloat16()
    bias = torch.randn(24, generator=generator).bfloat16()
    errors = []
    for rows in ([0] * 30, [0] * 25 + [1, -1, 1] + [-1] * 3, [1] * 22 + [0] * 24):
        slot_of_row, order, starts = rows_by_slot(rows, len(slots), CPU)
        x = torch.randn(len(rows) + 2, 64, generator=generator).bfloat16()
        y = triton_product.linear(
            x, weight, bias, slot_of_row, order, starts, starts.long(), slots, [1], [24], 0
        )
        expected = x.double() @ weight.double().T + bias.double()
        for row, slot in enumerate(rows):
            if slot >= 0:
                matrix = experts[slot][0]
                expected[row] += dense(matrix, torch.float64) @ x[row].double() + matrix.vector
        errors.append(relative_error(y, expected))
    return {"error": max(errors)}


def embedding_rows() -> dict[str, object]:
    generator = torch.Generator().manual_seed(4)
    tables = [
        random_matrix(90, 200, generator, share=0.1, coded=0.4),
        random_matrix(90, 200, generator, share=0.1, steps=True, channels=3),
    ]
    slots = slots_of([[table] for table in tables])
    ids = torch.randint(0, 90, (12,), generator=generator)
    ids[0] = 95
    slot_of_row = torch.tensor([0, 1, -1, 2] * 3, dtype=torch.int32)
    base = torch.randn(12, 200, generator=generator)
    expected, y = base.double(), base.clone()
    for row, slot in enumerate(slot_of_row.tolist()):
        if 0 <= slot < 2 and ids[row] < 90:
            expected[row] += dense(tables[slot], torch.float64)[ids[row]]
    triton_product.add_embedding(y, ids, slot_of_row, slots, 1, 90)
    kept = [0, 2, 6, 10]
    return {"error": relative_error(y, expected), "kept": torch.equal(y[kept], base[kept])}


def norms() -> dict[str, object]:
    generator = torch.Generator().manual_seed(5)
    own = Matrix(64, 64, vector=torch.randn(64, generator=generator))
    slots = slots_of([[own], [replace(own, vector=None)]])
    x = torch.randn(4, 3, 64, generator=generator).bfloat16()
    base = torch.randn(4, 3, 64, generator=generator).bfloat16()
    y = base.clone()
    slot_of_row = torch.tensor([0, 1, -1, 0], dtype=torch.int32)
    triton_product.replace_norm(y, x, slot_of_row, slots, 1, EPSILON)
    wide = x[[0, 3]].double()
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON)
    assert own.vector is not None
    error = relative_error(y[[0, 3]], unit * own.vector.double())
    return {"error": error, "kept": torch.equal(y[1:3], base[1:3])}


def main() -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(json.dumps({"case": name, **check(case)}))
        # What programs add to is left as it was found, for the next launch.
        assert not room_for_sums(CPU).any(), name
    for work in (same_whatever_the_batch, merged_weights, long_prompts, embedding_rows, norms):
        print(json.dumps({"case": work.__name__, **work()}))


if __name__ == "__main__":
    main()
