"""The two kinds of stored matrices: in codes, and as two factors in codes (see `stored.py`)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from deltamux.compression.artifact.entropy import deflate, inflate
from deltamux.compression.artifact.entry import STREAM, Form, Parts, WeightEntry
from deltamux.compression.image.cut import WHOLE, Cut
from deltamux.compression.image.layout import Record
from deltamux.compression.image.weights import (
    coded_bytes,
    coded_record,
    factored_bytes,
    factored_record,
)
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme

# Codes of a matrix that a slot's two planes hold.
MOST_LEVELS = 16


class CodedEntry(WeightEntry):
    """The entry of `Coded`.

    Attributes:
        scheme: What the codes mean.
        rows: Rows that have codes.
        channels: Input channels that have codes.
        salient: Input channels with a 16-bit part.
    """

    kind: Literal["coded"] = "coded"
    shape: tuple[PositiveInt, PositiveInt]
    scaled_by: ClassVar[str] = "steps"
    scheme: Scheme
    rows: int = Field(ge=0)
    channels: int = Field(ge=0)
    salient: int = Field(default=0, ge=0)

    @property
    def label(self) -> str:
        """What a table calls it."""
        return f"coded {self.scheme.value}"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        rows, columns = self.shape
        if self.rows > rows or max(self.channels, self.salient) > columns:
            raise ValueError(f"{self.name!r} has more rows or channels in codes than it has")
        if self.scheme.levels > MOST_LEVELS:
            raise ValueError(
                f"{self.name!r} has scheme {self.scheme.value!r}, which is for factors"
            )
        return self

    def forms(self) -> dict[str, Form]:
        """The tensors that the file has to hold."""
        rows, columns = self.shape
        forms = {"codes": STREAM, "steps": Form(torch.bfloat16, ((self.rows,), (1,)))}
        if self.rows < rows:
            forms["rows"] = Form(torch.uint8, ((-(-rows // 8),),))
        if self.channels < columns:
            forms["channels"] = Form(torch.int32, ((self.channels,),))
        if self.salient:
            forms["salient_channels"] = Form(torch.int32, ((self.salient,),))
            forms["salient_values"] = Form(torch.bfloat16, ((rows, self.salient),))
        return forms

    def read(self, parts: Parts) -> "Coded":
        """The weight of these tensors."""
        rows, columns = self.shape
        channels, salient = parts.get("channels"), parts.get("salient_channels")
        values = parts.get("salient_values")
        delta = QuantizedDelta(
            scheme=self.scheme,
            shape=(rows, columns),
            codes_RC=inflate(parts["codes"], self.scheme.levels, self.rows, self.channels),
            steps_R=parts["steps"].expand(self.rows),
            rows_R=self._rows(parts["rows"]) if "rows" in parts else None,
            channels_C=None if channels is None else self.ascending(channels, columns),
            salient_channels_S=None if salient is None else self.ascending(salient, columns),
            salient_values_NS=values,
        )
        self.finite(delta.largest())
        return Coded(delta)

    def _rows(self, bitmap: torch.Tensor) -> torch.Tensor:
        rows_R = np.flatnonzero(np.unpackbits(bitmap.numpy(), bitorder="little"))
        if len(rows_R) != self.rows:
            raise self.damaged(f"marks {len(rows_R)} rows of the {self.rows} that have codes")
        return self.ascending(torch.from_numpy(rows_R), self.shape[0])


@dataclass(frozen=True)
class Coded:
    """A matrix in low-bit codes: any linear, and the rows of embedding and lm_head that changed."""

    kind: ClassVar[str] = "coded"
    delta: QuantizedDelta

    @property
    def slot_bytes(self) -> int:
        """Bytes of its sections in a slot image."""
        return coded_bytes(self.delta)

    def encode(self) -> dict[str, torch.Tensor]:
        """Its tensors."""
        delta = self.delta
        tensors = {"codes": deflate(delta.codes_RC), "steps": _shared(delta.steps_R)}
        if delta.rows_R is not None:
            changed = np.zeros(delta.shape[0], bool)
            changed[delta.rows_R.numpy()] = True
            tensors["rows"] = torch.from_numpy(np.packbits(changed, bitorder="little"))
        if delta.channels_C is not None:
            tensors["channels"] = delta.channels_C.to(torch.int32)
        if delta.salient_channels_S is not None and delta.salient_values_NS is not None:
            tensors["salient_channels"] = delta.salient_channels_S.to(torch.int32)
            tensors["salient_values"] = delta.salient_values_NS.contiguous()
        return tensors

    def dense(self, base: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The expert's weight, float32, with a factor on the steps."""
        return base.float() + self.delta.dequantize(factor)

    def scalable(self) -> torch.Tensor:
        """The part of the delta that a factor scales: all but what is in 16 bit."""
        return self.delta.without_salient().dequantize()

    def record(self, cut: Cut = WHOLE) -> Record:
        """What a slot gets of it, or of a part."""
        return coded_record(self.delta if cut == WHOLE else self.delta.part(cut))

    def entry(self, **common: Any) -> CodedEntry:
        """What the manifest says of it."""
        delta = self.delta
        rows, channels = delta.codes_RC.shape
        salient = 0 if delta.salient_channels_S is None else len(delta.salient_channels_S)
        return CodedEntry(
            shape=delta.shape,
            scheme=delta.scheme,
            rows=rows,
            channels=channels,
            salient=salient,
            **common,
        )


