"""The slot image: an expert as it lies in host memory and in a slot, one flat buffer.

    [0, 128)                    header: int32 magic, version, records, size in units
    [128, 128 + 128 records)    one record for each weight of the base, in the base's own order
    ...                         sections, each at a multiple of 64 bytes

A record is 32 int32 (`Field`); offsets count units of 64 bytes from the start of the image, and 0 stands
for what is absent. Since every expert of a base has the same records in the same places, a layer knows the
index of its record, and a kernel finds everything else in the slot itself: bringing an expert into a slot
is one copy of one buffer. All numbers are little-endian.

What a record says of a weight [N, K] is in `planes.py` (codes), and below for the rest.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

MAGIC = 0x584D4C44  # "DLMX"
VERSION = 1
UNIT = 64
HEADER_BYTES = 128
RECORD_FIELDS = 32
RECORD_BYTES = 4 * RECORD_FIELDS
# A slot's size is a multiple of this, so that every slot starts on a line of any cache.
SLOT_MULTIPLE = 256


class Field(IntEnum):
    """Places in a record; offsets are in units."""

    PLANES = 0  # two-bit planes: 0, 1 or 2
    ROWS = 1  # rows that have codes, R
    COLUMNS = 2  # K
    STRIDE = 3  # bytes of a row of a plane
    PLANE0 = 4  # offset: uint8 [R, STRIDE]
    PLANE1 = 5  # offset: uint8 [R, STRIDE]
    ZERO = 6  # float32: the code that stands for nought
    STEP = 7  # float32: the step of all rows, where STEPS is absent
    STEPS = 8  # offset: bfloat16 [R]
    STARTS = 9  # offset: uint32 [R · BLOCKS + 1], where escapes of a row and block begin
    ESCAPES = 10  # offset: uint16 [escapes]
    BLOCKS = 11  # blocks of columns that escapes are counted in
    ROW_MAP = 12  # offset: uint32 [ceil(N / 32), 2], bits and rank; absent: all rows have codes
    CHANNELS = 13  # 16-bit channels, C
    CHANNEL_INDEX = 14  # offset: int32 [C]
    CHANNEL_VALUES = 15  # offset: bfloat16 [N, C]
    RANK = 16  # r of the factors
    FACTOR_KIND = 17  # FactorKind
    RIGHT = 18  # offset: [r, K]
    LEFT = 19  # offset: [N, r]
    RIGHT_STEPS = 20  # offset: float32 [r], coded factors
    LEFT_STEPS = 21  # offset: float32 [N], coded factors
    VECTOR = 22  # offset: float32 [N], a bias's difference or a norm's weight


class FactorKind(IntEnum):
    """What factors are stored in."""

    NONE = 0
    BFLOAT16 = 1
    FLOAT32 = 2
    CODED = 3  # int8 levels, a float32 step a row


Bytes = npt.NDArray[np.uint8]


@dataclass
class Record:
    """One weight's record, and the sections that it points to.

    Attributes:
        numbers: Fields that are plain numbers; float32 as their bits.
        sections: Fields that are offsets, and what lies there.
    """

    numbers: dict[Field, int]
    sections: dict[Field, npt.NDArray[np.generic]]

    @property
    def num_bytes(self) -> int:
        """Bytes in the image besides the record itself."""
        return sum(section_bytes(each.nbytes) for each in self.sections.values())


def section_bytes(num_bytes: int) -> int:
    """Bytes that a section takes, rounded up to whole units."""
    return -(-num_bytes // UNIT) * UNIT


def head_bytes(records: int) -> int:
    """Bytes of header and table."""
    return HEADER_BYTES + records * RECORD_BYTES


def slot_size(num_bytes: int) -> int:
    """Bytes of a slot that holds an image of so many bytes."""
    return -(-num_bytes // SLOT_MULTIPLE) * SLOT_MULTIPLE


def float_bits(value: float) -> int:
    """A float32 as the int32 of the same bits."""
    return int(np.float32(value).view(np.int32))


def assemble(records: dict[int, Record], count: int) -> torch.Tensor:
    """Put records and their sections into one buffer.

    Args:
        records: By their index in the base's list; what is absent changes nothing.
        count: Weights in that list.

    Returns:
        uint8 [bytes], a whole number of units.
    """
    total = head_bytes(count) + sum(record.num_bytes for record in records.values())
    image = torch.empty(total, dtype=torch.uint8, device="cpu")
    content: Bytes = image.numpy()
    content[: head_bytes(count)] = 0
    header = content[:HEADER_BYTES].view(np.int32)
    header[:4] = MAGIC, VERSION, count, total // UNIT
    table = content[HEADER_BYTES : head_bytes(count)].view(np.int32).reshape(count, -1)
    start = head_bytes(count)
    for index, record in records.items():
        for field, number in record.numbers.items():
            table[index, field] = number
        for field, section in record.sections.items():
            table[index, field] = start // UNIT
            raw = np.ascontiguousarray(section).view(np.uint8).reshape(-1)
            content[start : start + len(raw)] = raw
            end = start + section_bytes(len(raw))
            content[start + len(raw) : end] = 0
            start = end
    return image


def check_image(image: torch.Tensor, count: int) -> None:
    """Refuse a buffer that is no image for a base with so many weights.

    Raises:
        ValueError: The message says what it is instead.
    """
    if image.numel() < head_bytes(count):
        raise ValueError(f"{image.numel()} bytes are no slot image")
    magic, version, records, units = image[:16].view(torch.int32).tolist()
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic:#x}, no slot image does")
    if version != VERSION:
        raise ValueError(f"the slot image has version {version}, this deltamux reads {VERSION}")
    if records != count or units * UNIT != image.numel():
        raise ValueError(
            f"the slot image has {records} records and {units * UNIT} bytes, expected {count} and "
            f"{image.numel()}: it is damaged or of another base"
        )


class ImageReader:
    """Sections of an image by record, for the torch paths and for tests.

    Args:
        image: uint8 [bytes], on any device; reading offsets copies the table to the host once.
    """

    def __init__(self, image: torch.Tensor) -> None:
        self.image = image
        count = int(image[8:12].view(torch.int32))
        self.table = image[HEADER_BYTES : head_bytes(count)].view(torch.int32).view(count, -1).cpu()

    def number(self, index: int, field: Field) -> int:
        """A plain number of a record, or an offset in units."""
        return int(self.table[index, field])

    def real(self, index: int, field: Field) -> float:
        """A float32 of a record."""
        return float(self.table[index, field].view(torch.float32))

    def section(
        self, index: int, field: Field, dtype: torch.dtype, *shape: int
    ) -> torch.Tensor | None:
        """What an offset points to; None where it is absent."""
        offset = self.number(index, field) * UNIT
        if offset == 0:
            return None
        length = int(np.prod(shape)) * dtype.itemsize
        return self.image[offset : offset + length].view(dtype).view(shape)
