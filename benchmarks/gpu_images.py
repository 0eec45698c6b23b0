"""Random slot images, and what they mean as dense matrices: for benchmarks and tests of the product.

An independent reading of the image's layout: nothing here is imported from the package.
Shapes: N output rows, R rows with codes, K columns, C channels, E escapes.
"""

from dataclasses import dataclass, field

import torch

MAGIC = 0x584D4C44
UNIT = 64
BLOCK = 4096


@dataclass
class Matrix:
    """One record's content.

    Attributes:
        planes: uint8 [R, stride] each, lowest bits first.
        escapes: (row of codes, column, d), each int64 [E], in the order of rows and columns.
        coded: bool [N], which rows have codes; None: all.
        channels: Ascending columns, and bfloat16 values [N, C].
        factors: A [r, K] and B [N, r] of one kind, with steps for int8.
        vector: float32 [N].
    """

    rows: int
    columns: int
    planes: list[torch.Tensor] = field(default_factory=list)
    zero: float = 1.0
    step: float = 1.0
    steps: torch.Tensor | None = None
    escapes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    coded: torch.Tensor | None = None
    channels: tuple[torch.Tensor, torch.Tensor] | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    factor_steps: tuple[torch.Tensor, torch.Tensor] | None = None
    vector: torch.Tensor | None = None

    @property
    def coded_rows(self) -> int:
        """Rows that have codes."""
        return self.rows if self.coded is None else int(self.coded.sum())


