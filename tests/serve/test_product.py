"""The product with slots' deltas: the compiled kernel and the torch path against the definition.

Slot images are made here field by field, an independent reading of their layout.
"""

import ctypes
import logging
import math
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from deltamux.compression.image.native import load_library
from deltamux.serve.worker import native
from deltamux.serve.worker.rows import RowMap

BLOCK = 4096


@dataclass
class Weight:
    """What one weight of an image holds; all that is None is absent.

    `codes` are uint8 [R, K] below 4 or 16, `escapes` (row, column, d) in any order.
    """

    rows: int
    columns: int
    planes: int = 0
    codes: torch.Tensor | None = None
    zero: float = 0.0
    step: float = 1.0
    steps: torch.Tensor | None = None
    escapes: list[tuple[int, int, int]] = field(default_factory=list)
    coded: torch.Tensor | None = None  # bool [N]
    channels: torch.Tensor | None = None
    values: torch.Tensor | None = None
    right: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right_steps: torch.Tensor | None = None
    left_steps: torch.Tensor | None = None
    vector: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """Δ̂ in float64, from the definition."""
        delta = torch.zeros(self.rows, self.columns, dtype=torch.float64)
        coded_rows = self.rows if self.coded is None else int(self.coded.sum())
        levels = torch.zeros(coded_rows, self.columns, dtype=torch.float64)
        if self.planes:
            assert self.codes is not None
            levels += self.codes.double() - self.zero
        for row, column, extra in self.escapes:
            levels[row, column] += extra
        step = self.step if self.steps is None else self.steps.double().unsqueeze(1)
        if self.planes or self.escapes:
            if self.coded is None:
                delta += levels * step
            else:
                delta[self.coded] += levels * step
        if self.channels is not None:
            assert self.values is not None
            delta[:, self.channels.long()] += self.values.double()
        if self.right is not None:
            assert self.left is not None
            right, left = self.right.double(), self.left.double()
            if self.right_steps is not None and self.left_steps is not None:
                right *= self.right_steps.double().unsqueeze(1)
                left *= self.left_steps.double().unsqueeze(1)
            delta += left @ right
        return delta


class _Sections:
    """Sections behind one another, each from a multiple of 64 bytes on."""

    def __init__(self, start: int) -> None:
        self.content = bytearray(start)

    def add(self, tensor: torch.Tensor | None) -> int:
        """Append a tensor; its offset in units of 64 bytes."""
        if tensor is None:
            return 0
        self.content.extend(bytes(-len(self.content) % 64))
        offset = len(self.content) // 64
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        self.content.extend(raw.numpy().tobytes())
        return offset


def pack_plane(codes: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 64) * 64, dtype=torch.int32)
    padded[:, :columns] = codes
    quads = padded.view(rows, -1, 4)
    return (quads << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)


