"""The commands `deltamux router fit`, `deltamux router evaluate` and `deltamux route`."""

import dataclasses
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from deltamux.router.console import JsonFlag, Output, Tokenizer, table, user_errors, user_path
from deltamux.router.decide.artifact import load_seen
from deltamux.router.decide.decision import BASE_NAME, Decision
from deltamux.router.decide.messages import user_turns
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Encode, load_tokenizer
from deltamux.router.fit.data import (
    Dataset,
    check_encoding,
    join,
    parse_json,
    parse_turns,
    read_dataset,
    read_of,
)
from deltamux.router.fit.options import Features
from deltamux.router.learning import refit, suggest
from deltamux.router.report.plots import draw, require_matplotlib

if TYPE_CHECKING:
    from deltamux.router.fit.fit import FitReport
    from deltamux.router.report.evaluate import Evaluation

router_app = typer.Typer(no_args_is_help=True, help="Fit and evaluate the router.")

router_app.command("refit")(refit)
router_app.command("suggest")(suggest)

Labelled = Annotated[
    Path | None,
    typer.Argument(
        parser=user_path, metavar="PATH", help="JSONL file, or folder with one per domain."
    ),
]
# Of options that may be repeated.
Words = list[str] | None


@router_app.command("fit")
def fit(  # noqa: PLR0917 - a command line, called by name
    output: Output,
    tokenizer: Tokenizer,
    data: Labelled = None,
    from_expert: Annotated[
        Words, typer.Option(help="EXPERT=FILE, rows that an expert was trained on; repeatable.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of own prompts an expert must keep.")] = 0.95,
    expert: Annotated[Words, typer.Option(help="DOMAIN=EXPERT; may be repeated.")] = None,
    max_wrong: Annotated[
        float, typer.Option(help="Share of held-out prompts that a wrong expert may answer.")
    ] = 0.02,
    features: Annotated[
        str, typer.Option(help="default, encoder, or auto: the encoder where it is installed.")
    ] = "default",
    describe: Annotated[
        Words, typer.Option(help="DOMAIN=TEXT, one line on a domain; may be repeated.")
    ] = None,
    minimum: Annotated[
        Words, typer.Option(help="DOMAIN=P, what its expert needs; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the cross-validation.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Fit a router on labelled prompts."""
    from deltamux.router.fit.fit import fit_router
    from deltamux.router.fit.options import Options

    start = time.perf_counter()
    with user_errors():
        dataset = _dataset(data, _parse_pairs("from-expert", "FILE", from_expert or []))
        experts = _parse_pairs("expert", "EXPERT", expert or [])
        lines = _parse_pairs("describe", "TEXT", describe or [])
        options = Options(
            keep, max_wrong, cast(Features, features),
            experts=experts, descriptions=lines, minimums=_parse_numbers(minimum or []), seed=seed,
        )  # fmt: skip
        report = fit_router(dataset, output, options, base=tokenizer, progress=True)
    _warn(dataset)
    _show_fit(report, dataset, output, round(time.perf_counter() - start, 1), as_json)


@router_app.command("evaluate")
def evaluate(
    directory: Annotated[Path, typer.Argument(parser=user_path, metavar="DIR", help="The router.")],
    data: Annotated[
        Path,
        typer.Argument(
            parser=user_path, metavar="PATH", help="As for fit; sub-folders: test.jsonl first."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=user_path,
            metavar="PATH",
            help="Directory for figures and evaluation.json.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a router on labelled prompts."""
    from deltamux.router.report.evaluate import evaluate_router

    with user_errors():
        if output is not None:
            require_matplotlib()
        router, encode = Router.load(directory), load_tokenizer(directory)
        dataset = read_dataset(data, splits=("test", "train"))
        seen = load_seen(directory)
        result = evaluate_router(router, encode, dataset, seen=seen, progress=True)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            content = json.dumps(dataclasses.asdict(result), indent=1)
            (output / "evaluation.json").write_text(content + "\n", encoding="utf-8")
            draw(result.curves, output)
    _warn(dataset)
    if result.seen:
        typer.echo(f"{result.seen} of these prompts were trained on", err=True)
    _show_evaluation(result, as_json)


def _show_evaluation(result: "Evaluation", as_json: bool) -> None:
    """Print outcomes by domain, quality and time."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
        return
    rows = [
        (name if counts.known else f"{name} (out of scope)", *dataclasses.astuple(counts)[1:])
        for name, counts in result.domains.items()
    ]
    typer.echo(table(("domain", "prompts", "right", "fallback", "wrong expert"), rows))
    if result.quality is not None:
        typer.echo(
            f"\naccuracy {result.quality.accuracy:.4f}, macro-F1 {result.quality.macro_f1:.4f}, "
            f"ECE {result.quality.ece:.4f} (n={result.quality.n})"
        )
    typer.echo(
        f"decision time: p50 {result.decision_p50_us:.0f} us, p99 {result.decision_p99_us:.0f} us"
    )


def _show_fit(
    report: "FitReport", dataset: Dataset, output: Path, seconds: float, as_json: bool
) -> None:
    """Print what a fit wrote and how it does on prompts that it held out."""
    config, held_out = report.config, report.config.heldout
    if as_json:
        result = {
            "output": str(output),
            "bytes": report.num_bytes,
            "seconds": seconds,
            "features": config.features,
            "log_loss": report.log_loss,
            "threshold": config.threshold,
            "temperature": config.temperature,
            "duplicates_dropped": dataset.num_duplicates,
            "conflicts": len(dataset.conflicts),
            "training": config.training.model_dump(),
            "heldout": held_out.model_dump(),
        }
        typer.echo(json.dumps(result))
        return
    rows = [
        (domain, config.experts[domain] or BASE_NAME, count)
        for domain, count in config.training.prompts.items()
    ]
    typer.echo(table(("domain", "expert", "prompts"), rows))
    typer.echo(
        f"\nheld-out: accuracy {held_out.accuracy:.4f}, macro-F1 {held_out.macro_f1:.4f}, "
        f"ECE {held_out.ece:.4f}, own prompts kept {held_out.kept:.4f} (n={held_out.n}), "
        f"wrong expert with added prompts {held_out.wrong:.4f}\n"
        f"features {config.features}, threshold {config.threshold:.4f}, "
        f"temperature {config.temperature:.3f}; "
        f"wrote {output} ({report.num_bytes / 1e6:.1f} MB) in {seconds} s"
    )


def route(
    text: Annotated[str | None, typer.Argument(help="The prompt to route.")] = None,
    directory: Annotated[
        Path, typer.Option("--router", parser=user_path, metavar="DIR", help="The router.")
    ] = Path("router"),
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Read JSON lines from stdin.")] = False,
) -> None:
    """Print which expert answers a prompt, as JSON.

    With --jsonl every input line is an object with "prompt" or "messages" and gives one line of
    output; a line that cannot be read gives an object with "error", and exit status 1 at the end.
    """
    with user_errors():
        if text is not None and re.match("--[a-z]", text):
            raise ValueError(f"no such option: {text}; a text that begins so goes after --")
        if (text is None) != jsonl:
            raise ValueError("give either a TEXT to route or --jsonl with JSON lines on stdin")
        router, encode = Router.load(directory), load_tokenizer(directory)
    if text is not None:
        typer.echo(_show(router.decide(user_turns(text), encode)))
        return
    with user_errors():
        num_bad = _route_lines(typer.get_binary_stream("stdin"), router, encode)
    if num_bad:
        raise typer.Exit(1)


def _route_lines(lines: Iterable[bytes], router: Router, encode: Encode) -> int:
    """Print one object for each line that is not blank; return how many were bad."""
    num_bad = 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            check_encoding(line, "standard input")
        if not line.strip():
            continue
        try:
            typer.echo(_show(router.decide(parse_turns(parse_json(line)), encode)))
        except ValueError as error:
            num_bad += 1
            typer.echo(json.dumps({"error": f"line {number}: {error}"}))
    return num_bad


def _show(decision: Decision) -> str:
    """One line of JSON that calls the base by its name."""
    return json.dumps({**decision.to_json(), "expert": decision.expert or BASE_NAME})


def _dataset(data: Path | None, experts: dict[str, str]) -> Dataset:
    """Labelled prompts, and those of experts' own files."""
    if data is None and not experts:
        raise ValueError("give labelled prompts, or --from-expert EXPERT=FILE for each expert")
    found = [] if data is None else [read_dataset(data)]
    return join([*found, *(read_of(user_path(file), name) for name, file in experts.items())])


def _parse_pairs(flag: str, value: str, pairs: Sequence[str]) -> dict[str, str]:
    """DOMAIN=... flags as a mapping."""
    found = {}
    for pair in pairs:
        domain, equals, text = pair.partition("=")
        if not (domain and equals and text.strip()):
            raise ValueError(f"--{flag} takes DOMAIN={value}, got {pair!r}")
        found[domain] = text
    return found


def _parse_numbers(pairs: Sequence[str]) -> dict[str, float]:
    """DOMAIN=P flags as a mapping."""
    found = {}
    for domain, text in _parse_pairs("minimum", "P", pairs).items():
        try:
            found[domain] = float(text)
        except ValueError as error:
            raise ValueError(f"--minimum takes DOMAIN=P, got {domain}={text}") from error
    return found


def _warn(dataset: Dataset) -> None:
    """Tell about doubtful rows on stderr."""
    if dataset.num_duplicates:
        typer.echo(f"dropped {dataset.num_duplicates} duplicate prompts", err=True)
    if dataset.conflicts:
        example = dataset.conflicts[0][-1][:80]
        typer.echo(
            f"{len(dataset.conflicts)} prompts are under more than one domain, as {example!r}",
            err=True,
        )
