"""Slot images on disk, beside the base's hashes: an expert that was loaded before is read and not decoded again.

A file is named by what it was made from: the expert's content, the base's weights and the image's version. It ends with
the SHA-256 of the image in it, since products trust the offsets in an image.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deltamux.compression.image.build import Shapes
from deltamux.compression.image.cut import NO_CUTS, Cuts
from deltamux.compression.image.layout import VERSION, check_image

logger = logging.getLogger("vllm.deltamux")

SUFFIX = ".image"
HASH_BYTES = hashlib.sha256().digest_size


class ImageCache:
    """Slot images in a directory, the least recently read out first.

    Args:
        capacity: Bytes of all files; 0: nothing is kept, and nothing read.
        shapes: Of the base's tensors.
        folder: Where they are; None: in the user's cache directory.
        cuts: Of weights that images hold a part of.
    """

    def __init__(
        self, capacity: int, shapes: Shapes, folder: Path | None = None, cuts: Cuts = NO_CUTS
    ) -> None:
        self.folder = folder or Path.home() / ".cache" / "deltamux" / "images"
        self._capacity = capacity
        self._shapes = shapes
        self._cuts = sorted(cuts.items())

    def image(self, content: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """An expert's image, from the cache or made and kept.

        Args:
            content: The identity of the expert's content.
            make: Decodes the expert, which has been checked.
        """
        if self._capacity == 0:
            return make()
        path = self.folder / f"{self._key(content)}{SUFFIX}"
        try:
            return self._read(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("deltamux: a cached slot image is made anew: %s", error)
        image = make()
        try:
            self._write(path, image)
        except OSError as error:
            logger.warning("deltamux: a slot image is not kept: %s", error)
        return image

    def _key(self, content: str) -> str:
        made_from = repr((VERSION, content, sorted(self._shapes.items()), self._cuts))
        return hashlib.sha256(made_from.encode()).hexdigest()[:32]

    def _read(self, path: Path) -> torch.Tensor:
        """The image in a file.

        Raises:
            FileNotFoundError: There is none.
            OSError: It cannot be read.
            ValueError: It is damaged, of another version or for another base.
        """
        found = np.fromfile(path, np.uint8)
        content, kept = found[:-HASH_BYTES], found[-HASH_BYTES:].tobytes()
        image = torch.from_numpy(content)
        check_image(image, len(self._shapes))
        if hashlib.sha256(content.data).digest() != kept:
            raise ValueError(f"{str(path)!r} is damaged: its SHA-256 is another")
        os.utime(path)
        return image

    def _write(self, path: Path, image: torch.Tensor) -> None:
        size = image.numel() + HASH_BYTES
        if size > self._capacity:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(size)
        # Servers side by side may write the same image: each renames a whole file of its own.
        scratch = path.with_suffix(f".{os.getpid()}")
        content = image.numpy().data
        with scratch.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())
        scratch.replace(path)

    def _make_room(self, size: int) -> None:
        files = [(path, path.stat()) for path in self.folder.glob(f"*{SUFFIX}")]
        total = size + sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda each: each[1].st_mtime_ns):
            if total <= self._capacity:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
