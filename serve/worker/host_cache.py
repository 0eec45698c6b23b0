"""From disk to host memory: experts checked, turned into slot images, and kept for the next swap.

disk → host: a directory is opened and checked (format, content hash, base hashes) and becomes the image that a slot
holds, byte for byte. The host cache keeps images by expert id, least recently used out first, within a byte budget.
"""

import json
import os
from collections import OrderedDict
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.image.source import Source, open_source
from deltamux.serve.names import artifact_path, versioned_path

# What the cache file holds: hashes by tensor, by the identity of weights files.
HASHES = TypeAdapter(dict[str, dict[str, str]])


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
            return HASHES.validate_json(self._cache.read_bytes())
        except (OSError, ValidationError):
            return {}  # whatever is there is written anew

    def _write(self) -> None:
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            # Each rank has a decoder, and each decoder a file of its own to rename.
            scratch = self._cache.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps({**self._read(), self._identity(): self._known}))
            scratch.replace(self._cache)
        except OSError:
            return  # a cache that cannot be written costs time, not correctness


def open_expert(versioned: str, hashes: BaseHashes, max_rank: int) -> Source:
    """Open and check an expert before any of it is used.

    Args:
        versioned: Its path, with or without the hash of its content.
        hashes: Of the served base.
        max_rank: The largest rank of an adapter.

    Raises:
        ValueError: Missing, truncated, altered, newer, lossless, made for another base, or no longer what it
            was when it was registered: its keys in the prefix cache would be of other weights.
    """
    path = artifact_path(versioned)
    source = open_source(path, max_rank)
    if versioned != str(path) and versioned_path(path, source.content) != versioned:
        raise ValueError(
            f"{str(path)!r} has changed since it was registered: register it again to serve it"
        )
    source.check_content()
    source.check_base(hashes.base, hashes.sha256)
    return source


class HostCache:
    """Least-recently-used images within a byte budget; pinned ones stay.

    Args:
        capacity: Bytes. One expert is always kept, however large.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._images: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._pinned: set[int] = set()

    def __contains__(self, expert_id: int) -> bool:
        return expert_id in self._images

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return sum(image.numel() for image in self._images.values())

    def get(self, expert_id: int) -> torch.Tensor:
        """An expert's image, marked as just used."""
        self._images.move_to_end(expert_id)
        return self._images[expert_id]

    def put(self, expert_id: int, image: torch.Tensor) -> dict[int, torch.Tensor]:
        """Add an expert.

        Returns:
            The images that had to leave, by id: to free a large one takes time, which is the caller's to choose.
        """
        self._images[expert_id] = image
        evicted = {}
        for candidate in list(self._images):
            if self.num_bytes <= self.capacity:
                break
            if candidate != expert_id and candidate not in self._pinned:
                evicted[candidate] = self._images.pop(candidate)
        return evicted

    def pin(self, expert_id: int) -> None:
        """Keep an expert whatever the budget."""
        self._pinned.add(expert_id)

    def unpin(self, expert_id: int) -> None:
        """Let an expert go when others need the room."""
        self._pinned.discard(expert_id)

    def remove(self, expert_id: int) -> torch.Tensor | None:
        """Forget an expert; returns its image, if it was here."""
        self._pinned.discard(expert_id)
        return self._images.pop(expert_id, None)

    def bytes_of(self, expert_id: int) -> int:
        """Bytes of one expert, 0 if it is not here."""
        image = self._images.get(expert_id)
        return 0 if image is None else image.numel()
