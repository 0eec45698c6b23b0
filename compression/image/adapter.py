"""A LoRA adapter, as PEFT saves it, served as the factors that it is: y += (α / r) B (A x).

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors` with, for each module that it
changes, `base_model.model.NAME.lora_A.weight` [r, K] and `….lora_B.weight` [N, r] (Hu et al. 2021, arXiv
2106.09685; rank-stabilised scaling α / √r: Kalajdzievski 2023, arXiv 2312.03732). The scale goes into B. What does
more than that (DoRA, biases, whole modules, embeddings) is refused by name.

Shapes: N output rows, K input channels, r directions.
"""

import hashlib
import math
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deltamux.compression.files import open_tensors, read_json, sha256
from deltamux.compression.image.cut import NO_CUTS, WHOLE, Cut, Cuts
from deltamux.compression.image.layout import Record, section_bytes
from deltamux.compression.image.weights import adapter_record
from deltamux.compression.validation import problems

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
RIGHT, LEFT = ".lora_A.weight", ".lora_B.weight"


# Patterns over module names that take polynomial time: no groups, so that no repetition stands in another.
PATTERN = re.compile(r"(?:[\w$^|.-]|\\[.dw]|\[[\w-]+\]|[*+?])*", re.ASCII)
MOST_REPETITIONS = 4


class AdapterConfig(BaseModel):
    """What is read of `adapter_config.json`; PEFT writes more, which does not change the weights."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    base_model_name_or_path: str | None = None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _quick(cls, patterns: dict[str, Any] | None) -> dict[str, Any] | None:
        for pattern in patterns or {}:
            repeated = sum(pattern.count(each) for each in "*+?")
            if not PATTERN.fullmatch(pattern) or repeated > MOST_REPETITIONS:
                raise ValueError(
                    f"the pattern {pattern[:80]!r} is not simple: name modules in full"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern[:80]!r} is none: {error}") from error
        return patterns

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied with in a module."""
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


