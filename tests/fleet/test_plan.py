"""The planner: its simulation beside a plain one, its size, and its command."""

import json
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from deltamux.serve.cli import app
from deltamux.serve.fleet.placement import most_requests, order
from deltamux.serve.fleet.plan import PlanSettings, best, load_plan, simulate
from deltamux.serve.fleet.simulation import Load, by_affinity, by_turns, draw, swaps, zipf

EXPERTS = [f"expert-{number}" for number in range(60)]
REPLICAS = ["a", "b", "c"]


def plainly(trace: list[int], chosen: list[int], slots: list[int]) -> list[bool]:
    """Least recently used, one request after the other."""
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in slots]
    missed = []
    for expert, place in zip(trace, chosen, strict=True):
        missed.append(expert not in held[place])
        held[place][expert] = None
        held[place].move_to_end(expert)
        if len(held[place]) > slots[place]:
            held[place].popitem(last=False)
    return missed


def test_swaps_are_those_of_a_plain_simulation() -> None:
    trace, slots = draw(zipf(60, 1.0), 3000), [2, 5, 9]
    for chosen in (by_turns(3000, 3), by_affinity(trace, order(EXPERTS, REPLICAS), Load())):
        found = swaps(trace, chosen, np.array(slots))
        assert found.tolist() == plainly(trace.tolist(), chosen.tolist(), slots)


def test_requests_are_placed_as_one_after_the_other() -> None:
    trace, preferred, load = draw(zipf(60, 1.2), 1000), order(EXPERTS, REPLICAS), Load(4, 1.25, 2)
    chosen, wave = by_affinity(trace, preferred, load), 4 * len(REPLICAS)
    most = most_requests(wave, len(REPLICAS), load.bound, load.room)
    for start in range(0, len(trace), wave):
        counts = np.bincount(chosen[start : start + wave], minlength=len(REPLICAS))
        assert counts.max() <= most
    # Who was not placed at home found it full.
    for start in range(0, len(trace), wave):
        for place in range(start, min(start + wave, len(trace))):
            home = preferred[trace[place], 0]
            if chosen[place] != home:
                assert (chosen[start : start + wave] == home).sum() == most


def test_affinity_swaps_less_than_round_robin_and_slots_help() -> None:
    settings = PlanSettings(experts=400, replicas=(4,), slots=(8, 32))
    few, many = [simulate(settings, cards) for cards in settings.fleets()]
    assert few.affinity < 0.8 * few.round_robin
    assert many.affinity < few.affinity
    assert few.busiest <= settings.bound + 0.1
    assert best([few, many], many.affinity) is many
    assert best([few, many], 0.0) is None


def test_the_largest_plan_takes_seconds() -> None:
    settings = PlanSettings(experts=10_000, replicas=(1_000,), slots=(8,))
    start = time.monotonic()
    outcome = simulate(settings, settings.fleets()[0])
    assert time.monotonic() - start < 60
    assert outcome.affinity < 0.2 < outcome.round_robin
    assert len(outcome.homes) == 10_000
    # The most asked expert has a tenth of all requests: more than one replica can answer.
    assert len(outcome.homes[0]) > 80


def test_traffic_bytes_and_cards_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    experts = [
        {"name": "math", "bytes": "300MB", "requests": 90},
        {"name": "sql", "bytes": "200MB", "requests": 10},
        {"name": "idle", "bytes": "1GB", "requests": 0},
    ]
    cards = [{"name": "old", "slots": 1}, {"name": "new", "slots": 2}]
    path.write_text(yaml.safe_dump({"experts": experts, "cards": cards}))
    shown = CliRunner().invoke(app, ["plan", str(path), "--json", "--swaps", "0.5"])
    assert shown.exit_code == 0, shown.output
    (fleet,) = json.loads(shown.stdout)["fleets"]
    assert fleet["cards"] == cards
    assert set(fleet["homes"]) == {"math", "sql", "idle"}
    assert sum(fleet["held"]) >= 1_500_000_000
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert "math  90.0%" in shown.stdout
    assert "host memory" in shown.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"experts": 20_000}, "10000"),
        ({"experts": [{"name": "a", "requests": 1}, {"name": "b"}]}, "of every expert"),
        ({"experts": [{"name": "a"}, {"name": "a"}]}, "'a' is given twice"),
        ({"experts": []}, "no expert"),
        ({"slot": 3}, "slot"),
    ],
)
def test_a_wrong_plan_is_refused_in_a_line(
    tmp_path: Path, content: dict[str, object], said: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=said):
        load_plan(path)


def test_numbers_are_numbers() -> None:
    shown = CliRunner().invoke(app, ["plan", "--replicas", "many"])
    assert isinstance(shown.exception, ValueError)
    assert "2,4,8" in str(shown.exception)
