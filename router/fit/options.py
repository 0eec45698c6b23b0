"""How a router is fitted: the choices a user has, checked before any work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Features = Literal["default", "encoder", "auto"]


@dataclass(frozen=True)
class Options:
    """How to fit.

    Attributes:
        keep: Share of the specialists' own held-out prompts that must reach their expert, in (0, 1].
        max_wrong: Largest share of held-out prompts that a wrong expert may answer, in (0, 1]; the
            threshold is raised until it holds, whatever becomes of `keep`.
        features: "default", "encoder", or "auto": the encoder where it is installed.
        experts: Expert of a domain, where it is not called like the domain; "base" for none.
        descriptions: One line about a domain.
        minimums: Domain to the probability that its expert needs, where that is more than the
            threshold.
        seed: Of folds, views and subsets.
    """

    keep: float = 0.95
    max_wrong: float = 0.02
    features: Features = "default"
    experts: Mapping[str, str] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)
    minimums: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

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
