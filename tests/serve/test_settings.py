"""`deltamux.yaml` and what overrides it."""

from pathlib import Path

import pytest
import yaml

from deltamux.serve.durations import seconds_of
from deltamux.serve.names import check_expert_name
from deltamux.serve.settings import PluginSettings, load_settings, plugin_settings

FULL = {
    "version": 1,
    "base": {"model": "org/base", "revision": "main"},
    "experts": [{"name": "math", "path": "experts/math"}, {"name": "sql", "path": "/abs/sql"}],
    "router": {"path": "router", "fallback": "math"},
    "slots": 3,
    "host_cache": "8GiB",
    "engine": {"max_model_len": 4096},
}


def write(folder: Path, content: object) -> Path:
    path = folder / "deltamux.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), ("1.5kib", 1536), (77, 77), ("10", 10)],
)
def test_sizes_have_units(text: object, expected: int) -> None:
    assert PluginSettings(host_cache=text).host_cache == expected
    assert PluginSettings(slot={"bytes": text}).slot.bytes == expected


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "GiB", -1, None])
def test_a_size_that_is_none_is_refused_by_name(tmp_path: Path, text: object) -> None:
    with pytest.raises(ValueError, match=r"host_cache: could not (parse|interpret)") as caught:
        load_settings(write(tmp_path, FULL | {"host_cache": text}), {})
    assert "\n" not in str(caught.value)


def test_a_slot_is_as_large_as_the_largest_expert_unless_its_size_is_given() -> None:
    assert PluginSettings().slot.bytes == "auto"
    with pytest.raises(ValueError, match="rank"):
        PluginSettings(slot={"rank": -1})


def test_a_full_configuration_is_read_with_paths_relative_to_its_folder(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, FULL), {})
    assert settings.slots == 3
    assert settings.host_cache == 8 * 2**30
    assert [expert.path for expert in settings.experts] == [
        tmp_path / "experts/math",
        Path("/abs/sql"),
    ]
    assert settings.router is not None
    assert settings.router.path == tmp_path / "router"
    assert settings.base.model == "org/base"
    assert settings.engine == {"max_model_len": 4096}


def test_the_router_of_a_configuration_may_have_a_shadow(tmp_path: Path) -> None:
    router = {"path": "now", "shadow": "next", "features": "encoder", "resident_margin": 0.2}
    found = load_settings(write(tmp_path, FULL | {"router": router}), {}).router
    assert found is not None
    assert (found.path, found.shadow) == (tmp_path / "now", tmp_path / "next")
    assert (found.features, found.resident_margin) == ("encoder", 0.2)
    with pytest.raises(ValueError, match="features"):
        load_settings(write(tmp_path, FULL | {"router": router | {"features": "deep"}}), {})


def test_a_base_that_is_a_folder_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    settings = load_settings(write(tmp_path, {"base": {"model": "base"}}), {})
    assert settings.base.model == str(tmp_path / "base")


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environment = {
        "DELTAMUX_SLOTS": "7",
        "DELTAMUX_HOST_CACHE": "1MB",
        "DELTAMUX_BASE": "org/other",
        "DELTAMUX_ROUTER": "elsewhere",
    }
    settings = load_settings(write(tmp_path, FULL), environment)
    assert (settings.slots, settings.host_cache) == (7, 1_000_000)
    assert settings.base.model == "org/other"
    assert settings.router is not None
    assert settings.router.path == Path("elsewhere").absolute()
    assert settings.router.fallback == "math"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slotz": 2}, "slotz"),
        ({"slots": 0}, "slots"),
        ({"version": 2}, "version"),
        ({"host_cache": "much"}, "host_cache: could not parse"),
        ({"experts": [{"name": "auto", "path": "x"}]}, "'auto'"),
        ({"experts": [{"name": "a/b", "path": "x"}]}, "name"),
        ({"experts": [{"name": "m", "path": "x"}, {"name": "m", "path": "y"}]}, "given twice"),
        ({"router": {"path": "r", "fallback": "nobody"}}, "nobody"),
        ({"base": {}}, "model"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match="is not a deltamux configuration") as caught:
        load_settings(write(tmp_path, FULL | change), {})
    assert said in str(caught.value)


