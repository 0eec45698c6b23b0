"""The input-embedding rows of a base checkpoint, read in pieces.

A wide model's embedding takes gigabytes as float32, and only three things are wanted of it: the
rows of the tokens that occur in the training prompts, mean and covariance of all rows, and their
product with a narrow matrix. All rows are scaled to length 1.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from deltamux.router.decide.features import Ids
from deltamux.router.decide.tables import Floats

# How checkpoints call the input embedding: Llama and most others; GPT-2; GPT-NeoX; Bloom.
_NAMES: Final = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_CHUNK_ROWS: Final = 8192


@dataclass(frozen=True)
class EmbeddingRows:
    """Where the input embedding [V, H] lies.

    Attributes:
        file: The safetensors file that holds it.
        tensor: Its name in the file.
        num_rows: V.
        width: H.
    """

    file: Path
    tensor: str
    num_rows: int
    width: int

    def gather(self, ids: Ids) -> Floats:
        """Return the rows of `ids` scaled to length 1, float32 [len(ids), H]; zeros beyond V."""
        rows = np.zeros((len(ids), self.width), dtype=np.float32)
        for start, chunk in self._chunks():
            inside = (ids >= start) & (ids < start + len(chunk))
            rows[inside] = chunk[ids[inside] - start]
        return normalise(rows)

    def project(self, matrix: Floats) -> Floats:
        """Return the rows scaled to length 1 [V, H] @ matrix [H, K], float32 [V, K]."""
        return np.concatenate([normalise(chunk) @ matrix for _, chunk in self._chunks()])

    def moments(self) -> tuple[Floats, Floats]:
        """Return mean [H] and covariance [H, H] of the rows scaled to length 1, float32."""
        total = np.zeros(self.width)
        products = np.zeros((self.width, self.width))
        for _, chunk in self._chunks():
            unit = normalise(chunk)
            total += unit.sum(axis=0, dtype=np.float64)
            products += unit.T @ unit
        mean = total / self.num_rows
        covariance = products / self.num_rows - np.outer(mean, mean)
        return mean.astype(np.float32), covariance.astype(np.float32)

    def _chunks(self) -> Iterator[tuple[int, Floats]]:
        """First row and float32 rows of each piece."""
        from safetensors import safe_open

        # Through torch, because numpy has no bfloat16.
        with safe_open(self.file, framework="pt") as file:
            rows = file.get_slice(self.tensor)
            for start in range(0, self.num_rows, _CHUNK_ROWS):
                yield start, rows[start : start + _CHUNK_ROWS].float().numpy()


def normalise(rows: Floats) -> Floats:
    """Scale every row to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Floats = rows / np.maximum(lengths, np.float32(1e-12))
    return scaled


def find_embedding(base: Path) -> EmbeddingRows | None:
    """Find the input embedding of a checkpoint directory.

    Returns:
        None where the directory holds no safetensors weights, or none with a known name.

    Raises:
        ValueError: The weights are damaged or missing, or the embedding is not a matrix.
    """
    from safetensors import SafetensorError, safe_open

    file = embedding_file(base)
    if file is None:
        return None
    try:
        with safe_open(file, framework="pt") as weights:
            name = _embedding_name(list(weights.keys()))
            shape = weights.get_slice(name).get_shape() if name else []
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); download the base again") from error
    if name is None:
        return None
    if len(shape) != 2:
        raise ValueError(f"{file}: {name!r} must have two dimensions, got {shape}")
    return EmbeddingRows(file, name, shape[0], shape[1])


def embedding_file(base: Path) -> Path | None:
    """Return the file that should hold the input embedding, present or not; None without weights."""
    index = base / _INDEX
    if not index.is_file():
        single = base / _WEIGHTS
        return single if single.is_file() else None
    files = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    name = _embedding_name(list(files))
    return base / files[name] if name else None


def _embedding_name(names: list[str]) -> str | None:
    """The input embedding among tensor names: the least nested one that ends like one."""
    found = [name for name in names if name.endswith(_NAMES)]
    return min(found, key=len, default=None)
