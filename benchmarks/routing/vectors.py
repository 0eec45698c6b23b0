"""Sentence vectors that are kept: by a process, and between runs where a file is named."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from deltamux.router.decide.encoder import SentenceEncoder


class Remembering:
    """Stands for an encoder and keeps every vector: splits and seeds share most texts."""

    def __init__(self, encoder: SentenceEncoder, file: Path | None = None) -> None:
        self.encoder, self.sha256, self._file = encoder, encoder.sha256, file
        self._known: dict[str, Any] = {}
        if file is not None and file.is_file():
            with np.load(file) as kept:
                self._known = dict(zip(kept["keys"].tolist(), kept["vectors"], strict=True))

    def vector(self, text: str) -> Any:
        """A text's vector."""
        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()
        if key not in self._known:
            self._known[key] = self.encoder.run(self.encoder.pieces(text))
        return self._known[key]

    def keep(self) -> None:
        """Write the file, where one is named."""
        if self._file is not None:
            keys, vectors = list(self._known), np.stack(list(self._known.values()))
            np.savez(self._file, keys=np.array(keys), vectors=vectors)
