"""A log of decisions and of what people say about them, for `deltamux router refit`.

JSON lines, of two kinds (`router/fit/usage.py` reads them):

    {"id": .., "time": .., "prompt": [turns] or "hash": .., "domain": .., "expert": .., "confidence": ..}
    {"id": .., "time": .., "feedback": expert}

It is off unless the configuration names a file. It is bounded: at `MAX_BYTES` the file becomes
`NAME.1`, which the next one replaces. A disk that is full never fails a request.
"""

import json
import logging
import os
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal

from deltamux.router.decide.artifact import fingerprint
from deltamux.router.decide.decision import BASE_NAME, Decision

logger = logging.getLogger("vllm.deltamux")

MAX_BYTES: Final = 64 << 20
# Decisions whose ids are known for feedback.
MAX_IDS: Final = 100_000
# Characters kept of each end of a turn.
EDGE_CHARS: Final = 2000


class DecisionLog:
    """The log of one server process.

    Args:
        path: The file; made where it is missing, its folder too.
        prompts: Whether it has the prompts themselves, or a hash of each.
    """

    def __init__(self, path: Path, prompts: Literal["hashed", "whole"]) -> None:
        self._path, self._prompts = path, prompts
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._lock = Lock()

    def decided(self, name: str | None, turns: list[str] | None, decision: Decision) -> None:
        """Write a decision; one without a name cannot get feedback, and is written all the same."""
        row: dict[str, Any] = {"id": name, "time": round(time.time(), 3)}
        if turns is not None and self._prompts == "whole":
            row["prompt"] = [_edges(turn) for turn in turns]
        elif turns is not None:
            row["hash"] = f"{fingerprint(turns):016x}"
        row |= {
            "domain": decision.domain,
            "expert": decision.expert or BASE_NAME,
            "confidence": round(decision.confidence, 4),
        }
        with self._lock:
            if name is not None:
                self._ids[name] = None
                if len(self._ids) > MAX_IDS:
                    self._ids.popitem(last=False)
            self._write(row)

    def feedback(self, name: str, expert: str) -> bool:
        """Write who should have answered; False where no decision of that name is known."""
        with self._lock:
            if name not in self._ids:
                return False
            self._write({"id": name, "time": round(time.time(), 3), "feedback": expert})
        return True

    def _write(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        size = 0
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            size = self._path.stat().st_size if self._path.exists() else 0
            if size + len(line) > MAX_BYTES:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                size = 0
            with self._path.open("ab") as file:
                file.write(line)
        except OSError as error:
            logger.error("deltamux: the decision log %s cannot be written: %s", self._path, error)
            with suppress(OSError):
                # Half a line would spoil the next one.
                os.truncate(self._path, size)


def _edges(text: str) -> str:
    return text if len(text) <= 2 * EDGE_CHARS else text[:EDGE_CHARS] + text[-EDGE_CHARS:]
