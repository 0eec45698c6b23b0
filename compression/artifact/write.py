"""Write an artifact: weights, manifest, configuration, recipe, tokenizer files and model card."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch

from deltamux.compression.artifact.card import write_card
from deltamux.compression.artifact.manifest import (
    BaseIdentity,
    Manifest,
    Totals,
    deltamux_version,
    write_manifest,
)
from deltamux.compression.artifact.stored import Encoded, Entry
from deltamux.compression.checkpoint.architecture import Role
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.checkpoint.settings import GENERATION_FILE
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.files import read_json, sha256
from deltamux.compression.image.layout import RECORD_BYTES, head_bytes
from deltamux.compression.names import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    RECIPE_FILE,
    WEIGHTS_FILE,
)
from deltamux.compression.recipe import Recipe, dump_recipe
from deltamux.compression.saving import save_tensors, save_text
from deltamux.compression.streaming.stops import stop_ids


def write_artifact(
    difference: Difference, recipe: Recipe, weights: Iterable[Encoded], target: Path
) -> Manifest:
    """Fill a directory with everything but the model card; nothing is verified yet.

    Args:
        difference: Base and expert.
        recipe: What was done.
        weights: What is stored.
        target: The directory.

    Returns:
        The manifest.
    """
    entries: list[Entry] = []
    tensors: dict[str, torch.Tensor] = {}
    served = {spec.name for spec in difference.specs if spec.served}
    for weight in weights:
        outside = {} if weight.entry.name in served else {"slot_bytes": None}
        entries.append(weight.entry.model_copy(update=outside))
        tensors |= weight.named_tensors()
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    save_tensors(tensors, target / WEIGHTS_FILE, metadata)
    order = {spec.name: index for index, spec in enumerate(difference.specs)}
    save_text(dump_recipe(recipe), target / RECIPE_FILE)
    _write_side_files(difference, target)
    manifest = Manifest(
        deltamux_version=deltamux_version(),
        expert=difference.expert.source,
        base=_identity(difference),
        tied_embeddings=difference.base.tied,
        weights_sha256=sha256(target / WEIGHTS_FILE),
        tensors=sorted(entries, key=lambda entry: order[entry.name]),
        totals=_totals(difference, entries, (target / WEIGHTS_FILE).stat().st_size),
    )
    return write_manifest(manifest, target)


def _identity(difference: Difference) -> BaseIdentity:
    base = difference.base
    return BaseIdentity(
        source=base.source,
        revision=base.revision,
        sha256=difference.base_hashes,
        quantization=base.quantization,
    )


def _write_side_files(difference: Difference, target: Path) -> None:
    """The expert's configuration, tokenizer and templates, with all tokens that end its turn where servers look."""
    expert = difference.expert
    marked = {
        "quantization_config": {"quant_method": FORMAT, "format_version": FORMAT_VERSION},
        # A tied expert of an untied base has two matrices once it is merged.
        "tie_word_embeddings": difference.base.tied,
    }
    save_text(json.dumps(expert.config | marked, indent=2), target / CONFIG_FILE)
    expert.copy_side_files(target)
    ids = stop_ids(expert.root)
    if ids:
        path = target / GENERATION_FILE
        content = read_json(path) if path.is_file() else {}
        content |= {"eos_token_id": ids if len(ids) > 1 else ids[0]}
        save_text(json.dumps(content, indent=2), path)


def finish_artifact(
    manifest: Manifest, recipe: Recipe, verification: Evaluation | None, target: Path
) -> Manifest:
    """Note what the comparison with the expert gave, and write the model card."""
    if verification is not None:
        manifest = manifest.model_copy(update={"verification": asdict(verification)})
        manifest = write_manifest(manifest, target)
    write_card(manifest, recipe, target)
    return manifest


def linear_weights(difference: Difference) -> int:
    """Weights in the decoder's linears, changed or not."""
    return _num_weights(difference, Role.LINEAR)


def linear_records(difference: Difference) -> int:
    """Bytes of the linears' records in a slot image, changed or not."""
    return RECORD_BYTES * sum(spec.role is Role.LINEAR for spec in difference.specs)


def _totals(difference: Difference, entries: list[Entry], file_bytes: int) -> Totals:
    weights = linear_weights(difference)
    linears = [entry for entry in entries if entry.role is Role.LINEAR]
    tables = [entry for entry in entries if entry.role in (Role.EMBEDDING, Role.LM_HEAD)]
    linear_bytes, embedding_bytes = (sum(e.bytes for e in some) for some in (linears, tables))
    totals = Totals(
        linear_weights=weights,
        linear_bytes=linear_bytes,
        bits_per_weight=linear_bytes * 8 / weights,
        embedding_bytes=embedding_bytes,
        other_bytes=sum(entry.bytes for entry in entries) - linear_bytes - embedding_bytes,
        weights_file_bytes=file_bytes,
        expert_bytes=difference.expert.total_bytes(),
    )
    if any(entry.slot_bytes is None for entry in entries):
        return totals
    slot_bytes = head_bytes(len(difference.specs)) + sum(entry.slot_bytes or 0 for entry in entries)
    in_linears = linear_records(difference) + sum(entry.slot_bytes or 0 for entry in linears)
    return totals.model_copy(
        update={
            "slot_bytes": slot_bytes,
            "slot_bits_per_weight": in_linears * 8 / weights,
            "slot_bits_overall": slot_bytes * 8 / _num_weights(difference),
        }
    )


def _num_weights(difference: Difference, role: Role | None = None) -> int:
    """Weights of the base, or of those with a role."""
    shapes = (difference.base.shape(s.name) for s in difference.specs if role in (None, s.role))
    return sum(map(prod, shapes))
