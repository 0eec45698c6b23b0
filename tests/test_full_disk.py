"""A disk that is full: every writer says so in a line with the path, leaves nothing half done, and goes on when there is room.

The disk is one on which no file may grow beyond a size (RLIMIT_FSIZE), which the system refuses as it refuses to write
to a full one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltamux.serve.cli import app
from deltamux.serve.errors import one_line

# Bytes: less than any file; less than the weights; less than the last of what is written.
ROOM = (64, 4096, 60_000)
Disk = Callable[[int], Any]


def run(arguments: list[Any]) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def commands(
    make_pair: Callable[..., tuple[Path, Path]],
    make_artifact: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> dict[str, list[Any]]:
    """What writes, each into the folder `out`."""
    base, expert = make_pair()
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for domain in ("math", "sql"):
        rows = [{"prompt": f"{domain} number {i} of {domain}"} for i in range(40)]
        (prompts / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    calibration = ["--calibration", text_file]
    return {
        "compress": ["compress", base, expert, "-o", out, *calibration],
        "router": ["router", "fit", prompts, "-o", out, "--tokenizer", base],
        "lossless": ["compress", base, expert, "-o", out, "--lossless", *calibration],
        "merge": ["merge", base, make_artifact(), "-o", out],
    }


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("name", ["compress", "lossless", "merge", "router"])
def test_a_command_says_where_there_is_no_room_and_then_goes_on(
    commands: dict[str, list[Any]], tmp_path: Path, full_disk: Disk, name: str, room: int
) -> None:
    with full_disk(room):
        result = run(commands[name])
    out = tmp_path / "out"
    if result.exit_code == 0:  # there was room enough
        assert room == max(ROOM)
        return
    said = one_line(result.exception) or result.stderr
    assert "file too large" in said.lower()
    assert str(tmp_path) in said or "out" in said
    assert not out.exists()
    again = run(commands[name])
    assert again.exit_code == 0, again.output
    assert out.is_dir()


def test_a_log_of_decisions_that_cannot_be_written_fails_no_request(
    tmp_path: Path, full_disk: Disk
) -> None:
    from deltamux.router.decide.decision import Decision
    from deltamux.serve.api.decision_log import DecisionLog

    log = DecisionLog(tmp_path / "log", "whole")
    decision = Decision("math", "math", 1.0, "router", {})
    with full_disk(16):
        log.decided("one", ["a long prompt " * 10], decision)
    log.decided("two", ["a prompt"], decision)
    lines = (tmp_path / "log").read_text().splitlines()
    assert json.loads(lines[-1])["id"] == "two"


def test_hashes_that_cannot_be_kept_cost_time_alone(
    make_pair: Callable[..., tuple[Path, Path]], tmp_path: Path, full_disk: Disk
) -> None:
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.serve.worker.host_cache import BaseHashes

    base = open_checkpoint(make_pair()[0])
    cache = tmp_path / "cache" / "hashes.json"
    with full_disk(16):
        found = BaseHashes(base, cache).sha256("model.norm.weight")
    assert found == base.sha256("model.norm.weight")
    assert not cache.exists()


def test_a_status_that_cannot_be_published_ends_no_step(
    tmp_path: Path, full_disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltamux.serve.status import STATUS_DIRECTORY_VARIABLE, WorkerStatus, publish, read_status

    monkeypatch.setenv(STATUS_DIRECTORY_VARIABLE, str(tmp_path))
    publish(WorkerStatus(evictions=1).model_dump_json())
    with full_disk(8):
        publish(WorkerStatus(evictions=2).model_dump_json())
    assert read_status().evictions == 1
    publish(WorkerStatus(evictions=3).model_dump_json())
    assert read_status().evictions == 3