def test_what_is_not_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deltamux.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_settings(path, {})
    path.write_text("just words")
    with pytest.raises(ValueError, match="must hold a mapping, got str"):
        load_settings(path, {})


def test_settings_survive_the_way_through_vllm(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, FULL), {})
    plugin = settings.plugin()
    assert isinstance(plugin, PluginSettings)
    assert plugin_settings({"deltamux": plugin.model_dump(mode="json")}) == plugin


@pytest.mark.parametrize("content", [None, {}, {"other": 1}])
def test_the_plugin_refuses_to_run_without_its_settings(content: object) -> None:
    with pytest.raises(ValueError, match="--additional-config"):
        plugin_settings(content)


def test_the_plugin_refuses_unknown_settings() -> None:
    with pytest.raises(ValueError, match="slotz"):
        plugin_settings({"deltamux": {"version": 1, "slotz": 1}})


@pytest.mark.parametrize(
    "name",
    ['a"} 1\nb{c="', "a\n", "a b", "-a", "a/b", "ä", "", "a" * 65, "auto", "base", "unknown"],
)
def test_a_name_that_is_no_plain_word_is_refused_everywhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"an expert"):
        check_expert_name(name)
    experts = [{"name": name, "path": "math"}]
    path = write(tmp_path, {"base": {"model": "base"}, "experts": experts})
    with pytest.raises(ValueError, match=r"is not a deltamux configuration"):
        load_settings(path, {})


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("false", False), ("", False)])
def test_the_request_log_is_switched_by_the_environment(
    tmp_path: Path, value: str, expected: bool
) -> None:
    path = tmp_path / "deltamux.yaml"
    path.write_text("base: {model: base}")
    assert load_settings(path, {"DELTAMUX_LOG_REQUESTS": value}).log_requests is expected


@pytest.mark.parametrize(
    ("text", "seconds"), [(30, 30), ("90", 90), ("1.5s", 1.5), ("5m", 300), ("1h30m", 5400)]
)
def test_durations_are_read_as_people_write_them(text: object, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "value", [0, -1, "-5s", "soon", "", "5x", "nan", "inf", float("inf"), True, None, [1], "0s"]
)
@pytest.mark.parametrize("key", ["ttl", "slot_wait"])
def test_a_duration_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, key: str, value: object
) -> None:
    if value is None and key == "ttl":
        return  # no ttl
    content = {"base": {"model": "org/base"}, key: value}
    with pytest.raises(ValueError, match=rf"^[^\n]*{key}[^\n]*$"):
        load_settings(write(tmp_path, content), {})


@pytest.mark.parametrize(
    "change", [{"concurrency": 0}, {"ttl": "-1s"}, {"priority": "high"}, {"concurrency": 1.5}]
)
def test_limits_of_an_expert_that_make_no_sense_are_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    content = {"base": {"model": "b"}, "experts": [{"name": "math", "path": "m"} | change]}
    with pytest.raises(ValueError, match=next(iter(change))):
        load_settings(write(tmp_path, content), {})


def test_hub_ids_stay_and_directories_become_absolute(tmp_path: Path) -> None:
    paths = ["org/name@main", "experts/math", "here/v@1"]
    (tmp_path / "here" / "v@1").mkdir(parents=True)
    content = {
        "base": {"model": "b"},
        "experts": [{"name": f"e{i}", "path": path} for i, path in enumerate(paths)],
        "experts_dir": "drop",
        "state": "state.json",
    }
    settings = load_settings(write(tmp_path, content), {})
    assert [str(each.path) for each in settings.experts] == [
        "org/name@main",
        f"{tmp_path}/experts/math",
        f"{tmp_path}/here/v@1",
    ]
    assert (settings.experts_dir, settings.state) == (tmp_path / "drop", tmp_path / "state.json")
