"""From a base and an artifact back to whole weights: W_base + Δ̂."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.stored import Stored
from deltamux.compression.checkpoint.architecture import EMBEDDING, tensor_specs
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.files import read_json
from deltamux.compression.names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from deltamux.compression.saving import make_folder, save_tensors, save_text

SHARD_BYTES = 2 * 1024**3


def check_base(
    artifact: Artifact, base: Checkpoint, sha256: Callable[[str], str] | None = None
) -> None:
    """Compare the base's tensors with the hashes in the manifest.

    Args:
        artifact: The compressed expert.
        base: The base that it is to be applied to.
        sha256: Tensor name to hash, where the caller keeps them; None hashes the tensors here.

    Raises:
        ValueError: A tensor is missing or differs, or is none that the manifest knows: the artifact belongs to
            another base.
    """
    sha256 = sha256 or base.sha256
    identity = artifact.manifest.base
    names = {spec.name for spec in tensor_specs(base.config, set(base.files))}
    for name in sorted(names | identity.sha256.keys() | artifact.entries.keys()):
        expected = identity.sha256.get(name)
        if expected is None or name not in names or sha256(name) != expected:
            raise ValueError(
                f"{str(artifact.root)!r} was made for the base {identity.source!r}; tensor "
                f"{name!r} of {base.source!r} differs: use that base or compress the expert again"
            )
    for name, entry in artifact.entries.items():
        if base.shape(name) != entry.shape:
            raise ValueError(
                f"{name!r} has shape {entry.shape} in {str(artifact.root)!r} and {base.shape(name)} "
                "in the base: copy or compress the expert again"
            )


def expert_weights(
    base: Checkpoint, stored: Callable[[str], Stored | None]
) -> Callable[[str], torch.Tensor]:
    """A weight source of the decompressed expert: float32 where it differs from the base.

    Args:
        base: The base.
        stored: Gives what is stored for a weight; None: it is the base's.
    """

    def load(name: str) -> torch.Tensor:
        weight, found = base.load(name), stored(name)
        return weight if found is None else found.dense(weight)

    return load


def reconstructed(artifact: Artifact, base: Checkpoint) -> Callable[[str], torch.Tensor]:
    """The decompressed expert of an artifact and its base, as `expert_weights` gives it."""
    return expert_weights(
        base, lambda name: artifact.stored(name) if name in artifact.entries else None
    )


def merge(
    base: Checkpoint,
    artifact: Artifact,
    output: Path,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> None:
    """Write the decompressed expert as an ordinary checkpoint.

    Args:
        base: The base the artifact was made for.
        artifact: The compressed expert.
        output: A directory that does not exist yet.
        dtype: Of the written weights; None keeps each base tensor's own. bfloat16 rounds away the
            small parts of a delta: float32 keeps all of it.
        progress: Show a bar.

    Raises:
        ValueError: The output exists, or the base is another one.
    """
    if output.exists():
        raise ValueError(f"{str(output)!r} exists already: name a new directory")
    check_base(artifact, base)
    artifact.check_content()
    base = base.as_served(artifact.manifest.base.quantization)
    make_folder(output.parent)
    load = reconstructed(artifact, base)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        target = Path(scratch) / "checkpoint"
        target.mkdir()
        _write_shards(base, load, dtype, target, progress)
        written = dtype or base.dtype(EMBEDDING)
        _write_side_files(artifact, written, target)
        target.rename(output)


def _write_shards(
    base: Checkpoint,
    load: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None,
    target: Path,
    progress: bool,
) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    size, total = 0, 0

    def flush() -> None:
        file = f"model-{len(shards):05d}.safetensors"
        save_tensors(shards[-1], target / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], file))
        shards[-1].clear()

    for name in tqdm(sorted(base.files), desc="merge", unit="tensor", disable=not progress):
        tensor = load(name).to(dtype or base.dtype(name)).contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            flush()
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + num_bytes, total + num_bytes
    flush()
    if len(shards) == 1:
        (target / "model-00001.safetensors").rename(target / WEIGHTS_FILE)
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    save_text(json.dumps(index, indent=2, sort_keys=True), target / INDEX_FILE)


def _write_side_files(artifact: Artifact, dtype: torch.dtype, target: Path) -> None:
    config = read_json(artifact.root / CONFIG_FILE)
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    save_text(json.dumps(config, indent=2), target / CONFIG_FILE)
    Checkpoint(artifact.root, str(artifact.root), None, {}).copy_side_files(target)
