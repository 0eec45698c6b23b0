"""What a slot image adds to the base's weights, as dense matrices.

The reference that the kernels of every device are tested against; slow, and exact but for the products of
factors, which are rounded to float32.

Shapes: N output rows, K input channels; R coded rows, r directions.
"""

import numpy as np
import numpy.typing as npt
import torch

from deltamux.compression.image.layout import FactorKind, Field, ImageReader
from deltamux.compression.image.planes import BLOCK_COLUMNS, unpack_plane
from deltamux.compression.image.weights import MAP_BITS


def served_delta(reader: ImageReader, index: int, rows: int, columns: int) -> torch.Tensor:
    """What a record adds to a weight, float32 [rows, columns]: the reference that kernels are tested with."""
    coded = reader.number(index, Field.ROWS)
    delta_NK = torch.zeros(rows, columns)
    if reader.number(index, Field.RANK):
        delta_NK = _product(reader, index, rows, columns)
    elif coded:
        steps_R = reader.section(index, Field.STEPS, torch.bfloat16, coded)
        if steps_R is None:
            steps_R = torch.tensor(reader.real(index, Field.STEP)).expand(coded)
        delta_RK = _levels(reader, index, coded, columns) * steps_R.float().unsqueeze(1)
        delta_NK = _at_their_rows(reader, index, delta_RK, rows)
    count = reader.number(index, Field.CHANNELS)
    channels = reader.section(index, Field.CHANNEL_INDEX, torch.int32, count)
    values = reader.section(index, Field.CHANNEL_VALUES, torch.bfloat16, rows, count)
    if channels is not None and values is not None:
        delta_NK[:, channels.long()] += values.float()
    return delta_NK


def _levels(reader: ImageReader, index: int, rows: int, columns: int) -> torch.Tensor:
    """Levels c − z + Σ d, float32 [R, K]."""
    stride = reader.number(index, Field.STRIDE)
    levels_RK = np.zeros((rows, columns), np.float32)
    if reader.number(index, Field.PLANES):
        levels_RK -= np.float32(reader.real(index, Field.ZERO))
        for weight, field in ((1, Field.PLANE0), (4, Field.PLANE1)):
            plane = reader.section(index, field, torch.uint8, rows, stride)
            if plane is not None:
                levels_RK += weight * unpack_plane(plane.numpy(), columns)
    groups = rows * reader.number(index, Field.BLOCKS)
    starts = reader.section(index, Field.STARTS, torch.int32, groups + 1)
    if starts is not None:
        escapes = reader.section(index, Field.ESCAPES, torch.int16, int(starts[-1]))
        assert escapes is not None
        _add_escapes(levels_RK, starts.numpy(), escapes.numpy().view(np.uint16))
    return torch.from_numpy(levels_RK)


def _add_escapes(
    levels_RK: npt.NDArray[np.float32],
    starts: npt.NDArray[np.int32],
    escapes: npt.NDArray[np.uint16],
) -> None:
    rows, columns = levels_RK.shape
    per_row = (len(starts) - 1) // rows
    group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    column = group % per_row * BLOCK_COLUMNS + (escapes & 0xFFF)
    difference = (escapes >> 12).astype(np.float32) - 8
    np.add.at(levels_RK.reshape(-1), group // per_row * columns + column, difference)


def _at_their_rows(
    reader: ImageReader, index: int, delta_RK: torch.Tensor, rows: int
) -> torch.Tensor:
    found = reader.section(index, Field.ROW_MAP, torch.int32, -(-rows // MAP_BITS), 2)
    if found is None:
        return delta_RK
    bits = np.unpackbits(found[:, 0].contiguous().numpy().view(np.uint8), bitorder="little")
    places = torch.from_numpy(np.flatnonzero(bits))
    return torch.zeros(rows, delta_RK.shape[1]).index_copy_(0, places, delta_RK)


def _product(reader: ImageReader, index: int, rows: int, columns: int) -> torch.Tensor:
    kind = FactorKind(reader.number(index, Field.FACTOR_KIND))
    rank = reader.number(index, Field.RANK)
    dtype = {
        FactorKind.BFLOAT16: torch.bfloat16,
        FactorKind.FLOAT32: torch.float32,
        FactorKind.CODED: torch.int8,
    }[kind]
    right_rK = reader.section(index, Field.RIGHT, dtype, rank, columns)
    left_Nr = reader.section(index, Field.LEFT, dtype, rows, rank)
    assert right_rK is not None
    assert left_Nr is not None
    right_rK, left_Nr = right_rK.float(), left_Nr.float()
    right_steps_r = reader.section(index, Field.RIGHT_STEPS, torch.float32, rank)
    left_steps_N = reader.section(index, Field.LEFT_STEPS, torch.float32, rows)
    if right_steps_r is not None and left_steps_N is not None:
        right_rK = right_rK * right_steps_r.unsqueeze(1)
        left_Nr = left_Nr * left_steps_N.unsqueeze(1)
    return left_Nr @ right_rK
