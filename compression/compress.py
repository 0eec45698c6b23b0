"""Compress an expert: diff → calibrate → quantize → pack → write → verify.

The artifact is built in a hidden directory beside its final name and renamed when it is complete
and verified: an interrupted run leaves nothing under the final name.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from deltamux.compression.architecture import Role, TensorSpec
from deltamux.compression.artifact import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    Artifact,
    BaseIdentity,
    ChannelClasses,
    Manifest,
    TensorEntry,
    Totals,
    deltamux_version,
    encode_matrix,
    file_sha256,
    tensor_bytes,
)
from deltamux.compression.calibrate import input_energy
from deltamux.compression.card import write_card
from deltamux.compression.checkpoint import CONFIG_FILE, Checkpoint
from deltamux.compression.diff import Difference, compare
from deltamux.compression.evaluate import evaluate
from deltamux.compression.quantize import QuantizedDelta, quantize, quantize_changed_rows
from deltamux.compression.recipe import Recipe, dump_recipe
from deltamux.compression.text import Sample


@dataclass
class _Draft:
    """What has been compressed so far."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: list[TensorEntry] = field(default_factory=list)

    def add(self, entry: TensorEntry, tensors: dict[str, torch.Tensor]) -> None:
        self.entries.append(entry)
        self.tensors.update(tensors)


