"""Paths and hub ids as users write them."""

import pytest
from typer.testing import CliRunner

from deltamux.compression.paths import resolve_directory, user_path
from deltamux.serve.cli import app


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and a working folder that is another one."""
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_path_begins_at_home_where_it_says_so(home):
    assert user_path("~/x") == home / "x"
    assert str(user_path("x/~y")) == "x/~y"
    assert resolve_directory("~/models") == home / "models"


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", "one", "a/b/c", "~/none", "a b/c", "org/"]
)
def test_a_folder_that_is_not_there_is_said_first(home, source):
    with pytest.raises(ValueError, match="neither a directory nor a hub id") as caught:
        resolve_directory(source)
    assert str(caught.value).startswith(f"no folder {source!r} is there")


@pytest.mark.parametrize("source", ["models/base", "org/name", "org/name-1.5_b"])
def test_of_what_may_be_a_hub_id_the_missing_folder_is_said_first_too(home, monkeypatch, source):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="as a hub id it could not be fetched") as caught:
        resolve_directory(source, cache=home)
    assert str(caught.value).startswith(f"no folder {source!r} is there, and")
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(home):
    (home / "models" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file: name the folder that it is in"):
        resolve_directory(str(home / "models" / "model.safetensors"))


def test_a_link_to_nothing_is_told(home):
    (home / "link").symlink_to(home / "gone")
    with pytest.raises(ValueError, match=r"is a link to '.*gone', which is not there"):
        resolve_directory(str(home / "link"))


def test_a_repository_in_the_cache_is_found_there(home):
    commit = "0" * 40
    repository = home / "hub" / "models--org--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        found = resolve_directory("org/name", cache=home / "hub")
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
    assert found == repository / "snapshots" / commit


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["merge", "nowhere", "nowhere", "-o", "x"],
        ["evaluate", "nowhere", "nowhere", "nowhere", "--data", "x"],
        ["compress", "nowhere", "nowhere", "-o", "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_says_which_folder_is_missing(home, arguments):
    result = CliRunner().invoke(app, arguments)
    assert str(result.exception).startswith("no folder 'nowhere' is there")


def test_an_option_with_an_equals_sign_begins_at_home_too(home, make_pair, text_file):
    (home / "rows.jsonl").write_text(text_file.read_text())
    (home / "recipe.yaml").write_text("linear: {scheme: int2}\nembedding: {scheme: int2}")
    pair = [str(root) for root in make_pair()]
    options = ["--output=~/artifact", "--calibration=~/rows.jsonl", "--recipe=~/recipe.yaml"]
    result = CliRunner().invoke(app, ["compress", *pair, *options, "--held-out=~/rows.jsonl"])
    assert result.exit_code == 0, result.exception
    assert (home / "artifact" / "delta_config.json").is_file()
    data = ["--data=~/rows.jsonl", "--max-rows=2", "--json"]
    result = CliRunner().invoke(app, ["evaluate", *pair, "~/artifact", *data])
    assert result.exit_code == 0, result.exception
    result = CliRunner().invoke(app, ["merge", pair[0], "~/artifact", "--output=~/merged"])
    assert result.exit_code == 0, result.exception
    assert (home / "merged" / "config.json").is_file()
