"""What a compression is to do, as a YAML file (`recipe.yaml` inside every artifact)."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltamux.compression.quantize import Scheme


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearRecipe(_Model):
    """The decoder's linears: low-bit codes, and a few input channels in 16 bit."""

    scheme: Scheme = Scheme.INT2
    salient_channels: int = Field(default=8, ge=0)


class EmbeddingRecipe(_Model):
    """Embedding and lm_head: codes of the rows that changed."""

    scheme: Scheme = Scheme.INT4


class CalibrationRecipe(_Model):
    """How much text the input second moments are collected on."""

    samples: int = Field(default=128, ge=1)
    max_tokens: int = Field(default=512, ge=8)


class Recipe(_Model):
    """ME-Switch's method: salient input channels in 16 bit, the others in 2 bit."""

    version: Literal[1] = 1
    linear: LinearRecipe = LinearRecipe()
    embedding: EmbeddingRecipe = EmbeddingRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()


def load_recipe(path: Path | None) -> Recipe:
    """Read a recipe; None gives the default.

    Raises:
        ValueError: The file is not a recipe; the message names the field.
    """
    if path is None:
        return Recipe()
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} is not a recipe: {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