def build_image(weights: list[Weight | None]) -> torch.Tensor:
    """One expert's image, uint8 [bytes]; None: a weight that does not change."""
    table_end = 128 + 128 * len(weights)
    sections = _Sections(table_end)
    for index, weight in enumerate(weights):
        if weight is None:
            continue
        record = struct.pack("<6i2f24i", *_record(weight, sections))
        sections.content[128 + 128 * index : 256 + 128 * index] = record
    sections.content.extend(bytes(-len(sections.content) % 256))
    header = struct.pack("<4i", 0x584D4C44, 1, len(weights), len(sections.content) // 64)
    sections.content[: len(header)] = header
    return torch.frombuffer(sections.content, dtype=torch.uint8)


def _record(weight: Weight, sections: _Sections) -> list[float]:
    fields: list[float] = [0] * 32
    coded_rows = weight.rows if weight.coded is None else int(weight.coded.sum())
    blocks = -(-weight.columns // BLOCK)
    fields[0] = weight.planes
    fields[1], fields[2] = coded_rows, weight.columns
    fields[3] = 16 * -(-weight.columns // 64)
    for plane in range(weight.planes):
        assert weight.codes is not None
        fields[4 + plane] = sections.add(pack_plane(weight.codes.int() >> (2 * plane) & 3))
    fields[6], fields[7] = weight.zero, weight.step
    fields[8] = sections.add(weight.steps)
    fields[11] = blocks
    if weight.escapes:
        cells = sorted(
            (row * blocks + column // BLOCK, column % BLOCK, extra)
            for row, column, extra in weight.escapes
        )
        counts = torch.zeros(coded_rows * blocks + 1, dtype=torch.int32)
        for cell, _, _ in cells:
            counts[cell + 1] += 1
        fields[9] = sections.add(counts.cumsum(0).to(torch.int32))
        packed = [column | (extra + 8) << 12 for _, column, extra in cells]
        fields[10] = sections.add(torch.tensor(packed, dtype=torch.int32).to(torch.int16))
    if weight.coded is not None:
        fields[12] = sections.add(_row_map(weight.coded))
    if weight.channels is not None:
        fields[13] = len(weight.channels)
        fields[14] = sections.add(weight.channels.to(torch.int32))
        fields[15] = sections.add(weight.values)
    if weight.right is not None:
        fields[16] = len(weight.right)
        kinds = {torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
        fields[17] = kinds[weight.right.dtype]
        fields[18], fields[19] = sections.add(weight.right), sections.add(weight.left)
        fields[20], fields[21] = sections.add(weight.right_steps), sections.add(weight.left_steps)
    fields[22] = sections.add(weight.vector)
    return fields


def _row_map(coded: torch.Tensor) -> torch.Tensor:
    words, rank = [], 0
    for start in range(0, len(coded), 32):
        bits = sum(1 << i for i, bit in enumerate(coded[start : start + 32].tolist()) if bit)
        words.append([bits - (bits >> 31 << 32), rank])
        rank += bits.bit_count()
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def slots_of(images: list[torch.Tensor | None]) -> torch.Tensor:
    """Slots with these images, uint8 [S, bytes], the first byte at a multiple of 64."""
    size = max((len(image) for image in images if image is not None), default=256)
    room = torch.zeros(len(images) * size + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    slots = room[start : start + len(images) * size].view(len(images), size)
    for slot, image in zip(slots, images, strict=True):
        if image is not None:
            slot[: len(image)] = image
    return slots


IS_ARM = platform.machine() in ("aarch64", "arm64")
KERNELS = ("neon", "scalar") if IS_ARM else ("amx", "vnni", "avx512", "avx2", "scalar")
# In units of the largest input times the norm of a row of the delta: inputs of 8 bits are off by up to
# half a level, evenly, six times which never occurs; of float32 only the order of the sums matters.
DELTA_ERROR = {
    torch.bfloat16: 6 / 127 / math.sqrt(12),
    torch.float16: 6 / 127 / math.sqrt(12),
    torch.float32: 2e-6,
}
# Half a unit in the last place of y.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 70)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that runs here, forced."""
    monkeypatch.setenv(native.KERNEL_VARIABLE, request.param)
    native._library.cache_clear()
    try:
        native._library()
    except OSError as error:
        pytest.skip(str(error))
    yield request.param
    native._library.cache_clear()


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(native.KERNEL_VARIABLE, "torch")
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_plane(rows: int, columns: int, share: float = 0.01, **other: object) -> Weight:
    """Mostly zero codes around 1 with escapes, some of them in the last column and twice in one."""
    random = generator(rows * columns)
    codes = torch.ones(rows, columns, dtype=torch.uint8)
    chance = torch.rand(rows, columns, generator=random)
    codes[chance < 0.12] = 0
    codes[chance > 0.88] = 2
    escapes = []
    for _ in range(int(rows * columns * share)):
        row = int(torch.randint(rows, (1,), generator=random))
        column = int(torch.randint(columns, (1,), generator=random))
        extra = int(torch.randint(-8, 8, (1,), generator=random)) or 1
        escapes.append((row, column, extra))
    if share:
        escapes += [(0, columns - 1, 7), (0, columns - 1, -3), (rows - 1, columns - 1, -8)]
    return Weight(rows, columns, 1, codes, zero=1.0, step=0.02, escapes=escapes, **other)


def two_planes(rows: int, columns: int, **other: object) -> Weight:
    codes = torch.randint(16, (rows, columns), generator=generator(rows + columns))
    return Weight(rows, columns, 2, codes.to(torch.uint8), zero=8.0, step=0.01, **other)


def row_map(slots_of_rows: list[int], slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = RowMap(len(slots_of_rows) + 3, slots, torch.device("cpu"))
    rows.update(slots_of_rows)
    return rows.order, rows.starts


def batch(tokens: int, slots: int) -> list[int]:
    """A slot for each row, the base's among them."""
    return [(7 * token + 3) % (slots + 1) - 1 for token in range(tokens)]


def added(
    images: torch.Tensor,
    rows: list[int],
    x: torch.Tensor,
    y: torch.Tensor,
    of: list[int],
) -> torch.Tensor:
    """y after the product of consecutive records."""
    result = y.clone()
    add = native.linear_product(images, range(len(rows)), rows, x.shape[1])
    add(result, x, *row_map(of, len(images)))
    return result


def expected(
    experts: list[list[Weight | None] | None], x: torch.Tensor, y: torch.Tensor, of: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64, not rounded, and what its delta's error is measured in."""
    result, unit = y.double(), torch.zeros(y.shape, dtype=torch.float64)
    dense = lru_cache(lambda slot, index: experts[slot][index].dense())  # type: ignore[index,union-attr]
    for row, slot in enumerate(of):
        start = 0
        for index, rows in enumerate(sizes(experts)):
            part = slice(start, start + rows)
            start += rows
            weights = experts[slot] if slot >= 0 else None
            weight = weights[index] if weights is not None else None
            if weight is None:
                continue
            delta = dense(slot, index)
            result[row, part] += delta @ x[row].double()
            unit[row, part] = delta.norm(dim=1) * x[row].double().abs().max()
            if weight.vector is not None:
                result[row, part] += weight.vector.double()
    return result, unit


def sizes(experts: list[list[Weight | None] | None]) -> list[int]:
    found: dict[int, int] = {}
    for weights in experts:
        for index, weight in enumerate(weights or []):
            if weight is not None:
                found[index] = weight.rows
    return [found[index] for index in sorted(found)]


def check(experts: list[list[Weight | None] | None], dtype: torch.dtype, tokens: int = 9) -> None:
    """The product of some experts is the definition's within what its arithmetic allows."""
    rows = sizes(experts)
    columns = next(w.columns for weights in experts for w in weights or [] if w is not None)
    images = slots_of([None if each is None else build_image(each) for each in experts])
    random = generator(tokens)
    x = torch.randn(tokens, columns, generator=random).to(dtype)
    y = torch.randn(tokens, sum(rows), generator=random).to(dtype)
    of = batch(tokens, len(experts))
    found = added(images, rows, x, y, of)
    wanted, unit = expected(experts, x, y, of)
    for row, slot in enumerate(of):
        if slot < 0 or experts[slot] is None:
            assert torch.equal(found[row], y[row])
    error = (found.double() - wanted).abs()
    assert (error <= DELTA_ERROR[dtype] * unit + ROUNDING[dtype] * wanted.abs()).all()


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@DTYPES
@pytest.mark.parametrize("tokens", WIDTHS)
def test_a_product_is_the_definitions(kernel: str, dtype: torch.dtype, tokens: int) -> None:
    check([[one_plane(48, 576)], None, [two_planes(48, 576)]], dtype, tokens)


@DTYPES
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (16, 64), (37, 70), (33, 1000), (20, 4200), (5, 640), (17, 4097)]
)
def test_odd_shapes(kernel: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    check([[one_plane(rows, columns)], [two_planes(rows, columns)]], dtype)


@DTYPES
def test_slices_have_records_of_their_own(kernel: str, dtype: torch.dtype) -> None:
    first = [one_plane(40, 128), None, two_planes(24, 128)]
    second = [None, two_planes(8, 128), one_plane(24, 128)]
    check([first, second, None], dtype, 20)


@DTYPES
@pytest.mark.parametrize("zero", [0.0, 1.0, 1.5, 2.25])
def test_zero_points_lie_anywhere(kernel: str, dtype: torch.dtype, zero: float) -> None:
    weight = one_plane(32, 200)
    weight.zero = zero
    check([[weight]], dtype)


@DTYPES
def test_rows_have_steps_of_their_own(kernel: str, dtype: torch.dtype) -> None:
    steps = torch.rand(37, generator=generator(1)).to(torch.bfloat16)
    check([[one_plane(37, 192, steps=steps)], [two_planes(37, 192, steps=steps)]], dtype)


@DTYPES
def test_a_matrix_of_escapes_alone(kernel: str, dtype: torch.dtype) -> None:
    escapes = [(row, column, 5 - row % 3) for row in range(20) for column in range(row, 300, 29)]
    check([[Weight(20, 300, step=0.1, escapes=escapes)]], dtype)


@DTYPES
def test_escapes_of_one_place_add_up(kernel: str, dtype: torch.dtype) -> None:
    weight = one_plane(20, 100, share=0)
    weight.escapes = [(3, 50, 7)] * 2 + [(4, 99, -8)] * 2 + [(19, 0, -8), (19, 0, -7)]
    check([[weight]], dtype)


@DTYPES
def test_rows_with_hundreds_of_escapes(kernel: str, dtype: torch.dtype) -> None:
    weight = one_plane(18, 700)
    weight.escapes += [(5, column, 2) for column in range(700)] * 2
    check([[weight]], dtype)


@DTYPES
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("rows", [96, 101])
def test_rows_without_codes_are_the_bases(
    kernel: str, dtype: torch.dtype, share: float, rows: int
) -> None:
    coded = torch.rand(rows, generator=generator(rows)) < share
    count = int(coded.sum())
    if count == 0:
        coded[rows // 2] = True
        count = 1
    weight = two_planes(count, 130)
    weight.rows, weight.coded = rows, coded
    check([[weight]], dtype)
    weight.vector = torch.randn(rows, generator=generator(3))
    weight.channels = torch.tensor([4, 129])
    weight.values = torch.randn(rows, 2, generator=generator(4)).to(torch.bfloat16)
    check([[weight]], dtype)


@DTYPES
def test_channels_of_16_bits(kernel: str, dtype: torch.dtype) -> None:
    channels = torch.tensor([0, 63, 64, 199])
    values = torch.randn(40, 4, generator=generator(5)).to(torch.bfloat16)
    alone = Weight(40, 200, channels=channels, values=values)
    beside = one_plane(40, 200, channels=channels, values=values)
    check([[alone], [beside]], dtype, 20)


def factors(kind: torch.dtype, rows: int, columns: int, rank: int) -> dict[str, torch.Tensor]:
    random = generator(rank)
    right = torch.randn(rank, columns, generator=random)
    left = torch.randn(rows, rank, generator=random)
    if kind is not torch.int8:
        return {"right": (right / 8).to(kind), "left": (left / 8).to(kind)}
    return {
        "right": (right * 30).clamp(-127, 127).to(torch.int8),
        "left": (left * 30).clamp(-127, 127).to(torch.int8),
        "right_steps": torch.rand(rank, generator=random) / 200,
        "left_steps": torch.rand(rows, generator=random) / 200,
    }


@DTYPES
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("rank", [1, 16, 37])
def test_factors(kernel: str, dtype: torch.dtype, kind: torch.dtype, rank: int) -> None:
    alone = Weight(40, 203, **factors(kind, 40, 203, rank))
    beside = one_plane(40, 203, **factors(kind, 40, 203, rank))
    check([[alone], [beside]], dtype, 20)


@DTYPES
def test_everything_at_once(kernel: str, dtype: torch.dtype) -> None:
    random = generator(6)
    weight = one_plane(
        50,
        4200,
        steps=torch.rand(50, generator=random).to(torch.bfloat16) / 20,
        channels=torch.tensor([1, 4199]),
        values=torch.randn(50, 2, generator=random).to(torch.bfloat16),
        vector=torch.randn(50, generator=random),
        **factors(torch.bfloat16, 50, 4200, 16),
    )
    check([[weight, two_planes(30, 4200)], None], dtype, 35)


@DTYPES
def test_a_row_does_not_depend_on_the_others(kernel: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = one_plane(40, 600, **factors(torch.bfloat16, 40, 600, 8))
    images = slots_of([build_image([weight]), build_image([two_planes(40, 600)])])
    x, y = torch.randn(600, 600).to(dtype), torch.randn(600, 40).to(dtype)
    of = batch(600, 2)
    whole = added(images, [40], x, y, of)
    for _ in range(4):
        some = torch.randperm(600)[: int(torch.randint(1, 60, (1,)))]
        part = added(images, [40], x[some], y[some], [of[row] for row in some.tolist()])
        assert torch.equal(part, whole[some])


def test_the_number_of_threads_changes_nothing(kernel: str) -> None:
    torch.manual_seed(0)
    images = slots_of([build_image([one_plane(80, 600, **factors(torch.float32, 80, 600, 8))])])
    x, y = torch.randn(40, 600).bfloat16(), torch.randn(40, 80).bfloat16()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(added(images, [80], x, y, [0] * 40))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_may_lie_apart(kernel: str) -> None:
    images = slots_of([build_image([one_plane(32, 128)])])
    x, y = torch.randn(6, 256).bfloat16(), torch.randn(6, 50).bfloat16()
    of = [0, -1, 0, 0, -1, 0]
    apart = y.clone()
    native.linear_product(images, [0], [32], 128)(apart[:, 9:41], x[:, 64:192], *row_map(of, 1))
    wanted = added(images, [32], x[:, 64:192].contiguous(), y[:, 9:41].contiguous(), of)
    assert torch.equal(apart[:, 9:41], wanted)
    assert torch.equal(apart[:, :9], y[:, :9])
    assert torch.equal(apart[:, 41:], y[:, 41:])


def test_nothing_is_read_past_the_slots(kernel: str) -> None:
    # Rows of NaN around the slots' bytes would show: all of them would be in the sums.
    image = build_image([one_plane(7, 70)])
    room = torch.full((len(image) + 4096,), 255, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + 1024
    images = room[start : start + len(image)].view(1, -1)
    images[0] = image
    x, y = torch.randn(3, 70), torch.zeros(3, 7)
    assert torch.equal(
        added(images, [7], x, y, [0, 0, 0]),
        added(slots_of([image]), [7], x, y, [0, 0, 0]),
    )


def test_a_batch_of_the_base_alone_is_left_as_it_is(kernel: str) -> None:
    images = slots_of([build_image([one_plane(32, 128)]), None])
    x, y = torch.randn(5, 128).bfloat16(), torch.randn(5, 32).bfloat16()
    assert torch.equal(added(images, [32], x, y, [-1] * 5), y)
    assert torch.equal(added(images, [32], x, y, [1] * 5), y)
    nothing = torch.zeros(0, 128).bfloat16(), torch.zeros(0, 32).bfloat16()
    assert added(images, [32], *nothing, []).shape == (0, 32)


def test_a_copied_image_counts_at_the_next_call(kernel: str) -> None:
    first, second = build_image([one_plane(32, 128)]), build_image([two_planes(32, 128)])
    images = slots_of([first, second])
    add = native.linear_product(images, [0], [32], 128)
    x, y = torch.randn(2, 128).bfloat16(), torch.zeros(2, 32).bfloat16()
    add(y, x, *row_map([0, 0], 2))
    images[0].zero_()
    images[0, : len(second)] = second
    swapped = torch.zeros(2, 32).bfloat16()
    add(swapped, x, *row_map([0, 0], 2))
    assert not torch.equal(swapped, y)
    assert torch.equal(swapped, added(images, [32], x, torch.zeros(2, 32).bfloat16(), [1, 1]))


def test_a_row_map_of_a_larger_batch_is_refused(kernel: str) -> None:
    images = slots_of([build_image([one_plane(32, 128)])])
    x, y = torch.randn(2, 128), torch.zeros(2, 32)
    with pytest.raises(ValueError, match="rows that a batch of 2 has not"):
        native.linear_product(images, [0], [32], 128)(y, x, *row_map([0, 0, 0], 1))


@DTYPES
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_an_embeddings_rows(kernel: str, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    coded = torch.rand(100, generator=generator(8)) < 0.4
    part = one_plane(int(coded.sum()), 130)
    part.rows, part.coded = 100, coded
    whole = two_planes(100, 130, **factors(torch.int8, 100, 130, 3))
    whole.channels = torch.tensor([7])
    whole.values = torch.randn(100, 1, generator=generator(9)).to(torch.bfloat16)
    images = slots_of([build_image([None, part]), build_image([None, whole]), None])
    ids = torch.randint(0, 104, (60,), generator=generator(10)).to(ids_dtype)
    y = torch.randn(60, 130, generator=generator(11)).to(dtype)
    of = batch(60, 3)
    found = y.clone()
    native.embedding_product(images, 1, 100, 130)(found, ids, *row_map(of, 3))
    tables = [part.dense(), whole.dense()]
    for row, (slot, token) in enumerate(zip(of, ids.tolist(), strict=True)):
        if slot in (-1, 2) or token >= 100:
            assert torch.equal(found[row], y[row])
            continue
        wanted = y[row].double() + tables[slot][token]
        error = (found[row].double() - wanted).abs()
        assert (error <= ROUNDING[dtype] * wanted.abs() + 1e-6).all()


@pytest.mark.usefixtures("torch_path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_torch_path_is_the_definitions(dtype: torch.dtype) -> None:
    assert native.product_name() == "torch"
    coded = torch.rand(40, generator=generator(12)) < 0.5
    rows_only = one_plane(int(coded.sum()), 4200)
    rows_only.rows, rows_only.coded = 40, coded
    full = two_planes(
        40,
        4200,
        steps=torch.rand(40, generator=generator(13)).to(torch.bfloat16) / 20,
        channels=torch.tensor([1, 4199]),
        values=torch.randn(40, 2, generator=generator(14)).to(torch.bfloat16),
        vector=torch.randn(40, generator=generator(15)),
        **factors(torch.int8, 40, 4200, 16),
    )
    escapes = Weight(40, 4200, step=0.1, escapes=[(0, 4199, 7), (0, 4199, 7), (39, 4096, -8)])
    check([[rows_only], [full], [escapes], None], dtype, 12)


@pytest.mark.usefixtures("torch_path")
def test_the_torch_path_adds_an_embeddings_rows() -> None:
    coded = torch.rand(100, generator=generator(8)) < 0.4
    part = one_plane(int(coded.sum()), 130)
    part.rows, part.coded = 100, coded
    images = slots_of([build_image([part])])
    ids = torch.arange(103)
    y = torch.randn(103, 130)
    found = y.clone()
    native.embedding_product(images, 0, 100, 130)(found, ids, *row_map([0] * 103, 1))
    wanted = y.double()
    wanted[:100] += part.dense()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-6)


def test_without_a_library_torch_computes_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "LIBRARY", "_no_such_library")
    monkeypatch.delenv(native.KERNEL_VARIABLE, raising=False)
    native._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native.product_name() == "torch"
        assert native.product_name() == "torch"
    native._library.cache_clear()
    (record,) = caplog.records
    assert "was not built" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "_broken.so").write_bytes(b"no library")
    with pytest.raises(OSError, match=r"_broken\.so' cannot be loaded"):
        load_library(tmp_path, "_broken")


def test_instructions_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.KERNEL_VARIABLE, "avx9000")
    native._library.cache_clear()
    with pytest.raises(OSError, match="this processor has no 'avx9000'"):
        native.product_name()
    native._library.cache_clear()


def test_slots_that_are_not_aligned_are_refused(kernel: str) -> None:
    images = slots_of([build_image([one_plane(32, 128)])])
    with pytest.raises(ValueError, match="multiples of 64"):
        native.linear_product(images[:, 1:], [0], [32], 128)


@pytest.mark.parametrize("num_bytes", [256, 2**21, 5 * 2**20 + 256])
def test_host_slots_are_zeros_that_products_take(num_bytes: int) -> None:
    slots = native.host_slots(3, num_bytes)
    assert (slots.shape, slots.dtype) == ((3, num_bytes), torch.uint8)
    assert not slots.any()
    native._check(slots)


def test_threads_are_those_of_the_runtime_that_torch_has() -> None:
    code = (
        "import torch, ctypes; from deltamux.serve.worker import native;"
        "torch.set_num_threads(3); functions = native._team_functions();"
        "most = ctypes.CFUNCTYPE(ctypes.c_int)(functions[3].value);"
        "print(most())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "3"


def test_a_process_without_openmp_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TEAM_FUNCTIONS", ("no_such_function",))
    assert native._share_threads(ctypes.CDLL(None)) is False
