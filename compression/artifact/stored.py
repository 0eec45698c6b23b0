"""The five kinds of stored weights: what each holds, how it is read, what it rebuilds, what a slot gets of it.

A kind is a pair of classes, one after the other: its entry in the manifest, which says what tensors the file has
to hold and reads them, and the weight itself. With N output rows, K input channels, R coded rows and r directions,
the tensors behind the weight's name, and the expert's weight W from the base's W₀:

| kind | tensors | W |
|---|---|---|
| exact | `.exact` uint8 [bytes] (`lossless.py`) | bit for bit |
| replacement | `.replacement` float32 [N] | the norm's own weight; a router's, [N, K] |
| bias | `.difference` float32 [N] | W₀ + difference |
| coded | `.codes` uint8 [bytes] (`entropy.py`), `.steps` bfloat16 [R] or [1] for all rows | W₀ + s (c − z) |
| | `.rows` uint8 [ceil(N / 8)]: bitmap of the R rows that have codes; absent: all | |
| | `.channels` int32 [C]: the input channels that have codes, ascending; absent: all | |
| | `.salient_channels` int32 [S], `.salient_values` bfloat16 [N, S]: added in those channels | |
| factored | `.left.codes`, `.left.steps` for [N, r], `.right.codes`, `.right.steps` for [r, K] | W₀ + left right |

Nothing is returned that is not finite, except for what `exact` keeps of the expert's own bits.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from deltamux.compression.artifact.entry import STREAM, Form, Parts, WeightEntry
from deltamux.compression.artifact.lossless import decode_exact
from deltamux.compression.artifact.matrices import Coded, CodedEntry, Factored, FactoredEntry
from deltamux.compression.checkpoint.architecture import TensorSpec
from deltamux.compression.image.cut import WHOLE, Cut
from deltamux.compression.image.layout import Record, section_bytes
from deltamux.compression.image.weights import vector_record


class ExactEntry(WeightEntry):
    """The entry of `Exact`."""

    kind: Literal["exact"] = "exact"

    def forms(self) -> dict[str, Form]:
        """The tensors that the file has to hold."""
        return {"exact": STREAM}

    def read(self, parts: Parts) -> "Exact":
        """The weight of these tensors."""
        return Exact(parts["exact"], self.shape)


@dataclass(frozen=True)
class Exact:
    """Any weight of the expert to the last bit, as what it differs by from the base's; slots do not hold it."""

    kind: ClassVar[str] = "exact"
    stream: torch.Tensor
    shape: tuple[int, ...]
    slot_bytes: ClassVar[None] = None

    def encode(self) -> dict[str, torch.Tensor]:
        """Its tensors."""
        return {"exact": self.stream}

    def dense(self, base: torch.Tensor) -> torch.Tensor:
        """The expert's weight, in the base's dtype and shape."""
        return decode_exact(self.stream, base)

    def record(self, _cut: Cut = WHOLE) -> None:
        """What a slot gets of it: nothing."""

    def entry(self, **common: Any) -> ExactEntry:
        """What the manifest says of it."""
        return ExactEntry(shape=self.shape, **common)


class ReplacementEntry(WeightEntry):
    """The entry of `Replacement`.

    Attributes:
        offset: What the norm adds to its weight.
    """

    kind: Literal["replacement"] = "replacement"
    offset: float = 0.0

    def forms(self) -> dict[str, Form]:
        """The tensors that the file has to hold."""
        return {"replacement": Form(torch.float32, (self.shape,))}

    def read(self, parts: Parts) -> "Replacement":
        """The weight of these tensors."""
        return Replacement(self.finite(parts["replacement"]), self.offset)


