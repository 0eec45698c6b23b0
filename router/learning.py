"""The commands `deltamux router refit` and `deltamux router suggest`: learning from use."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltamux.router.console import JsonFlag, Output, Tokenizer, table, user_errors, user_path
from deltamux.router.decide.config import RouterConfig
from deltamux.router.decide.decision import BASE_NAME
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from deltamux.router.fit.fit import FitReport
    from deltamux.router.fit.options import Options
    from deltamux.router.fit.suggest import Cluster
    from deltamux.router.fit.usage import Changes

Log = Annotated[
    Path,
    typer.Argument(
        parser=user_path, metavar="PATH", help="The server's decision log (router.log)."
    ),
]


def refit(  # noqa: PLR0917 - a command line, called by name
    directory: Annotated[
        Path, typer.Argument(parser=user_path, metavar="DIR", help="The router in use.")
    ],
    log: Log,
    data: Annotated[
        Path,
        typer.Option(
            parser=user_path, metavar="PATH", help="What the router was fitted on, as for fit."
        ),
    ],
    output: Output,
    tokenizer: Tokenizer,
    as_json: JsonFlag = False,
) -> None:
    """Fit a router again with the feedback of a log, beside the old one, and report what changes.

    The server takes it with POST /v1/router/reload {"path": DIR}, and tries it with "shadow".
    """
    from deltamux.router.fit.data import read_dataset
    from deltamux.router.fit.fit import fit_router
    from deltamux.router.fit.usage import compare, labelled, read_log, with_feedback

    with user_errors():
        if output.resolve() == directory.resolve():
            raise ValueError(f"{output} is the router in use; write the new one elsewhere")
        old, usage = Router.load(directory), read_log(log)
        feedback = labelled(usage, old.config)
        if not feedback:
            raise ValueError(
                f"{log} has no feedback on a prompt that it holds ({len(usage.feedback)} feedbacks, "
                f"{usage.hashed} hashed prompts); set router.log_prompts to whole"
            )
        dataset, options = with_feedback(read_dataset(data), feedback), options_of(old.config)
        report = fit_router(dataset, output, options, base=tokenizer, progress=True)
        new, encode = Router.load(output), load_tokenizer(output)
        changes = compare(old, new, encode, usage, feedback)
    _show_changes(changes, report, old.config, output, as_json)


def _show_changes(
    changes: "Changes", report: "FitReport", old: RouterConfig, output: Path, as_json: bool
) -> None:
    """Print what a new router decides otherwise."""
    total, before, after = changes.corrected
    if as_json:
        moved = [{"from": b, "to": a, "prompts": n} for (b, a), n in changes.moved.items()]
        shown = [{"from": b, "to": a, "prompt": text} for b, a, text in changes.shown]
        result = {"output": str(output), "asked": changes.asked, "moved": moved, "shown": shown,
                  "feedback": total, "right_before": before, "right_after": after,
                  "heldout": report.config.heldout.model_dump()}  # fmt: skip
        typer.echo(json.dumps(result))
        return
    typer.echo(f"feedback on {total} prompts: {before} were right, {after} are with the new router")
    count = sum(changes.moved.values())
    typer.echo(f"of {changes.asked} logged prompts {count} go elsewhere")
    rows = [(old_name, new_name, n) for (old_name, new_name), n in changes.moved.items()]
    if rows:
        typer.echo(table(("before", "after", "prompts"), rows))
        for old_name, new_name, text in changes.shown:
            typer.echo(f"  {old_name} -> {new_name}: {' '.join(text.split())[:90]}")
    typer.echo(f"held-out accuracy {old.heldout.accuracy:.4f} before, "
               f"{report.config.heldout.accuracy:.4f} after; wrote {output}")  # fmt: skip


def options_of(config: RouterConfig) -> "Options":
    """Return the options with which a router was fitted."""
    from deltamux.router.fit.options import Options

    experts = {label: expert or BASE_NAME for label, expert in config.experts.items()}
    return Options(
        keep=config.training.keep,
        max_wrong=config.training.max_wrong,
        features=config.features,
        experts={d: e for d, e in experts.items() if d in config.training.prompts},
        minimums=config.minimums,
        seed=config.training.seed,
    )


def suggest(
    log: Annotated[
        Path,
        typer.Argument(
            parser=user_path, metavar="PATH", help="Decision log, or JSONL of prompts or messages."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=user_path,
            metavar="PATH",
            help="Folder to write one file a cluster, as fit reads it.",
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of clusters.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find domains in unlabelled prompts, and show them for naming."""
    from deltamux.router.fit.data import read_unlabelled
    from deltamux.router.fit.suggest import suggest as find

    with user_errors():
        clusters = find(read_unlabelled(log), count)
        if output is not None:
            _write_clusters(clusters, output)
    if as_json:
        shown = [
            {"prompts": len(c.prompts), "words": c.words, "examples": c.examples} for c in clusters
        ]
        typer.echo(json.dumps(shown))
    else:
        _show_clusters(clusters, output)


def _show_clusters(clusters: "list[Cluster]", output: Path | None) -> None:
    for number, cluster in enumerate(clusters, start=1):
        typer.echo(f"cluster-{number}: {len(cluster.prompts)} prompts; {', '.join(cluster.words)}")
        for text in cluster.examples:
            typer.echo(f"    {' '.join(text.split())[:100]}")
    if output is not None:
        typer.echo(f"\nwrote {output}: rename each file to its domain, delete what is none, then\n"
                   f"deltamux router fit {output} -o DIR --tokenizer BASE")  # fmt: skip


def _write_clusters(clusters: "list[Cluster]", folder: Path) -> None:
    """One file a cluster, as `router fit` reads it."""
    folder.mkdir(parents=True)
    for number, cluster in enumerate(clusters, start=1):
        rows = [
            {"messages": [{"role": "user", "content": turn} for turn in turns]}
            for turns in cluster.prompts
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"cluster-{number}.jsonl").write_text(lines, encoding="utf-8")
