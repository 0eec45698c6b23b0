"""`fleet.yaml`, what replicas are configured with, and when there should be more of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deltamux.serve.fleet.replica import Load, replica_settings
from deltamux.serve.fleet.scaling import Limits, wanted
from deltamux.serve.fleet.settings import FleetSettings, load_fleet
from deltamux.serve.settings import load_settings


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump({"server": "deltamux.yaml", "state": "s.json"}))
    settings = load_fleet(path)
    assert (settings.server, settings.state) == (tmp_path / "deltamux.yaml", tmp_path / "s.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "server"),
        ({"server": "a", "replicas": 0}, "replicas"),
        ({"server": "a", "replicas": 3, "most_replicas": 2}, "fewer than replicas"),
        ({"server": "a", "bound": 0.5}, "bound"),
        ({"server": "a", "slots": 2}, "slots"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=said):
        load_fleet(path)


def test_replicas_write_no_file_of_the_others(tmp_path: Path) -> None:
    content = {
        "base": {"model": "org/base"},
        "experts": [{"name": "math", "path": "math"}],
        "router": {"path": "router", "log": "log.jsonl"},
        "state": "state.json",
        "slots": 3,
    }
    path = tmp_path / "deltamux.yaml"
    path.write_text(yaml.safe_dump(content))
    made = replica_settings(load_settings(path, {}))
    assert "state" not in made
    assert "log" not in made["router"]
    assert made["experts"][0]["path"] == str(tmp_path / "math")
    path.write_text(yaml.safe_dump(made))
    assert load_settings(path, {}).slots == 3


def test_waiting_requests_or_swaps_ask_for_another_replica() -> None:
    limits = Limits(queue=4, swaps=0.5)
    assert wanted(2, [5, 5], [0, 0], limits) == 3
    assert wanted(2, [0, 0], [0.9, 0.3], limits) == 3
    assert wanted(2, [2, 2], [0.1, 0.1], limits) == 2
    assert wanted(2, [0, 0], [0, 0], limits) == 1


def test_load_is_what_came_since_the_last_look() -> None:
    page = (
        'deltamux_requests_in_flight{{expert="a",state="waiting"}} 3\n'
        'deltamux_requests_in_flight{{expert="a",state="running"}} 9\n'
        "# TYPE deltamux_swaps counter\n"
        'deltamux_swaps_total{{expert="a",tier="slot"}} {0}\n'
        'deltamux_swaps_total{{expert="a",tier="host"}} 70\n'
        "# TYPE deltamux_requests counter\n"
        'deltamux_requests_total{{expert="a",reason="explicit"}} {1}\n'
    )
    load = Load()
    assert load.seen(page.format(5, 10)) == (3, 0.5)
    assert load.seen(page.format(6, 20)) == (3, 0.1)
    assert load.seen(page.format(6, 20)) == (3, 0.0)


# Ray's own modules warn when they are imported.
@pytest.mark.filterwarnings("ignore")
def test_rays_policy_decides_by_what_replicas_report() -> None:
    pytest.importorskip("ray")
    from types import SimpleNamespace

    from deltamux.serve.fleet.ray_app import _how_many
    from deltamux.serve.fleet.scaling import QUEUE, SWAPS

    settings = FleetSettings(server=Path("a"), replicas=2, most_replicas=5, queue=2, up_after=7)
    scaling = _how_many(settings)["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (2, 5, 7)
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    busy = {QUEUE: {"a": 5.0, "b": 1.0}, SWAPS: {"a": 0.0, "b": 0.0}}
    context = SimpleNamespace(target_num_replicas=2, aggregated_metrics=busy)
    assert policy(context) == (3, {})
    assert _how_many(FleetSettings(server=Path("a"), replicas=3)) == {"num_replicas": 3}
