"""Compress an expert: diff → calibrate → quantize → pack → write → verify.

The decoder is measured layer by layer (`measure.py`): every linear in every way of its ladder. Then
bytes are shared out among the matrices (`problem.py`), what was chosen is written, and the result is
read back and compared with the expert. The artifact is built in a hidden directory beside its final
name and renamed when it is complete and verified: an interrupted run leaves nothing under the final
name, and goes on from its last finished layer when it is started again.
"""

import tempfile
from pathlib import Path

from deltamux.compression.artifact.artifact import MANIFEST_FILE, Artifact, Manifest
from deltamux.compression.artifact.card import write_card
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.choice.budget import check_measurable
from deltamux.compression.choice.distil import Student, distil
from deltamux.compression.choice.draft import exact_part, note_verification
from deltamux.compression.choice.measure import measure, measure_key
from deltamux.compression.choice.selection import Job, Rungs
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.text import Sample

# The part of the calibration text that distillation has for itself.
DISTILLATION_SHARE = 4


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
        recipe: Schemes, and how much they may take.
        calibration: Conversations the input second moments are collected on.
        held_out: Conversations the result is verified on; none: not verified.
        overwrite: Replace an artifact that is there already.
        progress: Show bars.

    Returns:
        The manifest, as written.

    Raises:
        ValueError: The output exists, is no artifact to replace, the two checkpoints have no delta
            (see `compare` and `Difference.check_finite`), or the recipe's limit cannot be kept.
    """
    if output.exists() and not overwrite:
        raise ValueError(
            f"{str(output)!r} exists already: name a new directory or pass --overwrite"
        )
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise ValueError(f"{str(output)!r} is not a compressed expert: it is not overwritten")
    difference = compare(base, expert)
    if not recipe.lossless:
        check_measurable(recipe.allocation, bool(held_out))
        difference.check_finite()
    output.parent.mkdir(parents=True, exist_ok=True)
    fitted, learned = _split(calibration, recipe)
    key = {} if recipe.lossless else measure_key(difference, recipe, fitted)
    work = Workspace(output.parent / f".{output.name}.partial", key)
    # Inside the workspace, so that what a killed run leaves is deleted with it.
    with tempfile.TemporaryDirectory(dir=work.root) as scratch:
        target = Path(scratch) / "artifact"
        target.mkdir()
        job = Job(difference, recipe, target, held_out, progress)
        if recipe.lossless:
            artifact = job.write(exact_part(difference, progress))
        else:
            artifact = _compress_coded(job, work, fitted, learned)
        manifest = note_verification(target, job.compared(artifact))
        write_card(manifest, recipe, target)
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        target.rename(output)
    work.clear()
    return manifest


def _compress_coded(
    job: Job, work: Workspace, fitted: list[Sample], learned: list[Sample]
) -> Artifact:
    """Measure all ladders, choose their rungs, and learn the steps."""
    difference, recipe = job.difference, job.recipe
    rungs = Rungs(job, work, measure(difference, recipe, fitted, work, job.progress))
    choice, stretch = rungs.select(fitted)
    factors = rungs.stretched(stretch)
    artifact = rungs.write(choice, factors)
    if recipe.distillation.steps:
        student = Student.of(artifact, difference.base)
        learnt = distil(student, difference.expert, learned, recipe.distillation, job.progress)
        artifact = rungs.write(choice, {name: stretch * learnt[name] for name in learnt})
    target = recipe.allocation.target_kl
    if target is not None:
        result = job.compared(artifact)
        # Learned on other text, the factors can miss what was met without them.
        if result is None or result.kl > target:
            artifact = rungs.write(choice)
    return artifact


def _split(calibration: list[Sample], recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    """What codes are fitted to, and what steps are learned from: other text where there is enough."""
    count = len(calibration) // DISTILLATION_SHARE if recipe.distillation.steps else 0
    if count == 0:
        return calibration, calibration
    return calibration[:-count], calibration[-count:]
