"""Mistral-7B's linears with random weights and random experts, for timing on a GPU.

Shapes: L layers, S slots, T rows of a batch, N outputs, K inputs.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks.gpu_images import Matrix, pack, random_escapes, random_plane, rows_by_slot


@dataclass(frozen=True)
class Linear:
    """One linear as the engine has it: slices that share an input."""

    name: str
    columns: int
    sizes: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """Rows of all slices."""
        return sum(self.sizes)


MISTRAL = (
    Linear("qkv", 4096, (4096, 1024, 1024)),
    Linear("o", 4096, (4096,)),
    Linear("gate_up", 4096, (14336, 14336)),
    Linear("down", 14336, (4096,)),
)
LAYERS = 32


@dataclass(frozen=True)
class Experts:
    """Slots that hold experts, all with the same random content.

    Attributes:
        slots: uint8 [S, bytes].
        layers: Layers that the image has.
        delta_bytes: Bytes of one linear's planes, escapes and starts.
    """

    slots: torch.Tensor
    layers: int
    delta_bytes: dict[str, int]

    def entries(self, layer: int, linear: Linear) -> tuple[int, ...]:
        """Records of a linear's slices."""
        before = 0
        for other in MISTRAL:
            if other.name == linear.name:
                break
            before += len(other.sizes)
        total = sum(len(other.sizes) for other in MISTRAL)
        return tuple(layer * total + before + part for part in range(len(linear.sizes)))


def random_experts(slots: int, layers: int, share: float = 0.007, seed: int = 0) -> Experts:
    """Experts of one plane, one step a matrix, and escapes at `share` of the weights."""
    generator = torch.Generator("cuda").manual_seed(seed)
    matrices: list[Matrix | None] = []
    sizes: dict[str, int] = {}
    for layer in range(layers):
        for linear in MISTRAL:
            for rows in linear.sizes:
                plane = random_plane(rows, linear.columns, generator)
                matrix = Matrix(rows, linear.columns, planes=[plane], zero=1.0, step=5e-4)
                matrix.escapes = random_escapes(rows, linear.columns, share, generator)
                matrices.append(matrix)
                if layer == 0:
                    blocks = -(-linear.columns // 4096)
                    extra = 2 * len(matrix.escapes[0]) + 4 * (rows * blocks + 1)
                    sizes[linear.name] = sizes.get(linear.name, 0) + plane.numel() + extra
                matrix.escapes = tuple(part.to(torch.int32) for part in matrix.escapes)
    image = pack([replace(m, escapes=tuple(p.long() for p in m.escapes)) for m in matrices if m])
    del matrices
    held = torch.empty(slots, len(image), dtype=torch.uint8, device="cuda")
    held.copy_(image.expand(slots, -1))
    return Experts(held, layers, sizes)


@dataclass(frozen=True)
class Batch:
    """Rows of a batch: which slot each belongs to, on the device; `starts` also on the host."""

    rows: int
    slot_of_row: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor

    @cached_property
    def host(self) -> torch.Tensor:
        """Where each slot's rows begin, on the CPU."""
        return self.starts.cpu().long()


def batch_of(active: int, each: int, slots: int) -> Batch:
    """`each` rows for each of the first `active` slots, mixed."""
    owners = [slot for _ in range(each) for slot in range(active)]
    return Batch(len(owners), *rows_by_slot(owners, slots, torch.device("cuda")))
