"""Write an artifact: the fixed part of an expert and the chosen rung of every linear."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from deltamux.compression.artifact.artifact import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    BaseIdentity,
    Manifest,
    TensorEntry,
    Totals,
    deltamux_version,
    encode_matrix,
    file_sha256,
    read_manifest,
    tensor_bytes,
)
from deltamux.compression.artifact.lossless import encode_exact
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.checkpoint import CONFIG_FILE, save_tensors
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.measure import matrix_entry
from deltamux.compression.choice.problem import Choice
from deltamux.compression.choice.workspace import Measured, Workspace
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.recipe import EmbeddingRecipe, Recipe, dump_recipe
from deltamux.compression.rounding.quantize import quantize_changed_rows


@dataclass
class Draft:
    """Tensors and manifest entries of an artifact that is not written yet."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: list[TensorEntry] = field(default_factory=list)

    def add(self, entry: TensorEntry, tensors: dict[str, torch.Tensor]) -> None:
        """Take one weight."""
        self.entries.append(entry)
        self.tensors.update(tensors)

    def with_linears(
        self,
        work: Workspace,
        measured: list[Measured],
        choice: Choice,
        factors: dict[str, float],
    ) -> "Draft":
        """This draft and a rung of each linear.

        Args:
            work: Where the rungs are.
            measured: The linears.
            choice: 0 stands for no delta, i for the i-th entry.
            factors: By weight name, what its steps are multiplied with.
        """
        draft = Draft(dict(self.tensors), list(self.entries))
        for matrix, rung in zip(measured, choice, strict=True):
            if rung == 0:
                continue
            tensors = work.tensors(matrix, rung - 1)
            entry = matrix.entries[rung - 1]
            # A product is scaled in its left factor.
            key = f"{matrix.name}.{'steps' if entry.rank is None else 'left.steps'}"
            steps = tensors[key].float() * factors.get(matrix.name, 1.0)
            tensors[key] = steps.to(torch.bfloat16)
            draft.add(entry, tensors)
        return draft


def fixed_part(difference: Difference, recipe: EmbeddingRecipe) -> Draft:
    """Whatever no budget is shared out over: embedding, lm_head, norms and biases."""
    draft = Draft()
    for spec in difference.specs:
        if spec.role is Role.NORM:
            if spec.name in difference.replaced:
                _add_vector(draft, spec, "replacement", difference.expert.load(spec.name))
        elif spec.role is not Role.LINEAR:
            delta = difference.delta(spec)
            if not delta.any():
                continue
            if spec.role is Role.BIAS:
                _add_vector(draft, spec, "delta", delta)
            else:
                _add_table(draft, spec, delta, recipe)
    return draft


def exact_part(difference: Difference, progress: bool = True) -> Draft:
    """Every tensor that differs from the base, bit for bit."""
    draft = Draft()
    base, expert = difference.base, difference.expert
    for spec in tqdm(difference.specs, desc="compress", unit="tensor", disable=not progress):
        before, tuned = base.load(spec.name), expert.load(spec.name)
        if tuned.dtype != before.dtype:
            raise ValueError(
                f"tensor {spec.name!r} is {tuned.dtype} in the expert and {before.dtype} in the "
                "base: a lossless delta needs one dtype; save both alike"
            )
        if torch.equal(tuned.view(torch.uint8), before.view(torch.uint8)):
            continue
        tensors = {f"{spec.name}.exact": encode_exact(tuned, before)}
        entry = TensorEntry(
            name=spec.name,
            role=spec.role,
            shape=tuple(tuned.shape),
            exact=True,
            bytes=tensor_bytes(tensors),
            error=0.0,
        )
        draft.add(entry, tensors)
    return draft


def _add_vector(draft: Draft, spec: TensorSpec, suffix: str, vector: torch.Tensor) -> None:
    tensors = {f"{spec.name}.{suffix}": vector}
    entry = TensorEntry(
        name=spec.name,
        role=spec.role,
        shape=tuple(vector.shape),
        bytes=tensor_bytes(tensors),
        error=0.0,
    )
    draft.add(entry, tensors)


def _add_table(
    draft: Draft, spec: TensorSpec, delta_VK: torch.Tensor, recipe: EmbeddingRecipe
) -> None:
    quantized = quantize_changed_rows(delta_VK, recipe.fixed_scheme, recipe.step)
    tensors = encode_matrix(spec.name, quantized)
    rest, whole = (delta_VK - quantized.dequantize()).norm(), delta_VK.norm()
    error = float(rest / whole.clamp_min(torch.finfo(torch.float32).tiny)) ** 2
    draft.add(matrix_entry(spec, quantized, tensors, error=error), tensors)


def write_artifact(difference: Difference, recipe: Recipe, draft: Draft, target: Path) -> None:
    """Fill a directory with everything but the model card."""
    base, expert = difference.base, difference.expert
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    save_tensors(draft.tensors, target / WEIGHTS_FILE, metadata)
    order = {spec.name: index for index, spec in enumerate(difference.specs)}
    manifest = Manifest(
        deltamux_version=deltamux_version(),
        expert=expert.source,
        base=BaseIdentity(
            source=base.source, revision=base.revision, sha256=difference.base_hashes
        ),
        tied_embeddings=base.tied,
        weights_sha256=file_sha256(target / WEIGHTS_FILE),
        tensors=sorted(draft.entries, key=lambda entry: order[entry.name]),
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


def note_verification(target: Path, result: Evaluation | None) -> Manifest:
    """Put what the comparison with the expert gave into the manifest."""
    manifest = read_manifest(target)
    if result is not None:
        manifest = manifest.model_copy(update={"verification": asdict(result)})
        _write_manifest(manifest, target)
    return manifest


def linear_weights(difference: Difference) -> int:
    """Weights in the decoder's linears, changed or not."""
    total = 0
    for spec in difference.specs:
        if spec.role is Role.LINEAR:
            rows, columns = difference.base.shape(spec.name)
            total += rows * columns
    return total


def _totals(difference: Difference, draft: Draft, target: Path) -> Totals:
    weights = linear_weights(difference)
    linear = sum(entry.bytes for entry in draft.entries if entry.role is Role.LINEAR)
    embedding = sum(
        entry.bytes for entry in draft.entries if entry.role in (Role.EMBEDDING, Role.LM_HEAD)
    )
    return Totals(
        linear_weights=weights,
        linear_bytes=linear,
        bits_per_weight=linear * 8 / weights,
        embedding_bytes=embedding,
        other_bytes=sum(entry.bytes for entry in draft.entries) - linear - embedding,
        weights_file_bytes=(target / WEIGHTS_FILE).stat().st_size,
        expert_bytes=difference.expert.total_bytes(),
    )


def _write_manifest(manifest: Manifest, target: Path) -> None:
    (target / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1, exclude_none=True))
