"""What `deltamux compress` works with, from its flags: a recipe, and text to calibrate and verify on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from deltamux.compression.checkpoint.architecture import EMBEDDING
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.recipe import PRESETS, CalibrationRecipe, Recipe, load_recipe
from deltamux.compression.streaming.reading import TextReport
from deltamux.compression.streaming.rows import Conversation, builtin_rows, drawn, read_rows
from deltamux.compression.streaming.served import (
    Reading,
    assumptions,
    check_tokenizer,
    served_reading,
)
from deltamux.compression.streaming.text import Sample, random_samples
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


def chosen_recipe(
    path: Path | None,
    preset: str | None,
    limits: Limits,
    lossless: bool,
    base_as_served: str | None = None,
) -> Recipe:
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
    if base_as_served:
        changed["base_as_served"] = base_as_served
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


@dataclass(frozen=True)
class Texts:
    """What is calibrated and verified on, and what became of the rows.

    Attributes:
        calibration: Samples to calibrate on.
        held_out: Samples to verify on; none: nothing is verified.
        reports: What became of the rows of each.
        read_with: Which tokenizer and which template.
        assumed: What the files left open, and how it was taken.
    """

    calibration: list[Sample]
    held_out: list[Sample]
    reports: dict[str, TextReport]
    read_with: str
    assumed: list[str]

    def lines(self) -> list[str]:
        """The report for people."""
        found = [line for what, report in self.reports.items() for line in report.lines(what)]
        found.append(f"read with: {self.read_with}")
        return found + [f"assumed: {line}" for line in self.assumed]

    def as_dictionary(self) -> dict[str, Any]:
        """The report for programs."""
        read = {what: report.as_dictionary() for what, report in self.reports.items()}
        return read | {"read_with": self.read_with, "assumed": self.assumed}


_NO_TOKENIZER = (
    "neither {!r} nor {!r} has a tokenizer to read the given text with: save one beside the weights"
)


def chosen_texts(
    pair: tuple[Checkpoint, Checkpoint],
    limits: CalibrationRecipe,
    calibration: Path | None,
    held_out: Path | None,
) -> Texts:
    """Calibration and held-out samples, from files or from what deltamux brings along.

    Args:
        pair: Base and expert.
        limits: How many samples, how long, and the seed.
        calibration: JSONL to calibrate on; None for the built-in conversations.
        held_out: JSONL to verify on; None for rows set aside from the calibration's.

    Raises:
        ValueError: Text is given, but neither checkpoint has a tokenizer to read it with, or the two read differently.
    """
    reading, assumed = announced_reading(*pair)
    rows = read_rows(calibration) if calibration else builtin_rows()
    source = str(calibration) if calibration else "the built-in conversations"
    rest = drawn(rows, len(rows), limits.seed)
    if held_out:
        checked, of_checked = _drawn_from(held_out, limits)
    else:
        split = min(HELD_OUT_ROWS, len(rows) // HELD_OUT_SHARE)
        rest, checked = rest[split:], rest[:split]
        of_checked = TextReport(source, len(rows), len(checked))
    rest = rest[: limits.samples]
    reports = {"calibration": TextReport(source, len(rows), len(rest)), "held out": of_checked}
    if reading is None:
        if calibration or held_out:
            raise ValueError(_NO_TOKENIZER.format(pair[1].source, pair[0].source))
        return _random_texts(pair[1], limits, len(rest), len(checked))
    text = reading.samples(rest, limits.max_tokens, reports["calibration"])
    if not checked:
        del reports["held out"]
        return Texts(text, [], reports, reading.described(), assumed)
    held = reading.samples(checked, limits.max_tokens, of_checked)
    return Texts(text, held, reports, reading.described(), assumed)


def held_out_samples(
    pair: tuple[Checkpoint, Checkpoint], limits: CalibrationRecipe, data: Path
) -> Texts:
    """Samples of a file to measure on, drawn over the whole of it.

    Raises:
        ValueError: Neither checkpoint has a tokenizer, the two read differently, or the file cannot be read.
    """
    reading, assumed = announced_reading(*pair)
    if reading is None:
        raise ValueError(
            f"neither {pair[1].source!r} nor {pair[0].source!r} has a tokenizer: save one beside it"
        )
    chosen, report = _drawn_from(data, limits)
    held = reading.samples(chosen, limits.max_tokens, report)
    return Texts([], held, {"held out": report}, reading.described(), assumed)


def _drawn_from(path: Path, limits: CalibrationRecipe) -> tuple[list[Conversation], TextReport]:
    rows = read_rows(path)
    found = drawn(rows, limits.samples, limits.seed)
    return found, TextReport(str(path), len(rows), len(found))


def _random_texts(expert: Checkpoint, limits: CalibrationRecipe, count: int, checked: int) -> Texts:
    length = min(limits.max_tokens, RANDOM_TOKENS)
    samples = random_samples(expert.shape(EMBEDDING)[0], count + checked, length)
    line = "no tokenizer, as there is none beside the weights: random tokens"
    return Texts(samples[checked:], samples[:checked], {}, line, [])


def announced_reading(base: Checkpoint, expert: Checkpoint) -> tuple[Reading | None, list[str]]:
    """How the server will read text, and what is assumed where the files leave it open.

    Raises:
        ValueError: The expert's tokenizer reads differently than the base's.
    """
    alone = check_tokenizer(base, expert)
    reading = served_reading(base, expert)
    assumed = assumptions(base, expert) + alone
    if reading is not None:
        _check_stop_ids(reading, expert)
    return reading, assumed


def _check_stop_ids(reading: Reading, expert: Checkpoint) -> None:
    vocabulary = expert.shape(EMBEDDING)[0]
    beyond = [each for each in reading.stop_ids if each >= vocabulary]
    if beyond:
        raise ValueError(
            f"{expert.source!r} ends turns with the token {beyond[0]}, its vocabulary has {vocabulary:,}: "
            "correct eos_token_id in its configurations"
        )
