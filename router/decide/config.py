"""`router_config.json`: the wire names, the schema and its rules.

The file is the whole meaning of the tables beside it: which domain each column is, which expert
answers for it, how sure it must be, and which tokenizer the token ids come from.
"""

import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltamux.router.decide.features import FEATURE_VERSION

FORMAT: Final = "deltamux-router"
FORMAT_VERSION: Final = 1
CONFIG_FILE: Final = "router_config.json"
TABLES_FILE: Final = "router.safetensors"
TOKENIZER_FILE: Final = "tokenizer.json"

# Domains that the base answers unless they are given an expert, whatever their case.
FALLBACK_DOMAINS: Final = frozenset({"general", "base", "other", "ood", "none", "unknown"})
# What an expert can be called, and which names mean something else to a server.
EXPERT_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
TAKEN_NAMES: Final = frozenset({"auto", "base", "unknown"})

# Where the meaning of a prompt comes from.
Kind = Literal["default", "encoder"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]


class HeldOut(BaseModel):
    """Quality on prompts that the classifier had not seen (stratified cross-validation).

    `accuracy` and `macro_f1` are of the most probable domain, before abstaining; `ece` is the
    expected calibration error over 15 bins; `kept` is the share of the specialists' own prompts
    that the threshold lets through to an expert; `wrong` is the share that an expert other than
    the prompt's own would answer, among labelled prompts, their views and generated prompts;
    `abstained` and `confidence` are the share of labelled prompts left to the base and the mean
    confidence, against which served traffic is compared; `n` counts prompts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: Share
    macro_f1: Share
    ece: Share
    kept: Share
    wrong: Share = 0.0
    abstained: Share = 0.0
    confidence: Share = 1.0
    n: Count


class Training(BaseModel):
    """What the router was fitted on: prompts by domain, their shares, added prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: dict[str, Count]
    mix: dict[str, Share]
    added: Count
    embedding: bool
    seed: int
    keep: Share
    max_wrong: Share = 1.0


class EncoderConfig(BaseModel):
    """The sentence encoder: SHA-256 of its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class RouterConfig(BaseModel):
    """The schema of `router_config.json`, format version 1.

    Attributes:
        labels: Domain of each table column, in order.
        experts: Domain to expert name; None for domains that the base answers.
        features: "default" takes the meaning from the base's embedding, "encoder" from a sentence encoder.
        encoder: What belongs to the encoder; None without one.
        threshold: Smallest probability with which a specialist is routed.
        minimums: Domain to a probability that its expert needs where that is more.
        override_confidence: Smallest probability with which the last user turn alone decides.
        hysteresis: By how much the conversation's expert may fall behind before it is left.
        temperature: Divides the scores before the softmax.
        tokenizer_sha256: Identity of the `tokenizer.json` that made the token ids (`tokenizer.py`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["deltamux-router"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    feature_version: Literal[1] = FEATURE_VERSION
    labels: Annotated[list[str], Field(min_length=2)]
    experts: dict[str, str | None]
    features: Kind = "default"
    encoder: EncoderConfig | None = None
    threshold: Share
    minimums: dict[str, Share] = {}
    override_confidence: Share = 0.95
    hysteresis: Share = 0.3
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    vocab_size: Annotated[int, Field(gt=0)]
    buckets: Annotated[int, Field(ge=2)]
    prefix_tokens: Annotated[int, Field(gt=0)]
    suffix_tokens: Annotated[int, Field(gt=0)]
    tokenizer_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    training: Training
    heldout: HeldOut

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.labels)) != len(self.labels) or set(self.experts) != set(self.labels):
            raise ValueError("'experts' must name every entry of 'labels' exactly once")
        if all(expert is None for expert in self.experts.values()):
            raise ValueError("at least one domain needs an expert")
        if unknown := set(self.minimums) - set(self.labels):
            raise ValueError(f"'minimums' names {sorted(unknown)}, which 'labels' does not")
        if (self.features == "encoder") != (self.encoder is not None):
            raise ValueError("'encoder' belongs to the features 'encoder'")
        if self.buckets & (self.buckets - 1):
            raise ValueError(f"'buckets' must be a power of two, got {self.buckets}")
        return self


def parse_config(text: str, source: Path) -> RouterConfig:
    """Read a configuration.

    Args:
        text: The file's contents.
        source: Named in errors.

    Raises:
        ValueError: It is not JSON, not a router's, of a newer version, or breaks the schema.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}); fit the router again") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{source} does not describe a router: 'format' must be {FORMAT!r}")
    known = {"format_version": FORMAT_VERSION, "feature_version": FEATURE_VERSION}
    for name, newest in known.items():
        version = fields.get(name)
        if isinstance(version, int) and version > newest:
            raise ValueError(
                f"{source} has {name} {version}, this deltamux reads up to {newest}; "
                "run: pip install --upgrade deltamux"
            )
    try:
        return RouterConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{source}: {where}: {first['msg']}; fit the router again") from error
