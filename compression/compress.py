"""Compress an expert: prepare, measure, choose, tune, write, verify.

The decoder is measured layer by layer (`measure.py`): every linear in the ways of its ladder, of which a look at some
rows leaves two where it can. Then bytes, on disk and in a slot, are shared out among the matrices (`choose.py`), all
deltas are stretched by what rounding took off them (`tune.py`), and the artifact is written, once, and read back for
the comparison with the expert. It is built in a hidden directory beside its final name and renamed when it is complete
and verified: an interrupted run leaves nothing under the final name, and goes on from its last finished layer when it
is started again.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.manifest import Manifest
from deltamux.compression.artifact.merge import reconstructed
from deltamux.compression.artifact.write import finish_artifact, write_artifact
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.choose import check_measurable, choose
from deltamux.compression.choice.fixed import exact_weights, fixed_weights
from deltamux.compression.choice.measure import measure, measure_key
from deltamux.compression.choice.predict import predict, shortlist
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.tune import tune
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.names import MANIFEST_FILE
from deltamux.compression.recipe import Recipe
from deltamux.compression.saving import make_folder
from deltamux.compression.streaming.moments import KEPT_BYTES, InputMoments
from deltamux.compression.streaming.text import Sample


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
    """Compress an expert into an artifact directory; returns the manifest, as written.

    Args:
        base: The shared model.
        expert: Its full fine-tune.
        output: Where the artifact goes.
        recipe: Schemes, and how much they may take.
        calibration: Conversations the input second moments are collected on.
        held_out: Conversations the result is verified on; none: not verified.
        overwrite: Replace an artifact that is there already.
        progress: Show bars.

    Raises:
        ValueError: The output exists, is no artifact to replace, the two have no delta (see
            `compare`, `Difference.check_finite`), or the limits cannot be kept.
    """
    _check_output(output, overwrite)
    task = prepare(base, expert, recipe, texts=(calibration, held_out), progress=progress)
    work = _workspace(task, output)
    with _new_folder(work) as target:
        candidates = _candidates(task, work)
        choice = choose(candidates)
        stretches = tune(candidates, choice)
        weights = candidates.encoded(choice, stretches)
        manifest = write_artifact(task.difference, recipe, weights, target)
        manifest = finish_artifact(manifest, recipe, verify(task, target), target)
        _put(target, output)
    work.clear()
    return manifest


@contextmanager
def _new_folder(work: Workspace) -> Iterator[Path]:
    """Inside the workspace, so that what a killed run leaves is deleted with it."""
    with tempfile.TemporaryDirectory(dir=work.root) as scratch:
        target = Path(scratch) / "artifact"
        target.mkdir()
        yield target


def _put(target: Path, output: Path) -> None:
    """Move what is complete into its place; what was there goes with the scratch folder."""
    if output.exists():
        output.rename(target.parent / "replaced")
    target.rename(output)


def prepare(
    base: Checkpoint,
    expert: Checkpoint,
    recipe: Recipe,
    *,
    texts: tuple[list[Sample], list[Sample]],
    progress: bool = True,
) -> Task:
    """Check everything that can be checked before the long work, and share out the text.

    Args:
        base: The shared model.
        expert: Its full fine-tune.
        recipe: What is to be done.
        texts: For calibration, and held out.
        progress: Show bars.

    Raises:
        ValueError: The two checkpoints have no delta, or the recipe needs text that is not there.
    """
    difference = compare(base.as_served(recipe.base_as_served), expert)
    calibration, held_out = texts
    if not recipe.lossless:
        check_measurable(recipe.allocation, bool(held_out))
        difference.check_finite()
    return Task.of(difference, recipe, calibration, held_out, progress)


def verify(task: Task, target: Path) -> Evaluation | None:
    """Read an artifact back and compare it with the expert on the held-out text, if there is any.

    Raises:
        ValueError: What is on disk is not what was written.
    """
    artifact = Artifact(target)
    artifact.check_content()
    if task.reference is None:
        return None
    return task.reference.compare(reconstructed(artifact, task.difference.base))


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise ValueError(
            f"{str(output)!r} exists already: name a new directory or pass --overwrite"
        )
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise ValueError(f"{str(output)!r} is not a compressed expert: it is not overwritten")


def _workspace(task: Task, output: Path) -> Workspace:
    make_folder(output.parent)
    key = {} if task.recipe.lossless else measure_key(task.difference, task.recipe, task.fitted)
    return Workspace(output.parent / f".{output.name}.partial", key)


def _candidates(task: Task, work: Workspace) -> Candidates:
    """Measure every linear in every way, and encode what leaves no choice."""
    if task.recipe.lossless:
        return Candidates(task, work, [], exact_weights(task.difference, task.progress))
    fixed = fixed_weights(task.difference, task.recipe.embedding, task.recipe.limiting_slot_bits)
    # Where rungs are predicted, every layer is looked at twice.
    kept_bytes = KEPT_BYTES if task.recipe.predicts else 0
    inputs = InputMoments(task.difference.expert, task.fitted, kept_bytes)
    given = (task.difference, task.recipe, inputs, work)
    wanted = None
    if task.recipe.predicts:
        predicted = predict(*given, progress=task.progress)
        wanted = shortlist(Candidates(task, work, predicted, fixed))
    ladders = measure(*given, progress=task.progress, wanted=wanted)
    return Candidates(task, work, ladders, fixed)
