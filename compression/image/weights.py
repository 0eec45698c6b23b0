"""What a slot gets of each stored weight: its record in the slot image, exact to the last bit.

Codes become planes and escapes (`planes.py`); steps stay bfloat16, one for the matrix where all are equal;
16-bit channels, factors and vectors are copied. Where channels without codes meet a grid that has no code for
nought (sign, 2 and 3 bit), levels are doubled and steps halved, s (c − z) = (s / 2) (2 c − 2 z), which is exact.

Shapes: N output rows, K input channels; R coded rows, r directions, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch

from deltamux.compression.image.layout import (
    Bytes,
    FactorKind,
    Field,
    Record,
    float_bits,
    section_bytes,
)
from deltamux.compression.image.planes import code_counts, code_record, smallest_form
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import QuantizedDelta

# Codes of doubled levels: as those of INT4, they stand around 8.
DOUBLED_ZERO = 8
MAP_BITS = 32


def coded_record(quantized: QuantizedDelta) -> Record:
    """The record of a matrix in codes."""
    # A part of an embedding may have no row that changed.
    record = _codes_record(quantized) if len(quantized.codes_RC) else Record({}, {})
    if quantized.salient_channels_S is not None:
        assert quantized.salient_values_NS is not None
        record.numbers[Field.CHANNELS] = len(quantized.salient_channels_S)
        record.sections[Field.CHANNEL_INDEX] = quantized.salient_channels_S.int().numpy()
        record.sections[Field.CHANNEL_VALUES] = _bfloat16(quantized.salient_values_NS)
    return record


def _codes_record(quantized: QuantizedDelta) -> Record:
    codes_RK, zero, steps_R = _over_all_channels(quantized)
    record = code_record(codes_RK, zero)
    if _is_shared(steps_R):
        record.numbers[Field.STEP] = float_bits(float(steps_R[0]))
    else:
        record.sections[Field.STEPS] = _bfloat16(steps_R)
    if quantized.rows_R is not None:
        record.sections[Field.ROW_MAP] = row_map(quantized.rows_R, quantized.shape[0])
    return record


def coded_bytes(quantized: QuantizedDelta) -> int:
    """Bytes that `coded_record` takes in an image, from a histogram of the codes alone."""
    rows, coded = quantized.codes_RC.shape
    columns, zero = quantized.shape[1], quantized.scheme.zero_point
    counts_L = code_counts(quantized.codes_RC.numpy(), quantized.scheme.levels)
    if quantized.channels_C is not None:
        if zero % 1:
            doubled_L = np.zeros(2 * DOUBLED_ZERO, np.int64)
            doubled_L[2 * np.arange(len(counts_L)) + int(DOUBLED_ZERO - 2 * zero)] = counts_L
            counts_L, zero = doubled_L, float(DOUBLED_ZERO)
        counts_L[int(zero)] += rows * (columns - coded)
    total = smallest_form(counts_L, rows, columns, zero).num_bytes
    if not _is_shared(quantized.steps_R):
        total += section_bytes(2 * rows)
    if quantized.rows_R is not None:
        total += section_bytes(8 * -(-quantized.shape[0] // MAP_BITS))
    if quantized.salient_channels_S is not None:
        count = len(quantized.salient_channels_S)
        total += section_bytes(4 * count) + section_bytes(2 * quantized.shape[0] * count)
    return total


def factored_bytes(factored: FactoredDelta) -> int:
    """Bytes that `factored_record` takes in an image."""
    rows, columns = factored.shape
    levels = section_bytes(factored.rank * columns) + section_bytes(rows * factored.rank)
    return levels + section_bytes(4 * factored.rank) + section_bytes(4 * rows)


def factored_record(factored: FactoredDelta) -> Record:
    """The record of two coded factors, served as they are: y += B (A x)."""
    record = _empty(*factored.shape)
    record.numbers |= {Field.RANK: factored.rank, Field.FACTOR_KIND: FactorKind.CODED}
    for factor, levels, steps in (
        (factored.right, Field.RIGHT, Field.RIGHT_STEPS),
        (factored.left, Field.LEFT, Field.LEFT_STEPS),
    ):
        signed = factor.codes_RC.to(torch.int16) - int(factor.scheme.zero_point)
        record.sections[levels] = signed.to(torch.int8).numpy()
        record.sections[steps] = factor.steps_R.float().numpy()
    return record


def adapter_record(right_rK: torch.Tensor, left_Nr: torch.Tensor) -> Record:
    """The record of a LoRA pair, its scale in the left factor: bfloat16 or float32."""
    record = _empty(len(left_Nr), right_rK.shape[1])
    wide = torch.float32 in (right_rK.dtype, left_Nr.dtype)
    kind = FactorKind.FLOAT32 if wide else FactorKind.BFLOAT16
    record.numbers |= {Field.RANK: len(right_rK), Field.FACTOR_KIND: kind}
    for field, factor in ((Field.RIGHT, right_rK), (Field.LEFT, left_Nr)):
        record.sections[field] = factor.float().numpy() if wide else _bfloat16(factor)
    return record


def vector_record(vector_N: torch.Tensor) -> Record:
    """The record of a norm's own weight, or of a bias's difference."""
    return with_vector(Record({}, {}), vector_N)


def with_vector(record: Record, vector_N: torch.Tensor) -> Record:
    """A linear's record with the difference of its bias."""
    vector = vector_N.float().contiguous().numpy()
    return Record(record.numbers, record.sections | {Field.VECTOR: vector})


def row_map(rows_R: torch.Tensor, count: int) -> npt.NDArray[np.uint32]:
    """Which of `count` rows have codes, and where: uint32 [ceil(count / 32), 2] of bits and rank."""
    mask = np.zeros(-(-count // MAP_BITS) * MAP_BITS, bool)
    mask[rows_R.numpy()] = True
    bits = np.packbits(mask, bitorder="little").view(np.uint32)
    counts = mask.reshape(-1, MAP_BITS).sum(axis=1)
    ranks = (counts.cumsum() - counts).astype(np.uint32)
    return np.stack([bits, ranks], axis=1)


def _over_all_channels(quantized: QuantizedDelta) -> tuple[Bytes, float, torch.Tensor]:
    """Codes [R, K], their zero point, and steps bfloat16 [R]."""
    zero, codes, steps = quantized.scheme.zero_point, quantized.codes_RC, quantized.steps_R
    if quantized.channels_C is None:
        return codes.numpy(), zero, steps
    if zero % 1:
        codes = codes * 2 + int(DOUBLED_ZERO - 2 * zero)
        zero, steps = float(DOUBLED_ZERO), steps / 2
    wide = torch.full((len(codes), quantized.shape[1]), int(zero), dtype=torch.uint8)
    return wide.index_copy_(1, quantized.channels_C, codes).numpy(), zero, steps


def _is_shared(steps_R: torch.Tensor) -> bool:
    """Whether all rows have the same step."""
    return len(steps_R) > 0 and bool((steps_R == steps_R[0]).all())


def _empty(rows: int, columns: int) -> Record:
    return Record({Field.ROWS: rows, Field.COLUMNS: columns}, {})


def _bfloat16(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    """The bits of a tensor in bfloat16."""
    bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return bits.view(np.uint16)
