"""How the fleet's settings are read: a YAML file, or what a file and flags say together, checked by a pydantic model."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from deltamux.compression.validation import problems

Model = TypeVar("Model", bound=BaseModel)


def loaded(model: type[Model], path: Path, what: str) -> Model:
    """Read a file; `what` it holds is named where it does not.

    Raises:
        ValueError: Not YAML, an unknown key, or a value out of range; the message names it.
    """
    try:
        return checked(model, yaml.safe_load(path.read_text()) or {}, what)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: {problems(error)}") from error


def checked(model: type[Model], content: Any, what: str) -> Model:
    """Check content.

    Raises:
        ValueError: An unknown key, or a value out of range; the message names it.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"this is not {what}: {problems(error)}") from error
