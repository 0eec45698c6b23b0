"""What a compression is to do, as a YAML file (`recipe.yaml` inside every artifact)."""

from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltamux.compression.checkpoint.as_served import BaseQuantization
from deltamux.compression.pruning.scores import Pattern, Score
from deltamux.compression.rounding.quantize import Scheme
from deltamux.compression.validation import problems

CODED = "coded"
DEFAULT_BITS = 1.0
# In a slot: a plane of two bits, and escapes for the codes that it does not hold. Above DEFAULT_BITS on disk so
# many codes lie beyond that two planes are smaller, which hold all of them.
DEFAULT_SLOT_BITS = 2.2
TWO_PLANES_BITS = 4.2
# Above this many bits a linear weight full-rank rungs are ahead, and low-rank ones only cost time, but
# for merged adapters: at 0.5 full-rank ones alone leave three quarters of the KL of the best mixture, at 0.3 several
# times as much (`LOW_RANK_COST`).
LOW_RANK_BITS = 0.5


class Method(StrEnum):
    """How bytes are shared out among the matrices (see `problem.py`)."""

    KNAPSACK = "knapsack"
    KNAPSACK_ATP = "knapsack-atp"
    UNIFORM = "uniform"
    ATP = "atp"
    EVOLUTION = "evolution"
    FCPTS = "fcpts"


class Importance(StrEnum):
    """What an error of a matrix is taken to cost."""

    WEIGHTS = "weights"
    ENERGY = "energy"
    FISHER = "fisher"


class ObjectiveKind(StrEnum):
    """What searching methods minimise: the sum of importance and error, or the result's divergence."""

    PREDICTED = "predicted"
    MEASURED = "measured"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _SchemeRecipe(_Model):
    """Whatever has a scheme: coded, or of a fixed width."""

    scheme: str = CODED

    @property
    def fixed_scheme(self) -> Scheme | None:
        """The scheme of fixed width, or None for coded ones."""
        return None if self.scheme == CODED else Scheme(self.scheme)


class PruningRecipe(_Model):
    """Rates by dropping elements instead of by coarser steps."""

    score: Score = Score.SPARSEGPT
    pattern: Pattern = Pattern.UNSTRUCTURED


class LinearRecipe(_SchemeRecipe):
    """The decoder's linears.

    `coded`: one step a matrix under an entropy code, any rate; with `low_rank`, matrices may
    also be kept as two coded factors. The other schemes have codes of a fixed width, a step a row,
    and `salient_channels` input channels in 16 bit.
    """

    scheme: Literal["coded", "sign", "ternary", "int2", "int3", "int4"] = "coded"
    salient_channels: int = Field(default=0, ge=0)
    feedback: bool = True
    low_rank: bool = True
    pruning: PruningRecipe | None = None

    @property
    def may_factor(self) -> bool:
        """Whether matrices may be kept as two factors."""
        return self.low_rank and self.fixed_scheme is None and self.pruning is None


class ProposerRecipe(_Model):
    """An OpenAI-compatible endpoint that proposes offspring to the evolutionary search."""

    base_url: str
    model: str


class AllocationRecipe(_Model):
    """How much the linears (or the whole artifact) may take: one of the three, else 1 bit.

    Attributes:
        bits: Bits per linear weight, scales and indices included.
        num_bytes: Bytes of the whole weights file.
        target_kl: Nats per token between expert and result on the held-out text.
        slot_bits: Bits per linear weight in a slot, records included: a second limit beside any of the three. Not
            given: 2.2, or 4.2 where more than a bit is allowed on disk or a divergence is the limit.
    """

    method: Method = Method.KNAPSACK
    importance: Importance = Importance.WEIGHTS
    objective: ObjectiveKind = ObjectiveKind.PREDICTED
    proposer: ProposerRecipe | None = None
    bits: float | None = Field(default=None, gt=0)
    num_bytes: int | None = Field(default=None, gt=0)
    target_kl: float | None = Field(default=None, gt=0)
    slot_bits: float | None = Field(default=None, gt=0)

    @property
    def limited(self) -> bool:
        """Whether there is any limit on disk."""
        return any((self.bits, self.num_bytes, self.target_kl))

    @property
    def limiting_bits(self) -> float | None:
        """Bits per linear weight, the default's too; None where bytes or divergence are the limit."""
        return self.bits if self.limited else DEFAULT_BITS

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [v for v in (self.bits, self.num_bytes, self.target_kl) if v is not None]
        if len(given) > 1:
            raise ValueError("give one of bits, num_bytes and target_kl, not several")
        if self.proposer is not None and self.method is not Method.EVOLUTION:
            raise ValueError(f"a proposer needs method 'evolution', got {self.method.value!r}")
        return self