def stride_of(columns: int) -> int:
    return 16 * -(-columns // 64)


def random_plane(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform codes; padding columns hold nought."""
    device = generator.device
    plane = torch.randint(
        0, 256, (rows, stride_of(columns)), generator=generator, device=device, dtype=torch.uint8
    )
    plane[:, -(-columns // 4) :] = 0
    if columns % 4:
        plane[:, columns // 4] &= (1 << 2 * (columns % 4)) - 1
    return plane


def random_escapes(
    rows: int, columns: int, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """About `share` of all weights, at random places, some columns twice, rows' ends among them."""
    device = generator.device
    count = max(4, int(share * rows * columns))
    at = torch.randint(0, rows * columns, (count,), generator=generator, device=device)
    ends = torch.tensor([0, 0, columns - 1, rows * columns - 1], device=device)
    at = torch.cat((at, ends)).sort().values
    d = torch.randint(1, 8, (len(at),), generator=generator, device=device)
    sign = torch.randint(0, 2, (len(at),), generator=generator, device=device) * 2 - 1
    return at // columns, at % columns, d * sign


def dense(matrix: Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The delta of a matrix [N, K], without its vector."""
    device = _device_of(matrix)
    rows = matrix.coded_rows
    level = torch.zeros(rows, matrix.columns, dtype=dtype, device=device)
    for place, plane in enumerate(matrix.planes):
        codes = torch.stack([(plane >> 2 * q) & 3 for q in range(4)], dim=-1).flatten(1)
        level += codes[:, : matrix.columns].to(dtype) * 4**place
    if matrix.planes:
        level -= matrix.zero
    if matrix.escapes is not None:
        row, column, d = matrix.escapes
        level.index_put_((row, column), d.to(dtype), accumulate=True)
    steps = matrix.step if matrix.steps is None else matrix.steps.to(dtype)[:, None]
    level *= steps
    if matrix.coded is None:
        result = level
    else:
        result = torch.zeros(matrix.rows, matrix.columns, dtype=dtype, device=device)
        result[matrix.coded] = level
    if matrix.channels is not None:
        result[:, matrix.channels[0]] += matrix.channels[1].to(dtype)
    if matrix.factors is not None:
        right, left = (part.to(dtype) for part in matrix.factors)
        if matrix.factor_steps is not None:
            right *= matrix.factor_steps[0].to(dtype)[:, None]
            left *= matrix.factor_steps[1].to(dtype)[:, None]
        result += left @ right
    return result


def _device_of(matrix: Matrix) -> torch.device:
    for part in (*matrix.planes, *(matrix.escapes or ()), *(matrix.channels or ())):
        return part.device
    for part in (matrix.vector, *(matrix.factors or ())):
        if part is not None:
            return part.device
    return torch.device("cpu")


class _Sections:
    """Sections of an image in the making, each at a multiple of 64 bytes."""

    def __init__(self, head: int) -> None:
        self.end = -(-head // UNIT) * UNIT
        self.parts: list[tuple[int, torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> int:
        """Place a tensor; its offset in units of 64 bytes."""
        data = tensor.contiguous().view(torch.uint8).flatten()
        start = self.end
        self.parts.append((start, data))
        self.end += -(-max(len(data), 1) // UNIT) * UNIT
        return start // UNIT


def pack(matrices: list[Matrix | None]) -> torch.Tensor:
    """An image of these records, uint8, on the device of the matrices; None: nothing changes."""
    sections = _Sections(128 + 128 * len(matrices))
    table = torch.zeros(len(matrices) + 1, 32, dtype=torch.int32)
    for record, matrix in zip(table[1:], matrices, strict=True):
        if matrix is not None:
            _fill(record, matrix, sections)
    size = -(-sections.end // 256) * 256
    table[0, :4] = torch.tensor([MAGIC, 1, len(matrices), size // UNIT], dtype=torch.int32)
    device = next((_device_of(m) for m in matrices if m is not None), torch.device("cpu"))
    image = torch.zeros(size, dtype=torch.uint8, device=device)
    image[: table.numel() * 4] = table.view(torch.uint8).flatten().to(device)
    for start, data in sections.parts:
        image[start : start + len(data)] = data
    return image


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _fill(record: torch.Tensor, matrix: Matrix, sections: _Sections) -> None:
    rows, blocks = matrix.coded_rows, -(-matrix.columns // BLOCK)
    record[:4] = torch.tensor(
        [len(matrix.planes), rows, matrix.columns, stride_of(matrix.columns)], dtype=torch.int32
    )
    for place, plane in enumerate(matrix.planes):
        record[4 + place] = sections.add(plane)
    record[6], record[7], record[11] = _bits(matrix.zero), _bits(matrix.step), blocks
    if matrix.steps is not None:
        record[8] = sections.add(matrix.steps)
    if matrix.escapes is not None:
        row, column, d = matrix.escapes
        of_block = torch.bincount(row * blocks + column // BLOCK, minlength=rows * blocks)
        starts = torch.nn.functional.pad(of_block.cumsum(0), (1, 0))
        record[9] = sections.add(starts.to(torch.int32))
        entries = (column % BLOCK | (d + 8) << 12).to(torch.int32)
        record[10] = sections.add((entries - (entries >= 1 << 15).int() * (1 << 16)).short())
    if matrix.coded is not None:
        record[12] = sections.add(_row_map(matrix.coded))
    if matrix.channels is not None:
        record[13] = len(matrix.channels[0])
        record[14] = sections.add(matrix.channels[0].to(torch.int32))
        record[15] = sections.add(matrix.channels[1].to(torch.bfloat16))
    if matrix.factors is not None:
        right, left = matrix.factors
        kinds = {torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
        record[16], record[17] = right.shape[0], kinds[right.dtype]
        record[18], record[19] = sections.add(right), sections.add(left)
        for place, steps in enumerate(matrix.factor_steps or ()):
            record[20 + place] = sections.add(steps.float())
    if matrix.vector is not None:
        record[22] = sections.add(matrix.vector.float())


def _row_map(coded: torch.Tensor) -> torch.Tensor:
    words = -(-len(coded) // 32)
    bits = torch.zeros(words * 32, dtype=torch.int64, device=coded.device)
    bits[: len(coded)] = coded.long()
    bits = bits.view(words, 32)
    weight = torch.ones(32, dtype=torch.int64, device=coded.device) << torch.arange(
        32, device=coded.device
    )
    rank = torch.nn.functional.pad(bits.sum(1).cumsum(0), (1, 0))[:-1]
    word = (bits * weight).sum(1)
    word = word - (word >= 1 << 31).long() * (1 << 32)
    return torch.stack((word, rank), dim=1).to(torch.int32)


def rows_by_slot(
    slots_of_rows: list[int], slots: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """slot_of_row, order and starts of a batch, int32."""
    rows = torch.tensor(slots_of_rows, dtype=torch.int64)
    grouped = torch.sort(rows, stable=True)
    starts = torch.searchsorted(grouped.values, torch.arange(slots + 1))
    return tuple(t.to(torch.int32).to(device) for t in (rows, grouped.indices, starts))
