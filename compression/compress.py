"""Compress an expert: diff → calibrate → quantize → pack → write → verify.

The decoder is measured layer by layer (`measure.py`): every linear in every way of its ladder. Then
bytes are shared out among the matrices (`allocate.py`), what was chosen is written, and the result is
read back and compared with the expert. The artifact is built in a hidden directory beside its final
name and renamed when it is complete and verified: an interrupted run leaves nothing under the final
name, and goes on from its last finished layer when it is started again.
"""

import tempfile
from pathlib import Path

from deltamux.compression.allocate import Choice
from deltamux.compression.artifact import MANIFEST_FILE, Artifact, Manifest
from deltamux.compression.budget import choose, importances, rate_curves
from deltamux.compression.card import write_card
from deltamux.compression.checkpoint import Checkpoint
from deltamux.compression.diff import compare
from deltamux.compression.distil import Student, distil
from deltamux.compression.evaluate import Evaluation, Reference
from deltamux.compression.measure import measure, measure_key
from deltamux.compression.recipe import Recipe
from deltamux.compression.reconstruct import reconstructed
from deltamux.compression.text import Sample
from deltamux.compression.workspace import Workspace
from deltamux.compression.write import fixed_part, note_verification, write_artifact

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
            (see `compare`), or the recipe's target cannot be met.
    """
    if output.exists() and not overwrite:
        raise ValueError(
            f"{str(output)!r} exists already: name a new directory or pass --overwrite"
        )
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise ValueError(f"{str(output)!r} is not a compressed expert: it is not overwritten")
    difference = compare(base, expert)
    fitted, learned = _split(calibration, recipe)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Workspace(
        output.parent / f".{output.name}.partial", measure_key(difference, recipe, fitted)
    )
    measured = measure(difference, recipe, fitted, work, progress)
    fixed = fixed_part(difference, recipe.embedding)
    reference = Reference(base, expert, held_out, progress) if held_out else None
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        target = Path(scratch) / "artifact"
        target.mkdir()

        def write(choice: Choice, factors: dict[str, float] | None = None) -> Artifact:
            draft = fixed.with_linears(work, measured, choice, factors or {})
            write_artifact(difference, recipe, draft, target)
            artifact = Artifact(target)
            artifact.check_content()
            return artifact

        def attempt(choice: Choice) -> Evaluation | None:
            return _verified(reference, write(choice), base)

        costs = importances(recipe.allocation.importance, measured, expert, fitted)
        choice = choose(recipe.allocation, difference, rate_curves(measured, costs), fixed, attempt)
        artifact = write(choice)
        if recipe.distillation.steps:
            student = Student.of(artifact, base)
            factors = distil(student, expert, learned, recipe.distillation, progress)
            artifact = write(choice, factors)
        manifest = note_verification(target, _verified(reference, artifact, base))
        write_card(manifest, recipe, target)
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        target.rename(output)
    work.clear()
    return manifest


def _split(calibration: list[Sample], recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    """What codes are fitted to, and what steps are learned from: other text where there is enough."""
    count = len(calibration) // DISTILLATION_SHARE if recipe.distillation.steps else 0
    if count == 0:
        return calibration, calibration
    return calibration[:-count], calibration[-count:]


def _verified(
    reference: Reference | None, artifact: Artifact, base: Checkpoint
) -> Evaluation | None:
    return None if reference is None else reference.compare(reconstructed(artifact, base))