class EmbeddingRecipe(_SchemeRecipe):
    """Embedding and lm_head: the rows that changed, with `step` in their own standard deviations."""

    scheme: Literal["coded", "int2", "int3", "int4"] = "coded"
    step: float = Field(default=1.0, gt=0)


class DistillationRecipe(_Model):
    """Training of the steps against the expert's predictions, in passes over the text; none by default."""

    passes: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=1e-2, gt=0)


class CalibrationRecipe(_Model):
    """How much text the input second moments are collected on, and how its rows are drawn."""

    samples: int = Field(default=128, ge=1)
    max_tokens: int = Field(default=512, ge=8)
    seed: int = 0


class Recipe(_Model):
    """What is done to an expert; the default is the preset `balanced`.

    `base_as_served` takes the delta from the base as a server has it that quantizes it while loading it.
    `lossless` keeps every bit of the expert and leaves the other settings without effect. It is
    for archives and for experts that changed few weights; slots cannot hold it.
    """

    version: Literal[1] = 1
    lossless: bool = False
    base_as_served: BaseQuantization | None = None
    linear: LinearRecipe = LinearRecipe()
    allocation: AllocationRecipe = AllocationRecipe()
    embedding: EmbeddingRecipe = EmbeddingRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.linear.scheme != CODED and self.allocation.limited:
            raise ValueError(
                f"the fixed width of {self.linear.scheme!r} leaves nothing to allocate: drop "
                "bits, num_bytes and target_kl, or use scheme 'coded'"
            )
        if self.linear.scheme != CODED and self.linear.pruning:
            raise ValueError(f"pruning needs scheme 'coded', got {self.linear.scheme!r}")
        if self.lossless and self.base_as_served:
            raise ValueError(
                "lossless keeps bits against those that the base's files hold: drop base_as_served"
            )
        if self.linear.scheme == CODED and self.linear.salient_channels:
            raise ValueError(
                "salient_channels need a scheme of fixed width, got 'coded': set scheme to 'int2' "
                "or another, or drop salient_channels"
            )
        return self

    @property
    def limiting_slot_bits(self) -> float | None:
        """Bits per linear weight in a slot; None: any, as where the width is fixed and nothing is limited."""
        allocation = self.allocation
        shared_out = self.linear.scheme == CODED and not self.lossless
        if allocation.slot_bits is not None or not shared_out:
            return allocation.slot_bits
        fine = allocation.target_kl is not None or (allocation.bits or 0.0) > DEFAULT_BITS
        return TWO_PLANES_BITS if fine else DEFAULT_SLOT_BITS

    @property
    def predicts(self) -> bool:
        """Whether rungs may be chosen from before they are measured: by bytes and errors of codes alone."""
        allocation, linear = self.allocation, self.linear
        by_codes = linear.fixed_scheme is None and linear.pruning is None
        predicted = allocation.objective is ObjectiveKind.PREDICTED and allocation.proposer is None
        return (
            by_codes and predicted and allocation.target_kl is None and not self.measures_low_rank
        )

    @property
    def measures_low_rank(self) -> bool:
        """Whether low-rank rungs are worth measuring under the limit."""
        bits = self.allocation.limiting_bits
        return self.linear.low_rank and (bits is None or bits <= LOW_RANK_BITS)


PRESETS = {
    "small": Recipe(
        allocation=AllocationRecipe(bits=0.5, slot_bits=1.7), embedding=EmbeddingRecipe(step=2.0)
    ),
    "balanced": Recipe(allocation=AllocationRecipe(bits=DEFAULT_BITS, slot_bits=DEFAULT_SLOT_BITS)),
    "faithful": Recipe(
        allocation=AllocationRecipe(bits=2.0, slot_bits=TWO_PLANES_BITS),
        embedding=EmbeddingRecipe(step=0.5),
    ),
}


def load_recipe(path: Path | None) -> Recipe:
    """Read a recipe; None gives the default.

    Raises:
        ValueError: The file is not a recipe; the message names the field.
    """
    if path is None:
        return PRESETS["balanced"]
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} is not a recipe: {problems(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
