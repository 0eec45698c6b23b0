"""Who enters the engine when: loads before requests, bounded waits, priority, concurrency, keep-alive."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltamux.serve.api.expert import Expert, ExpertError, Limits
from deltamux.serve.api.gate import Gate


class Orders:
    """A worker that notes its orders; a load ends when the test says so."""

    def __init__(self) -> None:
        self.given: list[tuple[str, str]] = []
        self.slots: set[str] = set()
        self.bad: set[str] = set()
        self.loadable = asyncio.Event()
        self.loadable.set()

    async def load(self, expert: Expert) -> None:
        self.given.append(("load", expert.name))
        await self.loadable.wait()
        if expert.name in self.bad:
            raise ExpertError(f"{expert.name} is truncated")

    async def enter(self, expert: Expert, keep: list[int]) -> None:
        self.given.append(("enter", expert.name))
        kept = {f"e{lora_id}" for lora_id in keep}
        self.slots = {each for each in self.slots if each in kept} | {expert.name}
        await asyncio.sleep(0)

    async def pin(self, expert: Expert, keep: list[int]) -> None:
        self.given.append(("pin", expert.name))

    async def leave(self, expert: Expert) -> None:
        self.given.append(("leave", expert.name))
        self.slots.discard(expert.name)


def expert(number: int, **limits: Any) -> Expert:
    request = SimpleNamespace(lora_int_id=number)
    return Expert(f"e{number}", Path(), request=request, limits=Limits(**limits))


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 20))


def gate_of(worker: Any, slots: int = 2, patience: float = 1000.0) -> Gate:
    return Gate(worker, slots, patience, lambda each: each.name in worker.slots)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_two_requests_for_one_cold_expert_load_it_once() -> None:
    async def scene() -> None:
        worker = Orders()
        gate, cold = gate_of(worker), expert(1)
        await asyncio.gather(gate.enter(cold), gate.enter(cold))
        assert worker.given == [("load", "e1"), ("enter", "e1")]
        assert cold.entered == 2

    run(scene)


def test_a_request_waits_for_its_own_expert_and_for_no_others() -> None:
    async def scene() -> None:
        worker = Orders()
        gate, warm, cold = gate_of(worker), expert(1), expert(2)
        await gate.enter(warm)
        worker.loadable.clear()
        waiting = asyncio.create_task(gate.enter(cold))
        await settle()
        assert await gate.enter(warm) == 0.0
        assert not waiting.done()
        assert gate.waiting() == {"e2": 1}
        worker.loadable.set()
        assert await waiting > 0

    run(scene)


def test_an_expert_whose_requests_run_keeps_its_slot() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker)
        experts = [expert(number) for number in (1, 2, 3)]
        for each in experts[:2]:
            await gate.enter(each)
        third = asyncio.create_task(gate.enter(experts[2]))
        await settle()
        assert not third.done()
        gate.leave(experts[1])
        await third
        assert worker.slots == {"e1", "e3"}

    run(scene)


def test_a_busy_expert_is_drained_for_one_that_waited_long_enough() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker, slots=1, patience=0.05)
        hot, cold = expert(1), expert(2)
        await gate.enter(hot)
        start = time.monotonic()
        waiting = asyncio.create_task(gate.enter(cold))
        while not gate.waiting().get("e1"):
            # The flood: one more enters before the last one leaves, until the gate holds it back.
            more = asyncio.create_task(gate.enter(hot))
            await asyncio.sleep(0.01)
            if more.done():
                gate.leave(hot)
        assert time.monotonic() - start >= 0.05
        assert not waiting.done()
        gate.leave(hot)
        await waiting
        gate.leave(cold)
        await more
        assert worker.slots == {"e1"}

    run(scene)


def test_the_more_urgent_of_two_waiting_experts_goes_first() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker, slots=1)
        busy, later, urgent = expert(1), expert(2, priority=1), expert(3, priority=-1)
        await gate.enter(busy)
        second = asyncio.create_task(gate.enter(later))
        await settle()
        first = asyncio.create_task(gate.enter(urgent))
        await settle()
        gate.leave(busy)
        await first
        assert not second.done()
        gate.leave(urgent)
        await second

    run(scene)


def test_the_least_urgent_expert_is_drained_first() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker, slots=2, patience=0.01)
        urgent, patient = expert(1, priority=-1), expert(2)
        for each in (urgent, patient):
            await gate.enter(each)
        waiting = asyncio.create_task(gate.enter(expert(3)))
        await asyncio.sleep(0.1)
        assert await gate.enter(urgent) == 0.0
        gate.leave(patient)
        await waiting
        assert worker.slots == {"e1", "e3"}

    run(scene)


def test_no_more_of_an_experts_requests_run_than_its_concurrency_allows() -> None:
    async def scene() -> None:
        gate, narrow = gate_of(Orders()), expert(1, concurrency=2)
        for _ in range(2):
            await gate.enter(narrow)
        third = asyncio.create_task(gate.enter(narrow))
        await settle()
        assert not third.done()
        gate.leave(narrow)
        await third
        assert narrow.entered == 2

    run(scene)


def test_an_expert_that_is_refused_fails_its_own_requests_and_is_tried_again() -> None:
    async def scene() -> None:
        worker = Orders()
        gate, good, bad = gate_of(worker), expert(1), expert(2)
        await gate.enter(good)
        worker.bad = {"e2"}
        answers = await asyncio.gather(*(gate.enter(bad) for _ in range(3)), return_exceptions=True)
        assert [str(each) for each in answers] == ["e2 is truncated"] * 3
        assert await gate.enter(good) == 0.0
        worker.bad = set()
        await gate.enter(bad)

    run(scene)


def test_who_gives_up_waiting_leaves_nothing_behind() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker, slots=1)
        first, second = expert(1), expert(2)
        await gate.enter(first)
        waiting = asyncio.create_task(gate.enter(second))
        await settle()
        waiting.cancel()
        await settle()
        assert gate.waiting() == {}
        gate.leave(first)
        await settle()
        assert (second.entered, worker.slots) == (0, {"e1"})

    run(scene)


def test_an_expert_that_lost_its_slot_past_the_gate_is_brought_back_first() -> None:
    async def scene() -> None:
        worker = Orders()
        gate, only = gate_of(worker), expert(1)
        await gate.enter(only)
        worker.slots.clear()
        assert await gate.enter(only) > 0
        assert worker.given[-1] == ("enter", "e1")
        assert worker.slots == {"e1"}

    run(scene)


def test_a_pinned_expert_never_gives_its_slot_away() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker, slots=2, patience=0.01)
        pinned, other, third = expert(1), expert(2), expert(3)
        await gate.pin(pinned)
        with pytest.raises(ExpertError, match="one must stay free"):
            await gate.pin(other)
        await gate.enter(other)
        waiting = asyncio.create_task(gate.enter(third))
        await asyncio.sleep(0.05)
        gate.leave(other)
        await waiting
        assert worker.slots == {"e1", "e3"}

    run(scene)


def test_an_expert_rests_only_when_nothing_of_it_runs_and_returns_with_its_next_request() -> None:
    async def scene() -> None:
        worker = Orders()
        gate, only = gate_of(worker), expert(1)
        await gate.enter(only)
        gate.rest(only)
        await settle()
        assert worker.slots == {"e1"}
        gate.leave(only)
        gate.rest(only)
        back = asyncio.create_task(gate.enter(only))
        await back
        assert worker.given[-3:] == [("leave", "e1"), ("load", "e1"), ("enter", "e1")]

    run(scene)


def test_a_version_that_is_removed_gives_its_slot_to_who_waits() -> None:
    async def scene() -> None:
        worker = Orders()
        gate = gate_of(worker, slots=1)
        old, new = expert(1), expert(2)
        await gate.enter(old)
        waiting = asyncio.create_task(gate.enter(new))
        await settle()
        old.entered -= 1
        await gate.drop(old)
        await waiting
        assert worker.slots == {"e2"}

    run(scene)


def test_a_version_leaves_only_after_what_moves_of_it_has_arrived() -> None:
    async def scene() -> None:
        worker = Orders()
        gate, going = gate_of(worker), expert(1)
        worker.loadable.clear()
        waiting = asyncio.create_task(gate.enter(going))
        await settle()
        waiting.cancel()
        await settle()
        dropping = asyncio.create_task(gate.drop(going))
        await settle()
        assert not dropping.done()
        worker.loadable.set()
        await dropping
        assert worker.given == [("load", "e1")]

    run(scene)


def test_whatever_fails_in_a_move_its_requests_do_not_wait_for_ever() -> None:
    class Broken(Orders):
        async def load(self, expert: Expert) -> None:
            raise RuntimeError("no memory today")

    async def scene() -> None:
        with pytest.raises(ExpertError, match="no memory today"):
            await gate_of(Broken()).enter(expert(1))

    run(scene)