class Adapter:
    """A LoRA adapter opened for reading.

    Args:
        root: The directory.
        max_rank: The largest rank that a slot takes.

    Raises:
        ValueError: Not a LoRA adapter, damaged, of a kind that is not plain LoRA, or of a larger rank.
    """

    def __init__(self, root: str | Path, max_rank: int) -> None:
        self.root = Path(root)
        self.config = self._read_config()
        self._weights = self._open_weights()
        self.ranks = self._find_modules()
        widest = max(self.ranks.values())
        if widest > max_rank:
            raise ValueError(
                f"{str(self.root)!r} has rank {widest}, slots take up to {max_rank}: raise slot.rank "
                "and restart"
            )

    @cached_property
    def content(self) -> str:
        """The identity of its content, 16 hex digits: SHA-256 of configuration and weights."""
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            digest.update(sha256(self.root / name).encode())
        return digest.hexdigest()[:16]

    @property
    def num_bytes(self) -> int:
        """Size of the weights file."""
        return (self.root / WEIGHTS_FILE).stat().st_size

    @property
    def bits_per_weight(self) -> float:
        """Of the linears that it changes, on disk."""
        return 8 * self.num_bytes / self._num_weights

    @property
    def slot_bits_per_weight(self) -> float:
        """Of the linears that it changes, in a slot."""
        return 8 * self.slot_bytes / self._num_weights

    @property
    def _num_weights(self) -> int:
        return sum(
            self._shape(f"{module}{LEFT}")[0] * self._shape(f"{module}{RIGHT}")[1]
            for module in self.ranks
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of its factors in an image."""
        return sum(
            section_bytes(self._itemsize(module) * math.prod(self._shape(f"{module}{side}")))
            for module in self.ranks
            for side in (RIGHT, LEFT)
        )

    def records(
        self, shapes: dict[str, tuple[int, ...]], cuts: Cuts = NO_CUTS
    ) -> dict[str, Callable[[], Record]]:
        """Readers of the records, by the name of the base's weight.

        Args:
            shapes: Of the base's tensors, by name.
            cuts: Of weights that this device holds a part of.

        Raises:
            ValueError: A module is not the base's, or of another shape.
        """
        return {
            f"{module}.weight": self._reader(module, shapes, cuts.get(f"{module}.weight", WHOLE))
            for module in self.ranks
        }

    def _reader(
        self, module: str, shapes: dict[str, tuple[int, ...]], cut: Cut
    ) -> Callable[[], Record]:
        rank, found = self.ranks[module], shapes.get(f"{module}.weight")
        if found is None:
            raise ValueError(
                f"{str(self.root)!r} changes {module!r}, which this base does not have outside of a mixture's experts"
            )
        shape = self._shape(f"{module}{LEFT}")[0], self._shape(f"{module}{RIGHT}")[1]
        if shape != found:
            raise ValueError(
                f"{str(self.root)!r} is for another base: {module!r} is {shape[0]} by {shape[1]} there, "
                f"{found[0]} by {found[1]} here"
            )
        scale = self.config.scale(module, rank)
        kept = self._itemsize(module) == 2

        def read() -> Record:
            right_rK, left_Nr = self._get(f"{module}{RIGHT}"), self._get(f"{module}{LEFT}")
            if not kept:
                right_rK, left_Nr = right_rK.float(), left_Nr.float()
            left_Nr = self._finite(left_Nr * scale, f"{module}{LEFT}")
            rows_N = cut.row_index(len(left_Nr))
            return adapter_record(right_rK[:, cut.channel_slice()], left_Nr[rows_N])

        return read

    def _itemsize(self, module: str) -> int:
        """Bytes of a factor's element: bfloat16 stays where the scale, a power of two, leaves it exact."""
        sides = (f"{PREFIX}{module}{side}" for side in (RIGHT, LEFT))
        narrow = all(self._weights.get_slice(name).get_dtype() == "BF16" for name in sides)
        scale = self.config.scale(module, self.ranks[module])
        return 2 if narrow and math.frexp(scale)[0] == 0.5 else 4

    def _read_config(self) -> AdapterConfig:
        path = self.root / CONFIG_FILE
        try:
            config = AdapterConfig.model_validate(read_json(path))
        except (ValueError, ValidationError) as error:
            raise ValueError(
                f"{str(path)!r} is no LoRA adapter's configuration: {problems(error)}"
            ) from error
        odd = {
            "use_dora (DoRA)": config.use_dora,
            f"bias {config.bias!r}": config.bias != "none",
            "fan_in_fan_out": config.fan_in_fan_out,
            f"modules_to_save {config.modules_to_save}": bool(config.modules_to_save),
        }
        for what, present in odd.items():
            if present:
                raise ValueError(
                    f"{str(self.root)!r} has {what}, which slots do not hold: merge the adapter into "
                    "the base and compress the result"
                )
        return config

    def _open_weights(self) -> Any:
        return open_tensors(self.root / WEIGHTS_FILE, "save the adapter as safetensors")

    def _find_modules(self) -> dict[str, int]:
        """Rank of every module that it changes."""
        keys = set(self._weights.keys())
        ranks = {}
        for key in sorted(keys):
            module = key.removeprefix(PREFIX).removesuffix(RIGHT)
            if not key.endswith((RIGHT, LEFT)) or not key.startswith(PREFIX):
                raise ValueError(
                    f"{str(self.root)!r} holds {key!r}, which is no factor of a linear: merge the "
                    "adapter into the base and compress the result"
                )
            if not key.endswith(RIGHT):
                continue
            if ".layers." not in module:
                raise ValueError(
                    f"{str(self.root)!r} changes {module!r}; slots hold factors of the linears of layers: merge the "
                    "adapter into the base and compress the result"
                )
            if f"{PREFIX}{module}{LEFT}" not in keys:
                raise ValueError(f"{str(self.root)!r} lacks lora_B of {module!r}: save it again")
            right, left = (self._shape(f"{module}{side}") for side in (RIGHT, LEFT))
            if len(right) != 2 or len(left) != 2 or left[1] != right[0] or 0 in (*left, *right):
                raise ValueError(
                    f"the factors of {module!r} in {str(self.root)!r} are {list(right)} and "
                    f"{list(left)}, which do not fit: save the adapter again"
                )
            ranks[module] = right[0]
        if not ranks:
            raise ValueError(f"{str(self.root)!r} changes no module: save the adapter again")
        return ranks

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights.get_slice(PREFIX + name).get_shape())

    def _get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._weights.get_tensor(PREFIX + name)
        return self._finite(tensor, name)

    def _finite(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name!r} of {str(self.root)!r} is not finite: save the adapter again"
            )
        return tensor