def compress(
    base: Checkpoint,
    expert: Checkpoint,
    output: Path,
    recipe: Recipe,
    *,
    calibration: list[Sample],
    held_out: list[Sample],
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Compress an expert into an artifact directory.

    Args:
        base: The shared model.
        expert: Its full fine-tune.
        output: Where the artifact goes.
        recipe: Schemes and channel classes.
        calibration: Conversations the input second moments are collected on.
        held_out: Conversations the result is verified on; none: not verified.
        overwrite: Replace an artifact that is there already.
        progress: Show bars.

    Returns:
        The manifest, as written.

    Raises:
        ValueError: The output exists, is no artifact to replace, or the two checkpoints have no
            delta (see `compare`).
    """
    if output.exists() and not overwrite:
        raise ValueError(
            f"{str(output)!r} exists already: name a new directory or pass --overwrite"
        )
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise ValueError(f"{str(output)!r} is not a compressed expert: it is not overwritten")
    difference = compare(base, expert)
    energy = input_energy(expert, calibration, progress)
    draft = _quantize_all(difference, recipe, energy, progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        target = Path(scratch) / "artifact"
        target.mkdir()
        manifest = _write(difference, recipe, draft, target)
        if held_out:
            manifest = _verify(difference, target, manifest, held_out, progress)
        write_card(manifest, recipe, target)
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        target.rename(output)
    return manifest


def _quantize_all(
    difference: Difference, recipe: Recipe, energy: dict[str, torch.Tensor], progress: bool
) -> _Draft:
    draft = _Draft()
    for spec in tqdm(difference.specs, desc="quantize", unit="tensor", disable=not progress):
        if spec.role is Role.NORM:
            _add_norm(draft, difference, spec)
            continue
        delta = difference.delta(spec)
        if not delta.any():
            continue
        if spec.role is Role.BIAS:
            tensors = {f"{spec.name}.delta": delta}
            draft.add(_vector_entry(spec, tensors), tensors)
        elif spec.role is Role.LINEAR:
            weights = difference.served_energy(spec, energy[spec.name])
            linear = recipe.linear
            quantized = quantize(delta, linear.scheme, weights, linear.salient_channels)
            folded = spec.norm if spec.norm in difference.folded else None
            _add_matrix(draft, spec, delta, quantized, energy_K=weights, folded_norm=folded)
        else:
            quantized = quantize_changed_rows(delta, recipe.embedding.scheme)
            _add_matrix(draft, spec, delta, quantized, energy_K=torch.ones(delta.shape[1]))
    return draft


def _add_norm(draft: _Draft, difference: Difference, spec: TensorSpec) -> None:
    if spec.name in difference.replaced:
        tensors = {f"{spec.name}.replacement": difference.expert.load(spec.name)}
        draft.add(_vector_entry(spec, tensors), tensors)


def _add_matrix(
    draft: _Draft,
    spec: TensorSpec,
    delta_NK: torch.Tensor,
    quantized: QuantizedDelta,
    *,
    energy_K: torch.Tensor,
    folded_norm: str | None = None,
) -> None:
    tensors = encode_matrix(spec.name, quantized)
    lost_NK = delta_NK - quantized.dequantize()
    coded, salient = quantized.channels_C, quantized.salient_channels_S
    num_coded = delta_NK.shape[1] if coded is None else len(coded)
    entry = TensorEntry(
        name=spec.name,
        role=spec.role,
        scheme=quantized.scheme,
        shape=quantized.shape,
        rows=None if quantized.rows_R is None else len(quantized.rows_R),
        classes=ChannelClasses(
            coded=num_coded,
            salient=0 if salient is None else len(salient),
            dropped=delta_NK.shape[1] - num_coded,
        ),
        folded_norm=folded_norm,
        bytes=tensor_bytes(tensors),
        error=_energy(lost_NK, energy_K) / max(_energy(delta_NK, energy_K), 1e-38),
    )
    draft.add(entry, tensors)


def _energy(delta_NK: torch.Tensor, energy_K: torch.Tensor) -> float:
    return float(delta_NK.square().sum(dim=0) @ energy_K)


def _vector_entry(spec: TensorSpec, tensors: dict[str, torch.Tensor]) -> TensorEntry:
    shape = tuple(next(iter(tensors.values())).shape)
    return TensorEntry(
        name=spec.name, role=spec.role, shape=shape, bytes=tensor_bytes(tensors), error=0.0
    )


def _write(difference: Difference, recipe: Recipe, draft: _Draft, target: Path) -> Manifest:
    base, expert = difference.base, difference.expert
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    save_file(draft.tensors, target / WEIGHTS_FILE, metadata=metadata)
    hashes = {spec.name: base.sha256(spec.name) for spec in difference.specs}
    manifest = Manifest(
        deltamux_version=deltamux_version(),
        expert=expert.source,
        base=BaseIdentity(source=base.source, revision=base.revision, sha256=hashes),
        tied_embeddings=base.tied,
        weights_sha256=file_sha256(target / WEIGHTS_FILE),
        tensors=draft.entries,
        totals=_totals(difference, draft, target),
    )
    _write_manifest(manifest, target)
    (target / RECIPE_FILE).write_text(dump_recipe(recipe))
    config = expert.config | {
        "quantization_config": {"quant_method": FORMAT, "format_version": FORMAT_VERSION}
    }
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    for path in expert.side_files():
        shutil.copy2(path, target)
    return manifest


def _totals(difference: Difference, draft: _Draft, target: Path) -> Totals:
    linear_weights = 0
    for spec in difference.specs:
        if spec.role is Role.LINEAR:
            rows, columns = difference.base.shape(spec.name)
            linear_weights += rows * columns
    linear = sum(entry.bytes for entry in draft.entries if entry.role is Role.LINEAR)
    embedding = sum(
        entry.bytes for entry in draft.entries if entry.role in (Role.EMBEDDING, Role.LM_HEAD)
    )
    return Totals(
        linear_weights=linear_weights,
        linear_bytes=linear,
        bits_per_weight=linear * 8 / linear_weights,
        embedding_bytes=embedding,
        other_bytes=sum(entry.bytes for entry in draft.entries) - linear - embedding,
        weights_file_bytes=(target / WEIGHTS_FILE).stat().st_size,
        expert_bytes=difference.expert.total_bytes(),
    )


def _write_manifest(manifest: Manifest, target: Path) -> None:
    (target / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1, exclude_none=True))


def _verify(
    difference: Difference,
    target: Path,
    manifest: Manifest,
    held_out: list[Sample],
    progress: bool,
) -> Manifest:
    """Reload what was written, compare it with the expert, and note the result."""
    artifact = Artifact(target)
    artifact.check_content()
    result = evaluate(difference.base, difference.expert, artifact, held_out, progress)
    manifest = manifest.model_copy(update={"verification": asdict(result)})
    _write_manifest(manifest, target)
    return manifest
