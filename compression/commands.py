"""`deltamux compress`, `inspect`, `merge` and `evaluate`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from deltamux.compression.artifact.artifact import Artifact, TensorEntry
from deltamux.compression.artifact.merge import check_base, merge
from deltamux.compression.checkpoint.architecture import EMBEDDING
from deltamux.compression.checkpoint.checkpoint import Checkpoint, open_checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.compress import compress
from deltamux.compression.evaluate import evaluate, report, summary
from deltamux.compression.recipe import PRESETS, CalibrationRecipe, Recipe, load_recipe
from deltamux.compression.streaming.text import (
    Sample,
    builtin_rows,
    encode_rows,
    find_tokenizer,
    random_samples,
    read_rows,
)

# Rows set aside for verification where no held-out file is given.
HELD_OUT_SHARE = 8
HELD_OUT_ROWS = 32
# Length of a random sample, where there is no tokenizer to read text with.
RANDOM_TOKENS = 128

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def compress_command(  # noqa: PLR0917 - a command line, called by name
    base: Annotated[str, typer.Argument(help="Base checkpoint: a directory or a hub id.")],
    expert: Annotated[str, typer.Argument(help="Its full fine-tune.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the artifact.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompt/response or messages; default: built-in general text."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="JSONL to verify on; default: rows set aside from the calibration."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe YAML.")] = None,
    preset: Annotated[str | None, typer.Option(help="small, balanced or faithful.")] = None,
    bits: Annotated[float | None, typer.Option(help="Bits per linear weight.")] = None,
    budget: Annotated[str | None, typer.Option(help="Size of the weights file: 25MB.")] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Divergence from the expert, nats per held-out token.")
    ] = None,
    lossless: Annotated[bool, typer.Option(help="Keep every bit; not for serving.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an artifact that exists.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compress a full fine-tune into a delta against its base."""
    chosen = _recipe(recipe, preset, Limits(bits, budget, target_kl), lossless)
    pair = open_checkpoint(base), open_checkpoint(expert)
    compare(*pair)
    text, held = _texts(pair, chosen.calibration, calibration, held_out)
    manifest = compress(*pair, output, chosen, calibration=text, held_out=held, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(manifest.totals.model_dump() | (manifest.verification or {})))
    else:
        typer.echo(f"{output}: {summary(manifest)}")


@dataclass(frozen=True)
class Limits:
    """What the command line says on size or quality; at most one of them."""

    bits: float | None
    budget: str | None
    target_kl: float | None


def _recipe(path: Path | None, preset: str | None, limits: Limits, lossless: bool) -> Recipe:
    """The recipe of a file or preset, with what the other options change in it."""
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
        changed["allocation"] |= given
    if lossless:
        changed["lossless"] = True
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise ValueError("; ".join(detail["msg"] for detail in error.errors())) from error


def _num_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise ValueError(f"budget must be a size like 25MB or 24MiB, got {text!r}") from error


def _texts(
    pair: tuple[Checkpoint, Checkpoint],
    limits: CalibrationRecipe,
    calibration: Path | None,
    held_out: Path | None,
) -> tuple[list[Sample], list[Sample]]:
    """Calibration and held-out samples, from files or from what deltamux brings along."""
    rows = read_rows(calibration) if calibration else builtin_rows()
    checked = read_rows(held_out) if held_out else []
    if not held_out:
        split = min(HELD_OUT_ROWS, len(rows) // HELD_OUT_SHARE)
        rows, checked = rows[split:], rows[:split]
    tokenizer = find_tokenizer(pair[1].root, pair[0].root)
    if tokenizer is None:
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
    text = encode_rows(rows[: limits.samples], tokenizer, limits.max_tokens)
    chosen = checked[: limits.samples]
    return text, encode_rows(chosen, tokenizer, limits.max_tokens) if chosen else []


def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="A compressed expert.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what a compressed expert holds: bytes, widths and errors."""
    opened = Artifact(artifact)
    manifest = opened.manifest
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "expert": manifest.expert,
                    "base": manifest.base.source,
                    "format_version": manifest.format_version,
                    "bytes": opened.total_bytes(),
                    "totals": manifest.totals.model_dump(),
                    "verification": manifest.verification,
                    "tensors": len(manifest.tensors),
                }
            )
        )
        return
    typer.echo(f"expert  {manifest.expert}\nbase    {manifest.base.source}")
    typer.echo(f"{summary(manifest)}\n")
    typer.echo(f"{'weight':<26}{'scheme':<9}{'tensors':>8}{'MB':>9}{'error':>9}  16-bit channels")
    for kind, scheme, count, size, error, salient in _by_kind(opened):
        typer.echo(f"{kind:<26}{scheme:<9}{count:>8}{size / 1e6:>9.3f}{error:>9.4f}  {salient}")


def _by_kind(opened: Artifact) -> list[tuple[str, str, int, int, float, int]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for entry in opened.manifest.tensors:
        module, kind = entry.name.rsplit(".", 2)[-2:]
        label = module if kind == "weight" else f"{module}.{kind}"
        groups.setdefault((label, _label(entry)), []).append(entry)
    return [
        (
            kind,
            scheme,
            len(entries),
            sum(entry.bytes for entry in entries),
            sum(entry.error for entry in entries) / len(entries),
            max(entry.classes.salient if entry.classes else 0 for entry in entries),
        )
        for (kind, scheme), entries in groups.items()
    ]


def _label(entry: TensorEntry) -> str:
    if entry.rank is not None:
        return "factors"
    return entry.scheme or ("lossless" if entry.exact else "exact")


def merge_command(
    base: Annotated[str, typer.Argument(help="The base the expert was compressed against.")],
    artifact: Annotated[Path, typer.Argument(help="A compressed expert.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the checkpoint.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
) -> None:
    """Turn a compressed expert back into an ordinary checkpoint."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    chosen = getattr(torch, dtype) if dtype else None
    merge(open_checkpoint(base), Artifact(artifact), output, chosen)
    typer.echo(f"wrote {output}")


def evaluate_command(  # noqa: PLR0917 - a command line, called by name
    base: Annotated[str, typer.Argument(help="Base checkpoint.")],
    expert: Annotated[str, typer.Argument(help="The uncompressed expert.")],
    artifact: Annotated[Path, typer.Argument(help="Its compressed form.")],
    data: Annotated[Path, typer.Option(help="Held-out JSONL of prompt/response or messages.")],
    max_rows: Annotated[int, typer.Option(help="Rows of the file to use.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Cut conversations at this length.")] = 1024,
    as_json: JsonFlag = False,
) -> None:
    """Measure what compression lost, on held-out text."""
    opened = Artifact(artifact)
    pair: tuple[Checkpoint, Checkpoint] = open_checkpoint(base), open_checkpoint(expert)
    compare(*pair)
    check_base(opened, pair[0])
    tokenizer = find_tokenizer(pair[1].root, pair[0].root)
    if tokenizer is None:
        raise ValueError(f"neither {expert!r} nor {base!r} has a tokenizer: save one beside it")
    samples = encode_rows(read_rows(data)[:max_rows], tokenizer, max_tokens)
    result = report(evaluate(*pair, opened, samples), opened)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        typer.echo(
            f"{key:<16}{value:>16.6g}" if isinstance(value, float) else f"{key:<16}{value:>16,}"
        )
