"""`deltamux plan`: the planner on the command line."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltamux.compression.paths import user_path

if TYPE_CHECKING:
    from deltamux.serve.fleet.plan import Outcome, PlanSettings

# Experts and replicas that are listed; --json has all.
MOST_LINES = 20
MOST_REPLICAS_SHOWN = 4


def plan_command(  # noqa: PLR0917 - a command line, called by name
    file: Annotated[
        Path | None,
        typer.Argument(parser=user_path, metavar="PLAN", help="Experts, traffic and cards: YAML."),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="How many experts, without a file.")] = None,
    zipf: Annotated[float | None, typer.Option(help="Exponent of their traffic.")] = None,
    replicas: Annotated[str | None, typer.Option(help="Replicas to try, as 2,4,8.")] = None,
    slots: Annotated[str | None, typer.Option(help="Slots of a replica to try, as 4,8.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Open requests a replica.")] = None,
    bound: Annotated[
        float | None, typer.Option(help="A replica's open requests, to the mean.")
    ] = None,
    swaps: Annotated[float | None, typer.Option(help="Swaps that a request may cost.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead.")] = False,
) -> None:
    """Say which experts go where, how many replicas and slots they need, and what swaps that costs."""
    from deltamux.serve.fleet.plan import WHAT, PlanSettings, best, load_plan, simulate
    from deltamux.serve.fleet.yaml_files import checked

    given: dict[str, Any] = {
        "experts": experts,
        "zipf": zipf,
        "replicas": _numbers("replicas", replicas),
        "slots": _numbers("slots", slots),
        "concurrency": concurrency,
        "bound": bound,
        "swaps": swaps,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    said = load_plan(file).model_dump() if file else {}
    settings = checked(PlanSettings, said | changes, WHAT)
    outcomes = [simulate(settings, cards) for cards in settings.fleets()]
    found = best(outcomes, settings.swaps)
    if as_json:
        _print_json(settings, outcomes, found)
        return
    _show(outcomes, settings.swaps, found)
    _show_places(settings, found or min(outcomes, key=lambda each: each.affinity))


def _numbers(name: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--{name} takes numbers with commas between, as 2,4,8, got {text!r}")
    return [int(word) for word in words]


def _print_json(
    settings: "PlanSettings", outcomes: "list[Outcome]", found: "Outcome | None"
) -> None:
    names = settings.catalogue()[0]
    shown = [
        dataclasses.asdict(each)
        | {
            "cards": [card.model_dump() for card in each.cards],
            "homes": {
                name: [each.cards[place].name for place in places]
                for name, places in zip(names, each.homes, strict=True)
            },
        }
        for each in outcomes
    ]
    chosen = next((place for place, each in enumerate(outcomes) if each is found), None)
    typer.echo(json.dumps({"fleets": shown, "chosen": chosen}))


def _show(outcomes: "list[Outcome]", most_swaps: float, found: "Outcome | None") -> None:
    """The fleets, and which of them is enough."""
    from rich.console import Console
    from rich.table import Table

    columns = ("replicas", "slots", "swaps/request", "round robin", "busiest", "moved/request")
    table = Table(*columns)
    for each in outcomes:
        slots = sorted({card.slots for card in each.cards})
        table.add_row(
            f"{len(each.cards)}{' *' if each is found else ''}",
            str(slots[0]) if len(slots) == 1 else f"{slots[0]}-{slots[-1]}",
            f"{each.affinity:.3f}",
            f"{each.round_robin:.3f}",
            f"{each.busiest:.2f}",
            _size(each.moved),
        )
    Console().print(table)
    if found is None:
        typer.echo(f"none of these costs {most_swaps} swaps a request or less")
    else:
        typer.echo(f"* the smallest that costs {most_swaps} swaps a request or less")


def _show_places(settings: "PlanSettings", outcome: "Outcome") -> None:
    """Where experts go, and what each replica holds."""
    names, shares, _ = settings.catalogue()
    typer.echo("\nexperts, the most asked first:")
    for expert in shares.argsort(kind="stable")[::-1][:MOST_LINES]:
        places = outcome.homes[expert]
        shown = ", ".join(outcome.cards[place].name for place in places[:MOST_REPLICAS_SHOWN])
        more = len(places) - MOST_REPLICAS_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        typer.echo(f"  {names[expert]}  {shares[expert]:.1%}  {shown}{rest}")
    if len(names) > MOST_LINES:
        typer.echo(f"  … {len(names) - MOST_LINES} more (--json has all)")
    if any(outcome.held):
        typer.echo("\nhost memory for the experts that each replica answers for:")
        for card, held in list(zip(outcome.cards, outcome.held, strict=True))[:MOST_LINES]:
            typer.echo(f"  {card.name}  {_size(held)}")


def _size(count: float) -> str:
    if not count:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