class FactoredEntry(WeightEntry):
    """The entry of `Factored`.

    Attributes:
        rank: Directions kept.
    """

    kind: Literal["factored"] = "factored"
    shape: tuple[PositiveInt, PositiveInt]
    scaled_by: ClassVar[str] = "left.steps"
    rank: int = Field(ge=1)

    @model_validator(mode="after")
    def _thin(self) -> Self:
        # A stream of a few bytes may hold a matrix of any size, if nothing bounds it.
        if self.rank > min(self.shape):
            raise ValueError(f"{self.name!r} has rank {self.rank}, more than the matrix itself")
        return self

    def forms(self) -> dict[str, Form]:
        """The tensors that the file has to hold."""
        return {
            "left.codes": STREAM,
            "left.steps": Form(torch.bfloat16, ((self.shape[0],), (1,))),
            "right.codes": STREAM,
            "right.steps": Form(torch.bfloat16, ((self.rank,), (1,))),
        }

    def read(self, parts: Parts) -> "Factored":
        """The weight of these tensors."""
        rows, columns = self.shape
        delta = FactoredDelta(
            left=self._factor(parts, "left", (rows, self.rank)),
            right=self._factor(parts, "right", (self.rank, columns)),
        )
        self.finite(delta.largest())
        return Factored(delta)

    def _factor(self, parts: Parts, side: str, shape: tuple[int, int]) -> QuantizedDelta:
        codes = inflate(parts[f"{side}.codes"], Scheme.INT8.levels, *shape)
        return QuantizedDelta(Scheme.INT8, shape, codes, parts[f"{side}.steps"].expand(shape[0]))


@dataclass(frozen=True)
class Factored:
    """A linear's delta as the product of two thin matrices in 8-bit codes."""

    kind: ClassVar[str] = "factored"
    delta: FactoredDelta

    @property
    def slot_bytes(self) -> int:
        """Bytes of its sections in a slot image."""
        return factored_bytes(self.delta)

    def encode(self) -> dict[str, torch.Tensor]:
        """Its tensors."""
        sides = {"left": self.delta.left, "right": self.delta.right}
        codes = {f"{side}.codes": deflate(factor.codes_RC) for side, factor in sides.items()}
        return codes | {f"{side}.steps": _shared(factor.steps_R) for side, factor in sides.items()}

    def dense(self, base: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """The expert's weight, float32, with a factor on the product."""
        return base.float() + self.delta.dequantize(factor)

    def scalable(self) -> torch.Tensor:
        """The part of the delta that a factor scales: all of it."""
        return self.delta.dequantize()

    def record(self, cut: Cut = WHOLE) -> Record:
        """What a slot gets of it, or of a part."""
        return factored_record(self.delta if cut == WHOLE else self.delta.part(cut))

    def entry(self, **common: Any) -> FactoredEntry:
        """What the manifest says of it."""
        return FactoredEntry(shape=self.delta.shape, rank=self.delta.rank, **common)


def _shared(steps_R: torch.Tensor) -> torch.Tensor:
    """Steps [1] where all are the same."""
    same = len(steps_R) > 0 and bool((steps_R == steps_R[0]).all())
    return (steps_R[:1] if same else steps_R).clone()
