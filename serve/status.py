"""What the engine's worker knows about residency, published to the API server's process.

The worker rewrites one small JSON file whenever something changes (swaps are rare beside tokens);
the API server reads it when metrics are scraped, when experts are listed and when a request arrives.
A file needs no call into the engine loop, which may be busy with a step. Its folder is made by the
server's first process, and those that it starts find it in their environment.
"""

import atexit
import logging
import multiprocessing
import os
import shutil
import tempfile
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger("vllm.deltamux")

STATUS_DIRECTORY_VARIABLE = "DELTAMUX_STATUS_DIR"
# Of each rank's worker.
STATUS_FILE = "worker-{rank}.json"
# Seconds. Chosen, not measured: a swap from the host cache takes milliseconds, one from disk up to seconds.
SWAP_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# The fastest first.
TIERS = ("slot", "host", "disk")
# The folder that a process made, by its id.
_made: dict[int, str] = {}


class Histogram(BaseModel):
    """Counts by upper bound (`SWAP_BUCKETS`, then +Inf), not cumulative, and the sum."""

    counts: list[int] = Field(default_factory=lambda: [0] * (len(SWAP_BUCKETS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(SWAP_BUCKETS, seconds)] += 1
        self.sum += seconds


class ExpertStatus(BaseModel):
    """One expert as the worker sees it.

    Attributes:
        tier: "slot", "host" or "disk", the fastest that holds it.
        slot: Which slot, if any.
        pinned: Whether it keeps its slot.
        host_bytes: Memory in the host cache.
        error: Why it could not be loaded, if so.
        swapped_at: When a batch last waited for it to enter a slot: the end of that move, on
            CLOCK_MONOTONIC, which all processes of a machine share.
        swap_seconds: How long that move took.
    """

    tier: str = "disk"
    slot: int | None = None
    pinned: bool = False
    host_bytes: int = 0
    error: str | None = None
    swapped_at: float = 0.0
    swap_seconds: float = 0.0

    def join(self, other: "ExpertStatus") -> None:
        """Say what holds on another rank too; there a slot has a number of its own."""
        self.tier = max(self.tier, other.tier, key=TIERS.index)
        self.slot = self.slot if self.tier == TIERS[0] else None
        self.pinned = self.pinned and other.pinned
        self.error = self.error or other.error
        if other.swapped_at > self.swapped_at:
            self.swapped_at, self.swap_seconds = other.swapped_at, other.swap_seconds


class WorkerStatus(BaseModel):
    """Everything the worker publishes.

    `swaps` counts, by expert name, moves into a tier: "slot" (from host) or "host" (from disk); the
    counts of a name go on when it gets a new version. `stalls` counts the experts that a step had to bring into a
    slot itself, while its whole batch waited. `ranks` is how many workers share the model and publish; what is
    read of several has the memory of all.
    """

    model_config = ConfigDict(extra="forbid")

    experts: dict[int, ExpertStatus] = Field(default_factory=dict)
    swaps: dict[str, dict[str, int]] = Field(default_factory=dict)
    swap_seconds: dict[str, Histogram] = Field(default_factory=dict)
    ranks: int = 1
    evictions: int = 0
    stalls: int = 0
    memory_bytes: dict[str, int] = Field(default_factory=dict)

    def expert(self, expert_id: int) -> ExpertStatus:
        """What is said of an expert, from now on if nothing was."""
        return self.experts.setdefault(expert_id, ExpertStatus())

    def count_swap(self, name: str | None, tier: str, seconds: float) -> None:
        """Count a move into a tier; without a name it is that of a dummy of vLLM's warm-up."""
        if name is not None:
            swaps = self.swaps.setdefault(name, {})
            swaps[tier] = swaps.get(tier, 0) + 1
            self.swap_seconds.setdefault(tier, Histogram()).observe(seconds)


def begin_server() -> None:
    """Give a server's first process a folder of its own; a second call, or one in its children, does nothing.

    A program that starts several servers may have a folder in its environment: were it inherited, their workers
    would take each other's orders. vLLM starts its other processes through `multiprocessing`.
    """
    if multiprocessing.parent_process() is None and _made.get(os.getpid()) != _inherited():
        os.environ.pop(STATUS_DIRECTORY_VARIABLE, None)
    status_directory()


def status_directory() -> Path:
    """The folder of the status file and of the worker's socket; made, and removed at exit, if there is none."""
    known = _inherited()
    if known:
        return Path(known)
    path = tempfile.mkdtemp(prefix="deltamux-")
    os.environ[STATUS_DIRECTORY_VARIABLE] = _made[os.getpid()] = path
    atexit.register(_remove, path, os.getpid())
    return Path(path)


def _inherited() -> str | None:
    return os.environ.get(STATUS_DIRECTORY_VARIABLE)


def _remove(path: str, owner: int) -> None:
    # A forked child inherits the handler but must not remove its parent's folder.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def publish(content: str, rank: int = 0) -> None:
    """Replace a rank's status file by a `WorkerStatus` as JSON; readers see the old one or the new one, whole."""
    directory = status_directory()
    if not directory.is_dir():
        return
    path = directory / STATUS_FILE.format(rank=rank)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(content)
        scratch.replace(path)
    except OSError:
        # A full disk makes metrics stale; it must not end the engine step this runs in.
        logger.exception("deltamux: cannot publish the worker's status")


def read_status() -> WorkerStatus:
    """The workers' last status; empty before the first one. Shared by its readers: do not change it.

    Of several ranks, an expert is where the last one has it.
    """
    first = _read(0)
    if first is None:
        return WorkerStatus()
    texts = [first, *(_read(rank) for rank in range(1, _parsed(first).ranks))]
    # Until every rank has spoken nothing is anywhere.
    known = [text for text in texts if text is not None]
    return _merged(*known) if len(known) == len(texts) else WorkerStatus()


def _read(rank: int) -> str | None:
    try:
        return (status_directory() / STATUS_FILE.format(rank=rank)).read_text()
    except FileNotFoundError:
        return None


@lru_cache(maxsize=1)
def _parsed(text: str) -> WorkerStatus:
    """Read once for every change: requests ask far more often than experts move."""
    return WorkerStatus.model_validate_json(text)


@lru_cache(maxsize=1)
def _merged(*texts: str) -> WorkerStatus:
    if len(texts) == 1:
        return _parsed(*texts)
    first, *others = [WorkerStatus.model_validate_json(text) for text in texts]
    for expert_id, expert in first.experts.items():
        for other in others:
            expert.join(other.expert(expert_id))
    first.stalls = max(each.stalls for each in (first, *others))
    for kind in first.memory_bytes:
        first.memory_bytes[kind] += sum(each.memory_bytes.get(kind, 0) for each in others)
    return first
