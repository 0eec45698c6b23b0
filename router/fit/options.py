"""How a router is fitted: the choices a user has, checked before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Features = Literal["default", "encoder", "auto"]


@dataclass(frozen=True)
class Options:
    """How to fit.

    The attributes are the arguments of `fit_router`.
    """

    keep: float
    max_wrong: float
    features: Features
    experts: Mapping[str, str]
    descriptions: Mapping[str, str]
    minimums: Mapping[str, float]
    seed: int

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: Names the value.
        """
        for name in ("keep", "max_wrong"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.features not in ("default", "encoder", "auto"):
            raise ValueError(f"features must be default, encoder or auto, got {self.features!r}")
        for domain, least in self.minimums.items():
            if not 0 <= least <= 1:
                raise ValueError(f"the minimum of {domain!r} must be in [0, 1], got {least}")
