"""What vLLM's own metrics, caches and scheduler are told of experts."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltamux.serve import compat
from deltamux.serve.api.autoroute import explicit
from deltamux.serve.api.expert import Expert, Limits
from deltamux.serve.observability import adapters, engine_stats, metrics
from deltamux.serve.observability.engine_stats import RequestEngine, salted
from deltamux.serve.observability.journal import RequestRecord
from deltamux.serve.status import ExpertStatus

pytestmark = pytest.mark.vllm


class Registry:
    """Two experts, one in a slot with a copy in host memory, one pinned; a third on disk."""

    vllm_orders = True

    def __init__(self) -> None:
        self.experts = {name: Expert(name, Path()) for name in ("math", "sql", "law")}
        self.seen = {
            "math": ExpertStatus(tier="slot", host_bytes=5),
            "sql": ExpertStatus(tier="host", host_bytes=5, pinned=True),
            "law": ExpertStatus(),
        }
        self.gate = SimpleNamespace(waiting=lambda: {"law": 2, "math": 1})

    def __iter__(self) -> Any:
        return iter(self.experts.values())

    def status_of(self, expert: Expert) -> ExpertStatus:
        return self.seen[expert.name]

    def version(self, _: int) -> Expert:
        return Expert("math", Path(), content="0123abcd", limits=Limits(priority=3))


def test_loaded_experts_have_the_series_that_vllm_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Any = Registry()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in adapters.loaded_adapters(registry)
        for sample in family.samples
    }
    assert samples == {
        ("vllm:lora_adapter_loaded", "0", "math", "gpu", "false"): 1,
        ("vllm:lora_adapter_loaded", "0", "sql", "cpu", "true"): 1,
        ("vllm:num_gpu_loaded_lora_adapters", "0"): 1,
        ("vllm:num_cpu_loaded_lora_adapters", "0"): 2,
    }
    monkeypatch.setattr(compat, "tells_loaded_adapters", lambda _: True)
    assert list(adapters.loaded_adapters(registry)) == []


def test_vllms_info_names_experts_as_clients_do_and_those_that_wait_at_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states: Any = compat.symbol(*compat.LORA_STATES)
    monkeypatch.setattr(states, "update_scheduler_stats", states.update_scheduler_stats)
    registry: Any = Registry()
    adapters.name_publicly(registry)
    adapters.name_publicly(registry)
    counted = states(log_stats=True)
    counted.request_running("a", "math@0.1")
    counted.request_running("b", "math@1.7")
    counted.request_waiting("c", "sql@0.2")
    stats = SimpleNamespace(running_lora_adapters={}, waiting_lora_adapters={})
    counted.update_scheduler_stats(stats)
    assert stats.running_lora_adapters == {"math": 2}
    assert stats.waiting_lora_adapters == {"sql": 1, "law": 2, "math": 1}
    counted.update_scheduler_stats(None)


def test_the_salt_of_a_prompt_begins_with_the_experts_content() -> None:
    prompt = {"type": "token", "prompt_token_ids": [1]}
    assert salted(prompt, "0123") == prompt | {"cache_salt": "0123"}
    assert salted(prompt | {"cache_salt": "mine"}, "0123")["cache_salt"] == "0123mine"
    assert "cache_salt" not in prompt
    assert salted("text", "0123") == "text"


def test_the_engine_is_given_salt_and_priority_of_the_requests_expert() -> None:
    given: dict[str, Any] = {}

    class Engine:
        async def generate(self, prompt: Any, *_: Any, **more: Any) -> Any:
            given.update(prompt, **more)
            for output in ():
                yield output

    registry: Any = Registry()
    record = RequestRecord("math", explicit("math"), 0.0)
    engine = RequestEngine(Engine(), record, registry, [])
    request = SimpleNamespace(lora_int_id=1)

    async def scene() -> None:
        prompt = {"prompt_token_ids": [1]}
        stream = engine.generate(prompt, SimpleNamespace(), "r", lora_request=request, priority=-1)
        assert [each async for each in stream] == []

    asyncio.run(scene())
    assert (given["cache_salt"], given["priority"]) == ("0123abcd", 2)


def test_accepted_tokens_are_counted_by_expert() -> None:
    def update(output: Any, is_prefilling: bool, req_stats: Any, **_: Any) -> None:
        pass

    def counts() -> tuple[float, float]:
        steps, accepted = metrics.speculative_steps, metrics.speculative_accepted
        return tuple(each.labels("drafty")._value.get() for each in (steps, accepted))  # type: ignore[return-value]

    observed = engine_stats._observing(update, speculative=True)
    stats = SimpleNamespace(
        last_token_ts=0.0, deltamux_record=RequestRecord("drafty", explicit(None), 0.0)
    )
    before = counts()
    for tokens in ([1], [1, 2, 3], []):
        observed(
            output=SimpleNamespace(new_token_ids=tokens),
            is_prefilling=False,
            req_stats=stats,
            engine_core_timestamp=1.0,
        )
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 2]
