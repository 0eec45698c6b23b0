"""What can be served beside a base: a compressed expert, or a LoRA adapter, in a directory.

Both are opened and checked before anything of them is used, and both become a slot image.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.manifest import content_hash
from deltamux.compression.artifact.merge import check_base
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.image import adapter as lora
from deltamux.compression.image.build import Shapes, adapter_image, artifact_image
from deltamux.compression.image.cut import NO_CUTS, Cuts
from deltamux.compression.image.layout import head_bytes


class Source(Protocol):
    """A servable directory, opened.

    Attributes:
        root: The directory.
        content: The identity of its content, 16 hex digits.
        num_bytes: Size of its weights file.
        bits_per_weight: Of the base's linears, on disk.
        slot_bits_per_weight: The same in a slot; None where the manifest does not say it.
        rank: The largest rank of its factors; 0: it has none.
        norms: The norm weights that it replaces.
        base_quantization: How the server has to quantize the base; None: it is for the base as it is.
    """

    root: Path
    content: str
    num_bytes: int
    bits_per_weight: float
    slot_bits_per_weight: float | None
    rank: int
    norms: frozenset[str]
    base_quantization: str | None

    def check_content(self) -> None:
        """Compare the weights with what the manifest says of them.

        Raises:
            ValueError: They were altered or damaged.
        """

    def check_base(self, base: Checkpoint, sha256: Callable[[str], str]) -> None:
        """Refuse another base.

        Raises:
            ValueError: It was made for other weights than the base's.
        """

    def image_bytes(self, shapes: Shapes) -> int:
        """What its image takes, without making it."""

    def image(self, shapes: Shapes, cuts: Cuts = NO_CUTS) -> torch.Tensor:
        """Its slot image (see `artifact_image`)."""


class CompressedExpert:
    """A compressed full fine-tune.

    Raises:
        ValueError: Not an artifact, a newer or damaged one, or one that no slot holds.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._artifact = Artifact(root)
        self._artifact.check_servable()
        self.content = content_hash(root)
        totals = self._artifact.manifest.totals
        self.num_bytes = totals.weights_file_bytes
        self.bits_per_weight = totals.bits_per_weight
        self.slot_bits_per_weight = totals.slot_bits_per_weight
        self._image_bytes = totals.slot_bytes or 0
        self.rank = self._artifact.manifest.rank
        self.norms = self._artifact.manifest.norms
        self.base_quantization: str | None = self._artifact.manifest.base.quantization

    def check_content(self) -> None:
        """Compare the weights file with the hash in the manifest."""
        self._artifact.check_content()

    def check_base(self, base: Checkpoint, sha256: Callable[[str], str]) -> None:
        """Compare the base's tensors with the hashes in the manifest."""
        check_base(self._artifact, base, sha256)

    def image_bytes(self, _shapes: Shapes) -> int:
        """What the manifest says that its image takes."""
        return self._image_bytes

    def image(self, shapes: Shapes, cuts: Cuts = NO_CUTS) -> torch.Tensor:
        """Its slot image."""
        return artifact_image(self._artifact, shapes, cuts)


class LoraExpert:
    """A LoRA adapter as PEFT saves it.

    Args:
        root: The directory.
        max_rank: The largest rank that a slot takes.

    Raises:
        ValueError: Not plain LoRA, damaged, or of a larger rank.
    """

    norms: frozenset[str] = frozenset()
    base_quantization: str | None = None

    def __init__(self, root: Path, max_rank: int) -> None:
        self.root = root
        self._adapter = lora.Adapter(root, max_rank)
        self.content = self._adapter.content
        self.num_bytes = self._adapter.num_bytes
        self.rank = max(self._adapter.ranks.values())
        self.bits_per_weight = self._adapter.bits_per_weight
        self.slot_bits_per_weight: float | None = self._adapter.slot_bits_per_weight

    def check_content(self) -> None:
        """Nothing says what an adapter's content should be."""

    def check_base(self, base: Checkpoint, sha256: Callable[[str], str]) -> None:
        """An adapter does not say which weights it was made for: its shapes are checked with its image."""

    def image_bytes(self, shapes: Shapes) -> int:
        """What its image takes."""
        return head_bytes(len(shapes)) + self._adapter.slot_bytes

    def image(self, shapes: Shapes, cuts: Cuts = NO_CUTS) -> torch.Tensor:
        """Its slot image."""
        return adapter_image(self._adapter, shapes, cuts)


def open_source(root: Path, max_rank: int) -> Source:
    """Open a servable directory.

    Args:
        root: A compressed expert's, or a LoRA adapter's with its `adapter_config.json`.
        max_rank: The largest rank of an adapter.

    Raises:
        ValueError: It is neither, damaged, newer than this version, or no slot holds it.
    """
    if (root / lora.CONFIG_FILE).exists():
        return LoraExpert(root, max_rank)
    return CompressedExpert(root)
