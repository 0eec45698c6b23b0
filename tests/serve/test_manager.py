"""The worker's manager over a stand-in model: slots, pins, and experts gone bad on disk."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltamux.compression.artifact.manifest import content_hash
from deltamux.compression.image.layout import HEADER_BYTES, head_bytes
from deltamux.serve.names import versioned_path
from deltamux.serve.status import STATUS_DIRECTORY_VARIABLE
from deltamux.serve.worker.table import Wanted

pytestmark = pytest.mark.vllm


class InThisProcess:
    """A loader without a process of its own, but with the decoder that such a process runs."""

    def __init__(self, task: Any, pin: bool) -> None:
        from deltamux.serve.worker.decoder import Decoder

        self.image = Decoder(task).image


def config(base: Path, slots: int = 2, **parallel: int) -> SimpleNamespace:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    return SimpleNamespace(
        additional_config={"deltamux": {"version": 1}},
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        model_config=SimpleNamespace(
            dtype=torch.float32, model=str(base), revision=None, quantization=None
        ),
        load_config=SimpleNamespace(download_dir=None),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
        lora_config=SimpleNamespace(max_loras=slots),
    )


@pytest.fixture
def manager(
    make_pair: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    from deltamux.serve.worker import manager as module

    monkeypatch.setenv(STATUS_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(module, "Loader", InThisProcess)
    found = module.ExpertManager(config(make_pair()[0]), torch.device("cpu"), {})
    found.make_room(module.Ranks(), lambda names: {})
    return found


@pytest.fixture
def request_for(
    make_artifact: Callable[..., Path], tmp_path: Path
) -> Callable[[int], SimpleNamespace]:
    def make(expert_id: int) -> SimpleNamespace:
        path = tmp_path / f"expert-{expert_id}"
        if not path.exists():
            shutil.copytree(make_artifact(), path)
        return SimpleNamespace(
            lora_int_id=expert_id,
            lora_name=f"e{expert_id}@0.{expert_id}",
            lora_path=versioned_path(path, content_hash(path)),
        )

    return make


def slot_changes(manager: Any, slot: int) -> bool:
    """Whether a slot's records say that anything differs from the base."""
    records = manager.slots.buffer[slot][HEADER_BYTES : head_bytes(len(manager.shapes))]
    return bool(records.any())


def step(manager: Any, *requests: SimpleNamespace) -> None:
    ids = tuple(request.lora_int_id for request in requests)
    mapping = SimpleNamespace(index_mapping=(0, *ids), prompt_mapping=ids)
    manager.set_active_adapters(set(map(_Hashable, requests)), mapping)


class _Hashable:
    """vLLM keeps LoRA requests in sets."""

    def __init__(self, request: SimpleNamespace) -> None:
        self.__dict__.update(request.__dict__)


