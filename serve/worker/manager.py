"""The engine worker's manager of experts: disk → host cache → slots.

It stands where vLLM creates its LoRA manager and answers the same calls. `add_adapter` (from the
API) brings an expert into the host cache and reports what is wrong with it; `set_active_adapters`
(before every step) brings the experts of the batch into slots, least recently used out first.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.serve import compat
from deltamux.serve.settings import plugin_settings
from deltamux.serve.status import ExpertStatus, Histogram, WorkerStatus, publish
from deltamux.serve.worker.host_cache import (
    BaseHashes,
    HostCache,
    HostExpert,
    host_expert,
    open_artifact,
    public_name,
)
from deltamux.serve.worker.layers import ExpertLayer
from deltamux.serve.worker.ops import define_ops
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import SlotPlan
from deltamux.serve.worker.wrap import base_bytes, expert_payloads, wrap_model

logger = init_logger("vllm.deltamux")


class ExpertManager:
    """Experts of one model runner.

    Args:
        vllm_config: vLLM's configuration; `additional_config["deltamux"]` is read.
        device: The model's device.
        embedding_modules: Unused; part of vLLM's call.
    """

    def __init__(
        self, vllm_config: Any, device: torch.device, embedding_modules: dict[str, str]
    ) -> None:
        del embedding_modules
        settings = plugin_settings(vllm_config.additional_config)
        compat.check_one_device(vllm_config.parallel_config)
        define_ops()
        model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        self.plan = SlotPlan(
            slots=vllm_config.lora_config.max_loras,
            salient=settings.slot.salient_channels,
            dtype=model_config.dtype,
            device=torch.device(device),
        )
        self.hashes = BaseHashes(open_checkpoint(model_config.model, model_config.revision))
        self.host = HostCache(settings.host_cache)
        max_rows = scheduler.max_num_batched_tokens + scheduler.max_num_seqs
        self.tokens = RowMap(max_rows, self.plan.slots, self.plan.device)
        self.samples = RowMap(max_rows, self.plan.slots, self.plan.device)
        # Expert id → slot, least recently used first.
        self.resident: OrderedDict[int, int] = OrderedDict()
        self.pinned: set[int] = set()
        self.status = WorkerStatus()
        self.layers: dict[str, ExpertLayer] = {}
        self._names: dict[int, str] = {}
        self._packed: dict[str, list[str]] = {}

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Wrap the model's layers; called once, right after its weights are loaded."""
        self._packed = dict(getattr(model, "packed_modules_mapping", {}))
        self.layers = wrap_model(model, self.plan, self.tokens, self.samples)
        tied = vllm_config.model_config.hf_config.tie_word_embeddings
        base = base_bytes(self.layers, self.plan.dtype, tied)
        slots = sum(layer.device_bytes() for layer in self.layers.values())
        self.status.memory_bytes = {"base": base, "slots": slots, "host_cache": 0}
        self._publish()
        logger.info(
            "deltamux: %d slots of %.1f MB around a base of %.1f MB",
            self.plan.slots,
            slots / self.plan.slots / 1e6,
            base / 1e6,
        )
        return model

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Make the experts of a batch resident and map its rows to their slots."""
        self._activate_all(requests)
        if mapping is not None:
            lookup = {0: -1, **self.resident}
            self.tokens.update([lookup[expert] for expert in mapping.index_mapping])
            self.samples.update([lookup[expert] for expert in mapping.prompt_mapping])

    def add_adapter(self, request: Any) -> bool:
        """Bring an expert into the host cache.

        Raises:
            ValueError: The artifact is refused; the message says why.
        """
        expert_id = request.lora_int_id
        if expert_id in self.host and self._expert(expert_id).error is None:
            self.host.get(expert_id)
            return True
        self._load(request)
        # What a slot may hold of it is what was there before: the next batch copies it anew.
        self._release_slot(expert_id)
        self._publish()
        return True

    def pin_adapter(self, expert_id: int) -> bool:
        """Bring an expert into a slot, and let it be the last to leave.

        Raises:
            ValueError: The expert is not loaded, or no slot would be left for the others.
        """
        if expert_id not in self.host and expert_id not in self.resident:
            raise ValueError(f"expert {expert_id} is not loaded: load it before pinning it")
        if expert_id not in self.pinned and len(self.pinned) + 1 >= self.plan.slots:
            raise ValueError(
                f"pinning expert {expert_id} would pin all {self.plan.slots} slots: "
                "one must stay free for the others"
            )
        if expert_id not in self.resident:
            self._activate(expert_id, keep=set())
        self.pinned.add(expert_id)
        self.host.pin(expert_id)
        self._publish()
        return True

    def remove_adapter(self, expert_id: int) -> bool:
        """Forget an expert: its slot, its pin and its host copy."""
        known = expert_id in self.list_adapters()
        self._release_slot(expert_id)
        self.pinned.discard(expert_id)
        self.host.remove(expert_id)
        self.status.experts.pop(expert_id, None)
        self._names.pop(expert_id, None)
        self._publish()
        return known

    def remove_all_adapters(self) -> None:
        """Forget every expert."""
        for expert_id in list(self.list_adapters()):
            self.remove_adapter(expert_id)

    def list_adapters(self) -> set[int]:
        """Ids of the experts in slots or in the host cache."""
        return set(self.resident) | {each for each in self.status.experts if each in self.host}

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Part of vLLM's warm-up; dummies cost nothing here."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An expert that changes nothing, for warm-up and graph capture."""
        del rank
        self.host.put(request.lora_int_id, HostExpert({}, 0))
        self.status.experts[request.lora_int_id] = ExpertStatus()
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Part of vLLM's warm-up; ranks mean nothing here."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Experts of multimodal towers are not supported."""
        return False

    def _activate_all(self, requests: set[Any]) -> None:
        wanted = {request.lora_int_id: request for request in requests if request}
        for expert_id in wanted:
            if expert_id in self.resident:
                self.resident.move_to_end(expert_id)
        for expert_id, request in wanted.items():
            if expert_id in self.resident:
                continue
            start = time.monotonic()
            if expert_id not in self.host:
                self._load_in_step(request)
            self._activate(expert_id, keep=set(wanted))
            expert = self._expert(expert_id)
            expert.swapped_at = time.monotonic()
            expert.swap_seconds = expert.swapped_at - start
            self._publish()

    def _load_in_step(self, request: Any) -> None:
        """Load inside a step, where an exception would end the engine for everybody.

        The API server loads experts before it admits their requests; this is the rare case of one
        that left the host cache in between. Should its artifact have gone bad meanwhile, its
        running requests get the base's output, and new ones are refused with the reason.
        """
        try:
            self._load(request)
        except Exception as error:
            logger.exception("deltamux: cannot load expert %r", request.lora_name)
            self.host.put(request.lora_int_id, HostExpert({}, 0))
            self._expert(request.lora_int_id).error = str(error)

    def _load(self, request: Any) -> None:
        start = time.perf_counter()
        artifact = open_artifact(request.lora_path, self.hashes)
        payloads = expert_payloads(artifact, self.layers, self._packed, self.plan)
        for expert_id in self.host.put(request.lora_int_id, host_expert(payloads)):
            logger.info("deltamux: expert %d left the host cache", expert_id)
        self._expert(request.lora_int_id).error = None
        self._names[request.lora_int_id] = public_name(request.lora_name)
        self._count_swap(request.lora_int_id, "host", time.perf_counter() - start)

    def _activate(self, expert_id: int, keep: set[int]) -> None:
        start = time.perf_counter()
        slot = self._free_slot(keep)
        payloads = self.host.get(expert_id).payloads
        for name, layer in self.layers.items():
            layer.load_slot(slot, payloads.get(name))
        self.resident[expert_id] = slot
        self._count_swap(expert_id, "slot", time.perf_counter() - start)

    def _free_slot(self, keep: set[int]) -> int:
        free = set(range(self.plan.slots)) - set(self.resident.values())
        if free:
            return min(free)
        # vLLM's scheduler knows the number of slots but not the pins: a batch that needs every slot
        # takes a pinned one too, and its expert returns with its next request.
        idle = [each for each in self.resident if each not in keep]
        victim = min(idle, key=lambda each: each in self.pinned)
        self.status.evictions += 1
        return self._release_slot(victim)

    def _release_slot(self, expert_id: int) -> int:
        return self.resident.pop(expert_id, -1)

    def _expert(self, expert_id: int) -> ExpertStatus:
        return self.status.experts.setdefault(expert_id, ExpertStatus())

    def _count_swap(self, expert_id: int, tier: str, seconds: float) -> None:
        name = self._names.get(expert_id)
        if name is None:  # a dummy of vLLM's warm-up
            return
        swaps = self.status.swaps.setdefault(name, {})
        swaps[tier] = swaps.get(tier, 0) + 1
        self.status.swap_seconds.setdefault(tier, Histogram()).observe(seconds)

    def _publish(self) -> None:
        for expert_id, expert in self.status.experts.items():
            expert.slot = self.resident.get(expert_id)
            expert.pinned = expert_id in self.pinned
            expert.host_bytes = self.host.bytes_of(expert_id)
            in_host = "host" if expert_id in self.host else "disk"
            expert.tier = in_host if expert.slot is None else "slot"
        self.status.memory_bytes["host_cache"] = self.host.num_bytes
        publish(self.status)
