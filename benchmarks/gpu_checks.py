"""Products on a GPU against dense ones, on layers of Mistral-7B's shapes."""

from collections.abc import Iterator

import torch

from benchmarks.gpu_images import Matrix, dense, pack, random_escapes, random_plane, rows_by_slot
from benchmarks.gpu_model import MISTRAL, Batch, Linear
from deltamux.serve.worker import triton_product
from deltamux.serve.worker.triton_dense import launch_dense
from deltamux.serve.worker.triton_launch import Tiling, launch_product

SLOTS = 16
# bfloat16 rounds y once: its last place is 2^-8 of a value, half of it the error.
BOUND = 2**-8
CUDA = torch.device("cuda")


def launch(  # noqa: PLR0917
    linear: Linear, batch: Batch, slots: torch.Tensor, entries: tuple[int, ...],
    x: torch.Tensor, y: torch.Tensor, tiling: Tiling | None = None,
) -> None:  # fmt: skip
    launch_product(
        y, x, batch.slot_of_row, batch.order, batch.starts, slots, entries, linear.sizes, 0, False,
        triton_product.capabilities(CUDA), tiling,
    )  # fmt: skip


def tensors(linear: Linear, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch.rows, linear.columns, dtype=torch.bfloat16, device=CUDA)
    return x, torch.zeros(batch.rows, linear.outputs, dtype=torch.bfloat16, device=CUDA)


def check_layers() -> float:
    """Largest error of random layers against dense products; raises where it is too large."""
    generator = torch.Generator("cuda").manual_seed(1)
    errors: list[float] = []
    for linear in (MISTRAL[0], MISTRAL[3]):
        experts = [expert(linear, kind, generator) for kind in range(3)]
        images = [pack(each) for each in experts]
        slots = torch.zeros(SLOTS, max(map(len, images)), dtype=torch.uint8, device=CUDA)
        for slot, image in zip(slots, images, strict=False):
            slot[: len(image)] = image
        deltas = [torch.cat([dense(matrix) for matrix in each]).double() for each in experts]
        errors += [*product_errors(linear, slots, deltas), *merge_errors(linear, slots, deltas)]
    # An error that is no number is none below the bound.
    if not all(error < BOUND for error in errors):
        raise SystemExit(f"products are wrong: errors {errors}, at most {BOUND:.2e}")
    return max(errors)


def product_errors(
    linear: Linear, slots: torch.Tensor, deltas: list[torch.Tensor]
) -> Iterator[float]:
    """Of rows alone, mixed, and more of a slot than a group has."""
    for rows in ([2], [0, 0, 2, -1, 1, 2, 2, 1, 1, -1, 0], [1] * 21 + [-1, 2]):
        batch = Batch(len(rows), *rows_by_slot(rows, SLOTS, CUDA))
        x, y = tensors(linear, batch)
        launch(linear, batch, slots, tuple(range(len(linear.sizes))), x, y)
        expected = torch.stack(
            [
                deltas[slot] @ row.double() if slot >= 0 else torch.zeros_like(deltas[0][:, 0])
                for slot, row in zip(rows, x, strict=True)
            ]
        )
        yield float((y - expected).norm() / expected.norm())


def merge_errors(
    linear: Linear, slots: torch.Tensor, deltas: list[torch.Tensor]
) -> Iterator[float]:
    """Of merged weights."""
    weight = torch.randn(linear.outputs, linear.columns, dtype=torch.bfloat16, device=CUDA)
    merged = torch.full_like(weight, float("nan"))
    for slot, delta in enumerate(deltas):
        start = 0
        for entry, size in enumerate(linear.sizes):
            part = slice(start, start + size)
            launch_dense(merged[part], slots, slot, entry, weight[part], rank=False)
            start += size
        expected = weight.double() + delta
        yield float((merged - expected).norm() / expected.norm())


def expert(linear: Linear, kind: int, generator: torch.Generator) -> list[Matrix | None]:
    """One plane with escapes; two planes; one plane with row steps and escapes."""
    made: list[Matrix | None] = []
    for rows in linear.sizes:
        planes = [random_plane(rows, linear.columns, generator) for _ in range(1 + (kind == 1))]
        matrix = Matrix(rows, linear.columns, planes, 8.0 if kind == 1 else 1.0, 0.01)
        if kind != 1:
            matrix.escapes = random_escapes(rows, linear.columns, 0.007, generator)
        if kind == 2:
            matrix.steps = (torch.rand(rows, device=CUDA, generator=generator) * 0.01).bfloat16()
        made.append(matrix)
    return made
