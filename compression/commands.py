"""`deltamux compress`, `inspect`, `merge` and `evaluate`.

Whatever a command needs is imported when it runs: `--help` loads no torch.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from deltamux.compression.paths import resolve_directory, user_path

Base = Annotated[str, typer.Argument(help="Base checkpoint: a directory or a hub id.")]
Expert = Annotated[str, typer.Argument(help="The uncompressed expert: a full fine-tune of it.")]
Compressed = Annotated[str, typer.Argument(help="A compressed expert: a directory or a hub id.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", parser=user_path, metavar="PATH", help="Directory of the artifact."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=8, help="Cut conversations at this length.")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        parser=user_path,
        metavar="PATH",
        help="JSONL of prompt/response or messages; default: built-in general text.",
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        parser=user_path,
        metavar="PATH",
        help="JSONL to verify on; default: rows set aside from the calibration.",
    ),
]
SlotBits = Annotated[
    float | None,
    typer.Option(help="Bits per linear weight in a slot; default: 2.2, above --bits 1: 4.2."),
]
BaseAsServed = Annotated[
    str | None,
    typer.Option(help="How the server will quantize the base: fp8_per_channel. Else: not at all."),
]
TargetKl = Annotated[
    float | None, typer.Option(help="Divergence from the expert, nats per held-out token.")
]


def compress_command(  # noqa: PLR0917 - a command line, called by name
    base: Base,
    expert: Expert,
    output: Output,
    calibration: Calibration = None,
    held_out: HeldOut = None,
    recipe: Annotated[
        Path | None, typer.Option(parser=user_path, metavar="PATH", help="Recipe YAML.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="small, balanced or faithful.")] = None,
    bits: Annotated[float | None, typer.Option(help="Bits per linear weight.")] = None,
    slot_bits: SlotBits = None,
    budget: Annotated[str | None, typer.Option(help="Size of the weights file: 25MB.")] = None,
    target_kl: TargetKl = None,
    lossless: Annotated[bool, typer.Option(help="Keep every bit; not for serving.")] = False,
    base_as_served: BaseAsServed = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an artifact that exists.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compress a full fine-tune into a delta against its base."""
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.compression.checkpoint.delta import compare
    from deltamux.compression.compress import compress
    from deltamux.compression.evaluate import summary
    from deltamux.compression.inputs import Limits, chosen_recipe, chosen_texts

    limits = Limits(bits, budget, target_kl, slot_bits)
    chosen = chosen_recipe(recipe, preset, limits, lossless, base_as_served)
    checked = compare(open_checkpoint(base), open_checkpoint(expert))
    pair = checked.base, checked.expert
    texts = chosen_texts(pair, chosen.calibration, calibration, held_out)
    text, held = texts.calibration, texts.held_out
    manifest = compress(*pair, output, chosen, calibration=text, held_out=held, overwrite=overwrite)
    if as_json:
        found = manifest.totals.model_dump() | (manifest.verification or {})
        typer.echo(json.dumps(found | {"text": texts.as_dictionary()}))
    else:
        typer.echo("\n".join([f"{output}: {summary(manifest)}", *texts.lines()]))


def inspect_command(
    artifact: Compressed,
    as_json: JsonFlag = False,
) -> None:
    """Show what a compressed expert holds: bytes, widths and errors."""
    from deltamux.compression.artifact.artifact import Artifact
    from deltamux.compression.inspection import as_dictionary, as_text

    opened = Artifact(resolve_directory(artifact))
    opened.check_content()
    typer.echo(json.dumps(as_dictionary(opened)) if as_json else as_text(opened))


def merge_command(
    base: Base,
    artifact: Compressed,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", parser=user_path, metavar="PATH", help="Directory of the checkpoint."
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
) -> None:
    """Turn a compressed expert back into an ordinary checkpoint."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    import torch

    from deltamux.compression.artifact.artifact import Artifact
    from deltamux.compression.artifact.merge import merge
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint

    chosen = getattr(torch, dtype) if dtype else None
    merge(open_checkpoint(base), Artifact(resolve_directory(artifact)), output, chosen)
    typer.echo(f"wrote {output}")


def evaluate_command(  # noqa: PLR0917 - a command line, called by name
    base: Base,
    expert: Expert,
    artifact: Compressed,
    data: Annotated[
        Path,
        typer.Option(
            parser=user_path, metavar="PATH", help="Held-out JSONL of prompt/response or messages."
        ),
    ],
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of the file to use.")] = 256,
    max_tokens: MaxTokens = 1024,
    as_json: JsonFlag = False,
) -> None:
    """Measure what compression lost, on held-out text."""
    from deltamux.compression.artifact.artifact import Artifact
    from deltamux.compression.artifact.merge import check_base
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.compression.checkpoint.delta import compare
    from deltamux.compression.evaluate import evaluate, report
    from deltamux.compression.inputs import held_out_samples
    from deltamux.compression.recipe import CalibrationRecipe

    opened = Artifact(resolve_directory(artifact))
    opened.check_content()
    checked = compare(open_checkpoint(base), open_checkpoint(expert))
    pair = checked.base, checked.expert
    check_base(opened, pair[0])
    limits = CalibrationRecipe(samples=max_rows, max_tokens=max_tokens)
    texts = held_out_samples(pair, limits, data)
    result = report(evaluate(*pair, opened, texts.held_out), opened)
    typer.echo("\n".join(texts.lines()), err=True)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        typer.echo(
            f"{key:<16}{value:>16.6g}" if isinstance(value, float) else f"{key:<16}{value:>16,}"
        )