@dataclass(frozen=True)
class Replacement:
    """A norm's own weight, float32 [N], where its change cannot be folded into linears; or a router's.

    In a slot stands what the norm multiplies with: the weight and the offset.
    """

    kind: ClassVar[str] = "replacement"
    weight_N: torch.Tensor
    offset: float = 0.0

    @property
    def slot_bytes(self) -> int:
        """Bytes of its sections in a slot image."""
        return section_bytes(self.weight_N.nbytes)

    def encode(self) -> dict[str, torch.Tensor]:
        """Its tensors."""
        return {"replacement": self.weight_N}

    def dense(self, _base: torch.Tensor) -> torch.Tensor:
        """The expert's weight, float32."""
        return self.weight_N

    def record(self, _cut: Cut = WHOLE) -> Record:
        """What a slot gets of it, on every rank."""
        return vector_record(self.weight_N + self.offset)

    def entry(self, **common: Any) -> ReplacementEntry:
        """What the manifest says of it."""
        return ReplacementEntry(shape=tuple(self.weight_N.shape), offset=self.offset, **common)


class BiasEntry(WeightEntry):
    """The entry of `BiasDelta`."""

    kind: Literal["bias"] = "bias"

    def forms(self) -> dict[str, Form]:
        """The tensors that the file has to hold."""
        return {"difference": Form(torch.float32, (self.shape,))}

    def read(self, parts: Parts) -> "BiasDelta":
        """The weight of these tensors."""
        return BiasDelta(self.finite(parts["difference"]))


@dataclass(frozen=True)
class BiasDelta:
    """What a bias differs by, float32 [N]; in a slot it stands in its linear's record."""

    kind: ClassVar[str] = "bias"
    difference_N: torch.Tensor

    @property
    def slot_bytes(self) -> int:
        """Bytes of its sections in a slot image."""
        return section_bytes(self.difference_N.nbytes)

    def encode(self) -> dict[str, torch.Tensor]:
        """Its tensors."""
        return {"difference": self.difference_N}

    def dense(self, base: torch.Tensor) -> torch.Tensor:
        """The expert's weight, float32."""
        return base.float() + self.difference_N

    def record(self, cut: Cut = WHOLE) -> Record:
        """What a slot gets of it, or of the rows of a part of its linear."""
        if not cut.bias:
            return Record({}, {})
        return vector_record(self.difference_N[cut.row_index(len(self.difference_N))])

    def entry(self, **common: Any) -> BiasEntry:
        """What the manifest says of it."""
        return BiasEntry(shape=tuple(self.difference_N.shape), **common)


Stored = Exact | Replacement | BiasDelta | Coded | Factored
LinearDelta = Coded | Factored
Entry = Annotated[
    ExactEntry | ReplacementEntry | BiasEntry | CodedEntry | FactoredEntry,
    Field(discriminator="kind"),
]
LinearEntry = Annotated[CodedEntry | FactoredEntry, Field(discriminator="kind")]


@dataclass(frozen=True)
class Encoded:
    """A stored weight as it goes into a file.

    Attributes:
        entry: What the manifest says of it.
        parts: Its tensors, by what stands behind its name.
    """

    entry: Entry
    parts: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls, spec: TensorSpec, stored: Stored, *, error: float = 0.0, folded_norm: str | None = None
    ) -> "Encoded":
        """Encode a weight."""
        parts = stored.encode()
        entry = stored.entry(
            name=spec.name,
            role=spec.role,
            bytes=tensor_bytes(parts),
            slot_bytes=stored.slot_bytes,
            error=error,
            folded_norm=folded_norm,
        )
        return cls(entry, parts)

    def stored(self) -> Stored:
        """The weight, decoded."""
        return self.entry.read(self.parts)

    def scaled(self, stretch: float) -> "Encoded":
        """The same with a linear's steps times a stretch; what is in 16 bit stays."""
        if stretch == 1.0:
            return self
        assert isinstance(self.entry, CodedEntry | FactoredEntry)
        steps = self.parts[self.entry.scaled_by].float() * stretch
        return replace(self, parts=self.parts | {self.entry.scaled_by: steps.to(torch.bfloat16)})

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by their names in the file."""
        return {f"{self.entry.name}.{suffix}": tensor for suffix, tensor in self.parts.items()}


def tensor_bytes(tensors: Parts) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())
