"""From a compressed expert, or a LoRA adapter, to its slot image.

The main path from disk to host: every stored weight becomes a record (`weights.py`), the records go into one
buffer (`layout.py`). Weights are read side by side, since zlib and the compiled decoder leave the interpreter
to others while they work.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.architecture import Role
from deltamux.compression.image.layout import Record, assemble
from deltamux.compression.image.weights import (
    coded_record,
    factored_record,
    vector_record,
    with_vector,
)
from deltamux.compression.rounding.low_rank import FactoredDelta

# Threads that decode an expert's matrices; each holds one of them unpacked.
MOST_READERS = 8


def artifact_image(artifact: Artifact, names: Sequence[str]) -> torch.Tensor:
    """The slot image of a compressed expert.

    Args:
        artifact: The expert, checked.
        names: The base's tensors in its own order (`tensor_specs`): their places are the records'.

    Returns:
        uint8 [bytes].

    Raises:
        ValueError: The expert changes a weight that the base does not have, or a stream is damaged.
    """
    changed = {_weight_of(artifact, name) for name in artifact.entries}
    unknown = sorted(changed - set(names))
    if unknown:
        raise ValueError(f"the expert changes {unknown[0]!r}, which this base does not have")
    return image_of(names, {name: lambda name=name: _record(artifact, name) for name in changed})


def image_of(names: Sequence[str], readers: dict[str, Callable[[], Record]]) -> torch.Tensor:
    """Read records side by side, and put them into one buffer."""
    with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1)) as pool:
        pending = {
            index: pool.submit(readers[name]) for index, name in enumerate(names) if name in readers
        }
        records = {index: future.result() for index, future in pending.items()}
    return assemble(records, len(names))


def _weight_of(artifact: Artifact, name: str) -> str:
    """Whose record a stored weight is in: a bias's is its linear's."""
    is_bias = artifact.entries[name].role is Role.BIAS
    return f"{name.removesuffix('.bias')}.weight" if is_bias else name


def _record(artifact: Artifact, name: str) -> Record:
    bias = f"{name.removesuffix('.weight')}.bias"
    if name not in artifact.entries:
        return vector_record(artifact.vector(bias))
    if artifact.entries[name].role is Role.NORM:
        return vector_record(artifact.vector(name))
    stored = artifact.quantized(name)
    if isinstance(stored, FactoredDelta):
        record = factored_record(stored)
    else:
        record = coded_record(stored)
    return with_vector(record, artifact.vector(bias)) if bias in artifact.entries else record
