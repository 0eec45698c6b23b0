"""Host cache, versioned paths, base hashes, and the status file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.serve import status
from deltamux.serve.names import artifact_path, versioned_path
from deltamux.serve.worker.host_cache import BaseHashes, HostCache


def expert(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_the_least_recently_used_expert_leaves_first() -> None:
    cache = HostCache(100)
    assert cache.put(1, expert(40)) == {}
    assert cache.put(2, expert(40)) == {}
    cache.get(1)
    assert list(cache.put(3, expert(40))) == [2]
    assert (1 in cache, 2 in cache, 3 in cache) == (True, False, True)
    assert cache.num_bytes == 80


def test_pinned_experts_and_the_newest_stay_whatever_the_budget() -> None:
    cache = HostCache(50)
    cache.put(1, expert(40))
    cache.pin(1)
    assert cache.put(2, expert(500)) == {}
    assert 1 in cache
    assert list(cache.put(3, expert(10))) == [2]
    cache.remove(1)
    assert cache.bytes_of(1) == 0
    assert list(cache.put(4, expert(45))) == [3]


@pytest.mark.parametrize("path", ["/experts/math", "/home/a@b/math", "relative/math"])
def test_a_versioned_path_leads_back_to_its_directory(path: str) -> None:
    assert artifact_path(versioned_path(Path(path), "0123abcd")) == Path(path)
    assert artifact_path(path) == Path(path)


def test_base_hashes_are_kept_until_the_weights_change(
    tmp_path: Path, make_pair: Callable[..., tuple[Path, Path]]
) -> None:
    base = open_checkpoint(make_pair()[0])
    cache = tmp_path / "hashes.json"
    name = "model.norm.weight"
    assert BaseHashes(base, cache).sha256(name) == base.sha256(name)
    stored = json.loads(cache.read_text())
    (identity,) = stored
    stored[identity][name] = "kept"
    cache.write_text(json.dumps(stored))
    assert BaseHashes(base, cache).sha256(name) == "kept"
    other = open_checkpoint(make_pair("llama", tied=True)[0])
    assert BaseHashes(other, cache).sha256(name) == other.sha256(name)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, make_pair: Callable[..., tuple[Path, Path]]
) -> None:
    base = open_checkpoint(make_pair()[0])
    (tmp_path / "file").write_text("")
    hashes = BaseHashes(base, tmp_path / "file" / "hashes.json")
    assert hashes.sha256("model.norm.weight") == base.sha256("model.norm.weight")


def test_the_status_is_read_as_it_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(status.STATUS_DIRECTORY_VARIABLE, str(tmp_path))
    assert status.read_status() == status.WorkerStatus()
    sent = status.WorkerStatus(evictions=3, memory_bytes={"base": 7})
    sent.experts[4] = status.ExpertStatus(tier="slot", slot=1)
    sent.swaps["math"] = {"slot": 2}
    sent.swap_seconds["slot"] = status.Histogram()
    for seconds in (0.0005, 0.02, 100.0):
        sent.swap_seconds["slot"].observe(seconds)
    status.publish(sent.model_dump_json())
    assert status.read_status() == sent
    counts = sent.swap_seconds["slot"].counts
    assert (counts[0], counts[3], counts[-1], sum(counts)) == (1, 1, 1, 3)


def test_of_several_ranks_an_expert_is_where_the_last_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(status.STATUS_DIRECTORY_VARIABLE, str(tmp_path))

    def says(rank: int, **experts: status.ExpertStatus) -> None:
        said = status.WorkerStatus(
            ranks=2,
            stalls=rank,
            memory_bytes={"slots": 5 + rank},
            experts={int(name[1:]): each for name, each in experts.items()},
        )
        status.publish(said.model_dump_json(), rank)

    slot, disk = status.ExpertStatus(tier="slot", slot=1, pinned=True), status.ExpertStatus()
    says(0, e1=slot, e2=slot, e3=slot)
    assert status.read_status() == status.WorkerStatus()
    waited = status.ExpertStatus(tier="slot", slot=0, pinned=True, swapped_at=4.0, swap_seconds=2.0)
    refused = status.ExpertStatus(error="it is damaged")
    says(1, e1=waited, e2=refused)
    found = status.read_status()
    assert found.experts[1] == status.ExpertStatus(
        tier="slot", slot=1, pinned=True, swapped_at=4.0, swap_seconds=2.0
    )
    assert found.experts[2] == status.ExpertStatus(error="it is damaged")
    assert found.experts[3] == disk
    assert (found.stalls, found.memory_bytes) == (1, {"slots": 11})


def test_a_full_disk_makes_the_status_stale_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv(status.STATUS_DIRECTORY_VARIABLE, str(tmp_path))
    status.publish(status.WorkerStatus(evictions=1).model_dump_json())
    monkeypatch.setattr(Path, "write_text", full)
    status.publish(status.WorkerStatus(evictions=2).model_dump_json())
    assert status.read_status().evictions == 1


def test_publishing_after_the_folder_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(status.STATUS_DIRECTORY_VARIABLE, str(tmp_path / "gone"))
    status.publish(status.WorkerStatus().model_dump_json())
    assert status.read_status() == status.WorkerStatus()


@pytest.mark.parametrize("content", ["[]", "3", '{"x": []}', '{"x": {"y": 3}}', "\xff", ""])
def test_a_cache_of_hashes_that_holds_something_else_is_written_anew(
    tmp_path: Path, make_pair: Callable[..., tuple[Path, Path]], content: str
) -> None:
    base = open_checkpoint(make_pair()[0])
    cache = tmp_path / "hashes.json"
    cache.write_bytes(content.encode("latin-1"))
    name = next(iter(base.files))
    assert BaseHashes(base, cache).sha256(name) == base.sha256(name)
    assert name in next(iter(json.loads(cache.read_text()).values()))


FOLDERS = """
import multiprocessing, os
from deltamux.serve.status import begin_server, status_directory

def child(folders):
    begin_server()
    folders.put(str(status_directory()))

if __name__ == "__main__":
    begin_server()
    begin_server()
    print(status_directory())
    for way in ("fork", "spawn"):
        context = multiprocessing.get_context(way)
        folders = context.SimpleQueue()
        process = context.Process(target=child, args=(folders,))
        process.start()
        process.join()
        print(folders.get())
"""


def test_two_servers_of_one_program_never_share_a_folder(tmp_path: Path) -> None:
    program = tmp_path / "folders.py"
    program.write_text(FOLDERS)
    environment = os.environ | {status.STATUS_DIRECTORY_VARIABLE: str(tmp_path)}
    made = set()
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, str(program)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        (folder,) = set(run.stdout.split())
        made.add(folder)
        assert not Path(folder).exists()
    assert len(made | {str(tmp_path)}) == 3
    assert tmp_path.exists()
