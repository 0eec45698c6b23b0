"""The demo on fine-tunes that exist already."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamux.serve.cli import app
from deltamux.serve.demo.public import expert_names, write_config
from deltamux.serve.demo.server import MOST_WORDS, last_words
from deltamux.serve.settings import load_settings


def test_experts_are_called_like_the_end_of_their_path() -> None:
    sources = ["org/Math-7B", "/models/sql", "other/poems v2"]
    assert expert_names(sources) == {
        "Math-7B": "org/Math-7B",
        "sql": "/models/sql",
        "poems-v2": "other/poems v2",
    }


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "needs --experts"),
        (["a/math", "b/math"], "'b/math' and 'a/math' would both be called 'math'"),
        (["org/auto"], "cannot be called 'auto'"),
    ],
)
def test_names_that_cannot_be_are_refused(sources: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expert_names(sources)


def test_experts_may_follow_one_another_on_the_command_line() -> None:
    done = CliRunner().invoke(app, ["demo", "--experts", "a", "b"])
    assert str(done.exception) == "--experts needs --base, got a, b"


def test_the_configuration_is_one_that_serves(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    settings = load_settings(write_config(tmp_path, str(base), ["math", "sql"], slots=2), {})
    assert settings.base.model == str(base)
    assert [expert.path for expert in settings.experts] == [
        tmp_path / "compressed" / name for name in ("math", "sql")
    ]
    assert settings.engine["max_model_len"] == 512


def test_a_server_that_ends_is_quoted_with_its_last_error(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(
        "OldError: no\nready\nValidationError: 1 error\n  max_model_len\n    too long\n\n"
    )
    assert (
        last_words(log)
        == f"ValidationError: 1 error max_model_len too long (all of it is in {str(log)!r})"
    )
    log.write_text("killed\n")
    assert last_words(log).startswith("killed (")
    log.write_text("Error: " + "x" * 2 * MOST_WORDS)
    assert len(last_words(log)) < MOST_WORDS + 200
