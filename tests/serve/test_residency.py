"""Experts that move in the worker while steps go on, and the process that decodes them."""

import fcntl
import os
import shutil
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamux.compression.image.layout import assemble
from deltamux.serve.status import STATUS_DIRECTORY_VARIABLE, read_status
from deltamux.serve.worker.capacity import Capacity
from deltamux.serve.worker.control import carry_out
from deltamux.serve.worker.decoder import Decoder, Task
from deltamux.serve.worker.host_cache import HostCache
from deltamux.serve.worker.loader import CORES, SPARE_NICENESS, Loader, spare_cores
from deltamux.serve.worker.once import Once
from deltamux.serve.worker.residency import Residency
from deltamux.serve.worker.slots import Slots
from deltamux.serve.worker.table import Wanted

NAMES = ["a", "b"]
CAPACITY = Capacity(2**22, 64, frozenset({"model.norm.weight"}))


class Disk:
    """Reads images when the test lets it."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.bad: set[str] = set()
        self.open = threading.Event()
        self.open.set()

    def read(self, path: str) -> torch.Tensor:
        self.reads.append(path)
        assert self.open.wait(60)
        if path in self.bad:
            raise ValueError(f"{path} is truncated")
        return assemble({}, len(NAMES))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def residency(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Residency:
    monkeypatch.setenv(STATUS_DIRECTORY_VARIABLE, str(tmp_path))
    nothing = assemble({}, len(NAMES))
    slots = Slots(2, nothing.numel(), NAMES, torch.device("cpu"))
    return Residency(slots, HostCache(2**20), disk.read, nothing)


def wanted(number: int) -> Wanted:
    return Wanted(number, f"e{number}@0.{number}", f"/e{number}")


def test_a_step_goes_on_while_another_expert_is_loaded(residency: Residency, disk: Disk) -> None:
    residency.enter(wanted(1))
    residency.need([1, 2], 1)
    disk.open.clear()
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(residency.enter, wanted(2))
        while len(disk.reads) < 2:
            time.sleep(0.001)
        for _ in range(3):
            assert residency.begin([wanted(1)]) == {1: 0}
            residency.end()
        assert not entering.done()
        disk.open.set()
        entering.result(60)
    assert residency.begin([wanted(1), wanted(2)]) == {1: 0, 2: 1}
    residency.end()
    residency.publish()
    status = read_status()
    assert (status.stalls, status.swaps["e2"]) == (0, {"host": 1, "slot": 1})


def test_an_expert_that_many_want_is_loaded_once(residency: Residency, disk: Disk) -> None:
    disk.open.clear()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(residency.load, wanted(1)) for _ in range(4)]
        while not disk.reads:
            time.sleep(0.001)
        disk.open.set()
        for load in loads:
            load.result(60)
    assert disk.reads == ["/e1"]


def test_the_slot_of_an_open_step_is_not_given_away_before_the_step_ends(
    residency: Residency,
) -> None:
    for number in (1, 2):
        residency.enter(wanted(number))
    residency.begin([wanted(1), wanted(2)])
    with ThreadPoolExecutor(1) as pool:
        residency.need([1, 3], 1)
        entering = pool.submit(residency.enter, wanted(3))
        while not residency.host.bytes_of(3):
            time.sleep(0.001)
        assert not entering.done()
        assert set(residency.table.resident) == {1, 2}
        residency.end()
        entering.result(60)
    assert set(residency.table.resident) == {1, 3}


def test_who_waits_for_a_load_spares_whoever_came_to_be_needed_meanwhile(
    residency: Residency, disk: Disk
) -> None:
    for number in (1, 2):
        residency.enter(wanted(number))
    disk.open.clear()
    with ThreadPoolExecutor(1) as pool:
        residency.need([2, 3], 1)
        entering = pool.submit(residency.enter, wanted(3))
        while len(disk.reads) < 3:
            time.sleep(0.001)
        # Expert 2 has nothing to do any more and 1 has: what was said for 3 is out of date when 3 arrives.
        residency.need([1, 3], 3)
        residency.need([2, 3], 2)
        disk.open.set()
        entering.result(60)
    assert set(residency.table.resident) == {1, 3}


def test_a_step_that_needs_an_absent_expert_waits_and_is_counted(residency: Residency) -> None:
    assert residency.begin([wanted(1)]) == {1: 0}
    residency.end()
    assert residency.begin([wanted(1)]) == {1: 0}
    assert read_status().stalls == 1


def test_an_expert_that_leaves_is_on_disk_and_is_read_anew(
    residency: Residency, disk: Disk
) -> None:
    residency.enter(wanted(1))
    residency.leave(1)
    assert read_status().experts[1].tier == "disk"
    residency.enter(wanted(1))
    assert disk.reads == ["/e1", "/e1"]
    assert read_status().experts[1].tier == "slot"


@pytest.mark.parametrize("line", [b"", b"{}", b'{"order": "fly", "expert_id": 1}\n'])
def test_what_is_no_order_is_refused(residency: Residency, line: bytes) -> None:
    with pytest.raises(ValueError, match="not an order"):
        carry_out(residency, lambda _: None, line)


def test_what_fails_fails_for_all_who_wait_and_can_be_tried_again() -> None:
    once, begun, go = Once(), threading.Event(), threading.Event()

    def broken() -> None:
        begun.set()
        assert go.wait(60)
        raise ValueError("no")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(once.run, "key", broken)
        assert begun.wait(60)
        second = pool.submit(once.run, "key", lambda: None)
        while not second.running():
            time.sleep(0.001)
        go.set()
        with pytest.raises(ValueError, match="no"):
            first.result(60)
        second.exception(60)
    once.run("key", lambda: None)


@pytest.fixture(scope="module")
def loader(make_pair: Callable[..., tuple[Path, Path]]) -> Iterator[tuple[Loader, Task]]:
    task = Task(str(make_pair()[0]), None, CAPACITY, 64, image_cache=0)
    loader = Loader(task, pin=False)
    loader.start()
    yield loader, task
    loader.stop()


def test_the_decoders_process_gives_the_image_that_the_decoder_makes(
    loader: tuple[Loader, Task], make_artifact: Callable[..., Path]
) -> None:
    image = loader[0].image(str(make_artifact()))
    assert torch.equal(image, Decoder(loader[1]).image(str(make_artifact())))
    loader[0].check(str(make_artifact()))


def test_a_refused_artifact_is_one_line_and_the_next_one_is_read(
    loader: tuple[Loader, Task], make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(make_artifact(), cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for ask in (loader[0].image, loader[0].check):
        with pytest.raises(ValueError, match=r"^[^\n]*truncated[^\n]*$"):
            ask(str(cut))
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        loader[0].image(str(tmp_path / "gone"))
    assert loader[0].image(str(make_artifact())).numel() > 0


def unread(loader: Any) -> int:
    """Bytes that the decoder has been sent and has not read."""
    return struct.unpack("i", fcntl.ioctl(loader._channel, termios.TIOCOUTQ, bytes(4)))[0]


def test_a_decoder_that_dies_is_named_and_started_again(
    loader: tuple[Loader, Task], make_artifact: Callable[..., Path]
) -> None:
    process: Any = loader[0]._process
    os.kill(process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(loader[0].image, str(make_artifact()))
        while not unread(loader[0]):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match=r"the decoder ended with status -9"):
            reading.result(60)
    assert loader[0].image(str(make_artifact())).numel() > 0


def test_the_decoder_keeps_off_the_cores_that_threads_are_bound_to() -> None:
    if len(CORES) < 2:
        pytest.skip("needs two cores")
    bound, over = threading.Event(), threading.Event()

    def compute(core: int) -> None:
        os.sched_setaffinity(0, {core})
        bound.set()
        over.wait(60)

    assert spare_cores() == (CORES, SPARE_NICENESS)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(compute, CORES[0])
        assert bound.wait(60)
        assert spare_cores() == (CORES[1:], SPARE_NICENESS)
        over.set()
        computing.result(60)