def test_the_least_recently_used_expert_leaves_its_slot(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    for expert_id in (1, 2, 1, 3):
        step(manager, request_for(expert_id))
    assert set(manager.residency.table.resident) == {1, 3}
    assert manager.residency.status.evictions == 1
    assert manager.residency.status.experts[2].tier == "host"


def test_experts_of_the_batch_never_evict_each_other(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    step(manager, request_for(1))
    step(manager, request_for(2))
    step(manager, request_for(1), request_for(3))
    assert set(manager.residency.table.resident) == {1, 3}
    slots = [manager.residency.table.resident[1], manager.residency.table.resident[3]]
    assert manager.rows.tokens.slot_of_row[:3].tolist() == [-1, *slots]


def test_a_pinned_expert_leaves_last_and_only_for_a_batch_that_needs_every_slot(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    manager.add_adapter(request_for(1))
    assert manager.pin_adapter(1)
    for expert_id in (2, 3):
        step(manager, request_for(expert_id))
    assert 1 in manager.residency.table.resident
    step(manager, request_for(2), request_for(3))
    assert set(manager.residency.table.resident) == {2, 3}
    step(manager, request_for(1))
    assert manager.residency.status.experts[1].pinned
    assert manager.residency.status.experts[1].tier == "slot"


def test_an_expert_without_its_pin_leaves_like_any_other(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    manager.add_adapter(request_for(1))
    manager.pin_adapter(1)
    manager.residency.unpin(1)
    manager.residency.unpin(1)
    seen = manager.residency.status.experts[1]
    assert (seen.tier, seen.pinned) == ("slot", False)
    for expert_id in (2, 3):
        step(manager, request_for(expert_id))
    assert set(manager.residency.table.resident) == {2, 3}


def test_an_expert_that_is_brought_in_takes_the_place_of_the_least_recently_used(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    for expert_id in (1, 2):
        step(manager, request_for(expert_id))
    manager.step_ended()
    third = request_for(3)
    for _ in range(2):
        manager.residency.enter(Wanted(3, third.lora_name, third.lora_path))
    assert set(manager.residency.table.resident) == {2, 3}
    status = manager.residency.status
    assert (status.experts[3].tier, status.experts[1].tier) == ("slot", "host")
    assert status.swaps["e3"]["slot"] == 1


def test_pins_leave_one_slot_free(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    with pytest.raises(ValueError, match="is not loaded"):
        manager.pin_adapter(1)
    for expert_id in (1, 2):
        manager.add_adapter(request_for(expert_id))
    manager.pin_adapter(1)
    with pytest.raises(ValueError, match="one must stay free"):
        manager.pin_adapter(2)


def test_a_bad_expert_in_a_step_does_not_end_the_engine_and_recovers(
    manager: Any, request_for: Callable[[int], SimpleNamespace], tmp_path: Path
) -> None:
    request = request_for(1)
    weights = tmp_path / "expert-1" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    step(manager, request)
    assert "truncated" in manager.residency.status.experts[1].error
    assert not slot_changes(manager, 0)
    with pytest.raises(ValueError, match="truncated"):
        manager.add_adapter(request)
    weights.write_bytes(content)
    assert manager.add_adapter(request)
    assert manager.residency.status.experts[1].error is None
    step(manager, request)
    assert slot_changes(manager, manager.residency.table.resident[1])


def test_weights_that_changed_since_they_were_registered_are_not_served_under_the_old_name(
    manager: Any, request_for: Callable[[int], SimpleNamespace], tmp_path: Path
) -> None:
    request = request_for(1)
    manifest = tmp_path / "expert-1" / "delta_config.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ValueError, match="has changed since it was registered"):
        manager.add_adapter(request)


def test_whatever_fails_in_a_step_the_engine_goes_on(
    manager: Any,
    request_for: Callable[[int], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory today")

    monkeypatch.setattr(manager.residency, "_read", broken)
    step(manager, request_for(1))
    assert manager.residency.status.experts[1].error == "no memory today"


def test_swaps_are_counted_by_name_and_go_on_over_versions(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    old, new = request_for(1), request_for(2)
    new.lora_name = "e1@1.2"
    step(manager, old)
    manager.remove_adapter(1)
    step(manager, new)
    assert manager.residency.status.swaps == {"e1": {"host": 2, "slot": 2}}


def test_a_removed_expert_is_forgotten_in_every_tier(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    step(manager, request_for(1))
    assert manager.list_adapters() == {1}
    assert manager.remove_adapter(1)
    assert not manager.remove_adapter(1)
    assert manager.list_adapters() == set()
    assert 1 not in manager.residency.status.experts


def test_dummies_for_warm_up_change_nothing_and_disappear(
    manager: Any, request_for: Callable[[int], SimpleNamespace]
) -> None:
    dummies = [SimpleNamespace(lora_int_id=i, lora_name="w", lora_path="/no") for i in (1, 2)]
    with manager.dummy_lora_cache():
        for dummy in dummies:
            assert manager.add_dummy_lora(dummy, rank=8)
        step(manager, *dummies)
    assert not any(slot_changes(manager, slot) for slot in (0, 1))
    assert manager.residency.status.swaps == {}
    manager.remove_all_adapters()
    assert manager.list_adapters() == set()
    assert not manager.residency.table.resident


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "data_parallel_size"])
def test_other_parallelism_than_that_of_tensors_is_refused(
    make_pair: Callable[..., tuple[Path, Path]], name: str
) -> None:
    from deltamux.serve.worker.manager import ExpertManager

    with pytest.raises(ValueError, match=f"{name} must be 1, got 2"):
        ExpertManager(config(make_pair()[0], **{name: 2}), torch.device("cpu"), {})
