"""Experts that were added at run time, kept in a file over a restart (the `state` of the configuration)."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deltamux.compression.validation import problems
from deltamux.serve.api.expert import Expert
from deltamux.serve.settings import ExpertSettings

logger = logging.getLogger("vllm.deltamux")


class _Content(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    experts: tuple[ExpertSettings, ...] = ()


class SavedExperts:
    """The file, read once and rewritten when experts are added or deleted.

    Args:
        path: The file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> tuple[ExpertSettings, ...]:
        """The experts in it; a file that cannot be read is left as it is, and nothing more is kept."""
        if self._path is None or not self._path.exists():
            return ()
        try:
            return _Content.model_validate_json(self._path.read_text()).experts
        except ValidationError as error:
            reason = problems(error)
        except (OSError, ValueError) as error:
            reason = str(error)
        logger.error(
            "deltamux: %r is no state of experts, so added experts are not kept: %s; mend it or delete it",
            str(self._path),
            reason,
        )
        self._path = None
        return ()

    def write(self, experts: Iterable[Expert]) -> None:
        """Keep the experts that were added; the file is replaced as a whole."""
        if self._path is None:
            return
        kept = tuple(
            ExpertSettings(name=each.name, path=each.source.absolute(), pin=each.pinned)
            for each in experts
            if each.origin == "added"
        )
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(_Content(experts=kept).model_dump_json(indent=2) + "\n")
            scratch.replace(self._path)
        except OSError as error:
            logger.error("deltamux: added experts are not kept: %s", error)
