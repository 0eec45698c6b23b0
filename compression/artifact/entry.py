"""What the manifest says of every kind of stored weight, and what a kind demands of the file's tensors."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from deltamux.compression.checkpoint.architecture import Role

# Tensors of a weight by what stands behind its name.
Parts = Mapping[str, torch.Tensor]


class Form(NamedTuple):
    """What a tensor of the file must be.

    Attributes:
        dtype: Its dtype.
        shapes: The shapes that it may have; none: a stream of any length.
    """

    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...] = ()

    def allows(self, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is such a one."""
        fits = shape in self.shapes if self.shapes else len(shape) == 1
        return dtype == self.dtype and fits


STREAM = Form(torch.uint8)


class WeightEntry(BaseModel):
    """What every kind has in the manifest.

    Attributes:
        name: The base's weight.
        role: What it is to the model.
        shape: Of the weight.
        bytes: Of its tensors in the file.
        slot_bytes: Of its sections in a slot image; None: no slot holds it.
        error: ‖(Δ − Δ̂) √h‖² / ‖Δ √h‖², h the calibration energy of the input channels: the share of the
            delta's output energy that is lost.
        folded_norm: The norm whose change is folded into the delta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    role: Role
    shape: tuple[PositiveInt, ...]
    bytes: int = Field(ge=0)
    slot_bytes: int | None = Field(default=None, ge=0)
    error: float = 0.0
    folded_norm: str | None = None

    @property
    def label(self) -> str:
        """What a table calls it."""
        return type(self).__name__.removesuffix("Entry").lower()

    def finite(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight, once its numbers are known to be finite.

        Raises:
            ValueError: They are not.
        """
        if not bool(torch.isfinite(tensor).all()):
            raise self.damaged("holds NaN or infinity")
        return tensor

    def ascending(self, indices: torch.Tensor, limit: int) -> torch.Tensor:
        """Indices as int64, once they are known to ascend from 0 up to a limit.

        Raises:
            ValueError: They do not.
        """
        wide = indices.long()
        inside = len(wide) == 0 or (int(wide[0]) >= 0 and int(wide[-1]) < limit)
        if not inside or bool((wide[1:] <= wide[:-1]).any()):
            raise self.damaged(f"has indices that do not ascend from 0 to {limit - 1}")
        return wide

    def damaged(self, finding: str) -> ValueError:
        """The error for content that cannot be."""
        return ValueError(f"{self.name!r} {finding}: copy or compress the expert again")
