"""What `deltamux compress` works with, from its flags: a recipe, and text to calibrate and verify on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from deltamux.compression.checkpoint.architecture import EMBEDDING
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.recipe import PRESETS, CalibrationRecipe, Recipe, load_recipe
from deltamux.compression.streaming.served import Reading, reading_differences, served_reading
from deltamux.compression.streaming.text import Sample, builtin_rows, random_samples, read_rows
from deltamux.compression.validation import problems

# Rows set aside for verification where no held-out file is given: one in eight, 32 at most. Chosen, not
# measured.
HELD_OUT_SHARE = 8
HELD_OUT_ROWS = 32
# Length of a random sample, where there is no tokenizer to read text with. Chosen, not measured.
RANDOM_TOKENS = 128


@dataclass(frozen=True)
class Limits:
    """What the command line says on size or quality: at most one of the first three."""

    bits: float | None
    budget: str | None
    target_kl: float | None
    slot_bits: float | None


def chosen_recipe(path: Path | None, preset: str | None, limits: Limits, lossless: bool) -> Recipe:
    """The recipe of a file or preset, with what the other options change in it.

    Raises:
        ValueError: Options that exclude each other, or a value out of range.
    """
    if path and preset:
        raise ValueError(f"give --recipe or --preset, not both: got {str(path)!r} and {preset!r}")
    if preset and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if limits.target_kl and not path:
        # The search is over the linears alone: leave it a fine embedding.
        preset = preset or "faithful"
    recipe = PRESETS[preset] if preset else load_recipe(path)
    given = {
        "bits": limits.bits,
        "num_bytes": _num_bytes(limits.budget),
        "target_kl": limits.target_kl,
    }
    changed: dict[str, Any] = recipe.model_dump()
    if any(value is not None for value in given.values()):
        # A preset's limit in a slot belongs to its limit on disk.
        changed["allocation"] |= given | {"slot_bits": None}
    if limits.slot_bits is not None:
        changed["allocation"]["slot_bits"] = limits.slot_bits
    if lossless:
        changed["lossless"] = True
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise ValueError(problems(error)) from error


def _num_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise ValueError(f"budget must be a size like 25MB or 24MiB, got {text!r}") from error


def chosen_texts(
    pair: tuple[Checkpoint, Checkpoint],
    limits: CalibrationRecipe,
    calibration: Path | None,
    held_out: Path | None,
) -> tuple[list[Sample], list[Sample]]:
    """Calibration and held-out samples, from files or from what deltamux brings along.

    Args:
        pair: Base and expert.
        limits: How many samples, and how long.
        calibration: JSONL to calibrate on; None for the built-in conversations.
        held_out: JSONL to verify on; None for rows set aside from the calibration's.

    Raises:
        ValueError: Text is given, but neither checkpoint has a tokenizer to read it with.
    """
    rows = read_rows(calibration) if calibration else builtin_rows()
    checked = read_rows(held_out) if held_out else []
    if not held_out:
        split = min(HELD_OUT_ROWS, len(rows) // HELD_OUT_SHARE)
        rows, checked = rows[split:], rows[:split]
    reading = announced_reading(*pair)
    if reading is None:
        if calibration or held_out:
            raise ValueError(
                f"neither {pair[1].source!r} nor {pair[0].source!r} has a tokenizer to read "
                "the given text with: save one beside the weights"
            )
        typer.echo(
            "warning: no tokenizer beside the weights; calibrating on random tokens", err=True
        )
        vocabulary = pair[1].shape(EMBEDDING)[0]
        length = min(limits.max_tokens, RANDOM_TOKENS)
        samples = random_samples(vocabulary, len(rows) + len(checked), length)
        return samples[len(checked) :], samples[: len(checked)]
    text = reading.samples(rows[: limits.samples], limits.max_tokens)
    chosen = checked[: limits.samples]
    return text, reading.samples(chosen, limits.max_tokens) if chosen else []


def announced_reading(base: Checkpoint, expert: Checkpoint) -> Reading | None:
    """How the server will read text; says where the expert itself would read it differently."""
    for line in reading_differences(base, expert):
        typer.echo(f"warning: {line}", err=True)
    return served_reading(base, expert)
