"""Experts on disk, and the host cache of experts ready to be copied into slots.

disk → host: the artifact is checked (format, content hash, base hashes) and turned into payloads.
The host cache holds payloads by expert id, least recently used out first, within a byte budget.
"""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from deltamux.compression.artifact.artifact import Artifact, content_hash
from deltamux.compression.artifact.merge import check_base
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.serve.worker.slots import Payload, payload_bytes

VERSION_MARK = "@"


def versioned_path(path: Path, content: str) -> str:
    """`path@content`: how a request names an expert, so that prefix caching sees its content."""
    return f"{path}{VERSION_MARK}{content}"


def versioned_name(name: str, content: str, lora_id: int) -> str:
    """What vLLM calls one version of an expert; it compares LoRA requests by this name alone."""
    return f"{name}{VERSION_MARK}{content}.{lora_id}"


def public_name(lora_name: str) -> str:
    """The expert's name behind a versioned name."""
    return lora_name.partition(VERSION_MARK)[0]


def artifact_path(versioned: str) -> Path:
    """The directory behind a versioned path (or a bare one)."""
    path, mark, version = versioned.rpartition(VERSION_MARK)
    return Path(path) if mark and "/" not in version else Path(versioned)


class BaseHashes:
    """SHA-256 of the served base's tensors, kept across starts.

    Hashing a 7B base takes tens of seconds; the results are kept in the user's cache directory under
    the identity of the weights files (path, size, modification time).
    """

    def __init__(self, base: Checkpoint, cache: Path | None = None) -> None:
        self.base = base
        self._cache = cache or Path.home() / ".cache" / "deltamux" / "base-hashes.json"
        self._known: dict[str, str] = self._read().get(self._identity(), {})

    def sha256(self, name: str) -> str:
        """SHA-256 of a base tensor, as in an artifact's manifest."""
        if name not in self._known:
            for each in self.base.files:
                self._known.setdefault(each, self.base.sha256(each))
            self._write()
        return self._known[name]

    def _identity(self) -> str:
        parts = []
        for path in sorted(set(self.base.files.values())):
            stat = path.stat()
            parts.append(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
        return "|".join(parts)

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            content: dict[str, dict[str, str]] = json.loads(self._cache.read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return content

    def _write(self) -> None:
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._cache.with_suffix(".tmp")
            scratch.write_text(json.dumps({**self._read(), self._identity(): self._known}))
            scratch.replace(self._cache)
        except OSError:
            return  # a cache that cannot be written costs time, not correctness


@dataclass(frozen=True)
class HostExpert:
    """An expert in host memory: payloads by vLLM module name."""

    payloads: dict[str, Payload]
    num_bytes: int


def host_expert(payloads: dict[str, Payload]) -> HostExpert:
    """Wrap payloads with their size."""
    return HostExpert(payloads, sum(payload_bytes(payload) for payload in payloads.values()))


def open_artifact(versioned: str, hashes: BaseHashes) -> Artifact:
    """Open and check an expert before any of it is used.

    Args:
        versioned: Its path, with or without the hash of its content.
        hashes: Of the served base.

    Raises:
        ValueError: Missing, truncated, altered, newer, lossless, made for another base, or no longer what it
            was when it was registered: its keys in the prefix cache would be of other weights.
    """
    path = artifact_path(versioned)
    artifact = Artifact(path)
    artifact.check_servable()
    if versioned != str(path) and versioned_path(path, content_hash(path)) != versioned:
        raise ValueError(
            f"{str(path)!r} has changed since it was registered: register it again to serve it"
        )
    artifact.check_content()
    check_base(artifact, hashes.base, hashes.sha256)
    return artifact


class HostCache:
    """Least-recently-used experts within a byte budget; pinned ones stay.

    Args:
        capacity: Bytes. One expert is always kept, however large.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._experts: OrderedDict[int, HostExpert] = OrderedDict()
        self._pinned: set[int] = set()

    def __contains__(self, expert_id: int) -> bool:
        return expert_id in self._experts

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return sum(expert.num_bytes for expert in self._experts.values())

    def get(self, expert_id: int) -> HostExpert:
        """An expert, marked as just used."""
        self._experts.move_to_end(expert_id)
        return self._experts[expert_id]

    def put(self, expert_id: int, expert: HostExpert) -> list[int]:
        """Add an expert; returns the ids that had to leave."""
        self._experts[expert_id] = expert
        evicted = []
        for candidate in list(self._experts):
            if self.num_bytes <= self.capacity:
                break
            if candidate != expert_id and candidate not in self._pinned:
                del self._experts[candidate]
                evicted.append(candidate)
        return evicted

    def pin(self, expert_id: int) -> None:
        """Keep an expert whatever the budget."""
        self._pinned.add(expert_id)

    def remove(self, expert_id: int) -> None:
        """Forget an expert."""
        self._experts.pop(expert_id, None)
        self._pinned.discard(expert_id)

    def bytes_of(self, expert_id: int) -> int:
        """Bytes of one expert, 0 if it is not here."""
        expert = self._experts.get(expert_id)
        return expert.num_bytes if expert else 0
