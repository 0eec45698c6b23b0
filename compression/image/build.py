"""From a compressed expert, or a LoRA adapter, to its slot image.

The main path from disk to host: every stored weight becomes a record (`weights.py`), the records go into one
buffer (`layout.py`). Weights are read side by side, since zlib and the compiled decoder leave the interpreter
to others while they work.
"""

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.architecture import Role
from deltamux.compression.image.adapter import Adapter
from deltamux.compression.image.cut import NO_CUTS, WHOLE, Cut, Cuts
from deltamux.compression.image.layout import Record, assemble

# Shapes of the base's tensors by name, in the base's own order.
Shapes = dict[str, tuple[int, ...]]
# Threads that decode an expert's matrices; each holds one of them unpacked.
MOST_READERS = 8


def artifact_image(artifact: Artifact, shapes: Shapes, cuts: Cuts = NO_CUTS) -> torch.Tensor:
    """The slot image of a compressed expert.

    Args:
        artifact: The expert, checked.
        shapes: Of the base's tensors, in its own order (`tensor_specs`): their places are the records'.
        cuts: Of weights that this device holds a part of.

    Returns:
        uint8 [bytes].

    Raises:
        ValueError: The expert changes a weight that the base does not have or that has another shape, or a
            stream is damaged.
    """
    for name, entry in artifact.entries.items():
        if shapes.get(name) != entry.shape:
            raise ValueError(
                f"{name!r} has shape {entry.shape} in {str(artifact.root)!r} and "
                f"{shapes.get(name)} in the base: compress the expert against this base"
            )
    stored: dict[str, list[str]] = {}
    for name in artifact.entries:
        stored.setdefault(_weight_of(artifact, name), []).append(name)
    readers = {
        weight: partial(_record, artifact, names, cuts.get(weight, WHOLE))
        for weight, names in stored.items()
    }
    return image_of(shapes, readers)


def adapter_image(adapter: Adapter, shapes: Shapes, cuts: Cuts = NO_CUTS) -> torch.Tensor:
    """The slot image of a LoRA adapter; otherwise as `artifact_image`."""
    return image_of(shapes, adapter.records(shapes, cuts))


def image_of(names: Collection[str], readers: Mapping[str, Callable[[], Record]]) -> torch.Tensor:
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


def _record(artifact: Artifact, names: list[str], cut: Cut) -> Record:
    """The record of a weight or of a part of it, from all that is stored for it."""
    whole = Record({}, {})
    for name in names:
        record = artifact.stored(name).record(cut)
        if record is None:
            raise ValueError(
                f"{name!r} of {str(artifact.root)!r} is kept exactly, which no slot does"
            )
        whole.numbers.update(record.numbers)
        whole.sections.update(record.sections)
    return whole
