"""Durations as people write them in a configuration: `90`, `1.5`, `"90s"`, `"5m"`, `"1h30m"`."""

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def seconds_of(value: object) -> float:
    """A duration in seconds.

    Raises:
        ValueError: It is none, or it is not above zero.
    """
    seconds = math.nan
    if isinstance(value, str):
        text = value.replace(" ", "")
        if text and _PART.sub("", text) == "":
            seconds = sum(float(number) * UNITS[unit] for number, unit in _PART.findall(text))
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(
            f"a duration is a number of seconds above 0, or like '90s' or '1h30m', got {value!r}"
        )
    return seconds


Duration = Annotated[float, BeforeValidator(seconds_of)]
