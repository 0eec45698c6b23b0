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

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.logger import init_logger

from deltamux.compression.checkpoint.architecture import tensor_specs
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.image.layout import assemble
from deltamux.serve import compat
from deltamux.serve.names import public_name
from deltamux.serve.settings import plugin_settings
from deltamux.serve.status import ExpertStatus, Histogram, WorkerStatus, publish
from deltamux.serve.worker.capacity import capacity
from deltamux.serve.worker.deltas import Hooks, Rows, base_bytes, hook_model
from deltamux.serve.worker.host_cache import BaseHashes, HostCache, open_expert
from deltamux.serve.worker.image_cache import ImageCache
from deltamux.serve.worker.ops import define_ops
from deltamux.serve.worker.rows import BASE_ROW, RowMap
from deltamux.serve.worker.slots import Slots

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
        base = open_checkpoint(model_config.model, model_config.revision)
        specs = tensor_specs(base.config, set(base.files))
        # In the order of the base's list: a weight's place is its record's in every image.
        self.shapes = {spec.name: base.shape(spec.name) for spec in specs}
        self.hashes = BaseHashes(base)
        self._largest_rank = settings.slot.largest_rank
        self.host = HostCache(settings.host_cache)
        self._images = ImageCache(settings.image_cache, self.shapes)
        self.capacity = capacity(settings, self.shapes, torch.device(device).type == "cpu")
        count = vllm_config.lora_config.max_loras
        self.slots = Slots(
            count,
            self.capacity.num_bytes,
            list(self.shapes),
            torch.device(device),
            self.capacity.rank,
        )
        max_rows = scheduler.max_num_batched_tokens + scheduler.max_num_seqs
        self.rows = Rows(*(RowMap(max_rows, count, torch.device(device)) for _ in range(2)))
        # Expert id → slot, least recently used first.
        self.resident: OrderedDict[int, int] = OrderedDict()
        self.pinned: set[int] = set()
        self.status = WorkerStatus()
        self._names: dict[int, str] = {}
        self._mapped: tuple[Any, ...] = ()

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Hook the model's layers; called once, right after its weights are loaded."""
        tied = vllm_config.model_config.hf_config.tie_word_embeddings
        direct = self.slots.on_cpu and compat.runs_eagerly(vllm_config)
        hook_model(model, Hooks(self.slots, self.rows, self.capacity.norms, direct, tied))
        base, slots = base_bytes(model), self.slots.buffer.numel()
        self.status.memory_bytes = {"base": base, "slots": slots, "host_cache": 0}
        self._publish()
        logger.info(
            "deltamux: %d slots of %.1f MB beside a base of %.1f MB",
            self.slots.count,
            self.slots.slot_bytes / 1e6,
            base / 1e6,
        )
        return model

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Make the experts of a batch resident and map its rows to their slots."""
        self._activate_all(requests)
        if mapping is None:
            return
        # Most decoding steps have the rows of the one before.
        mapped = (mapping.index_mapping, mapping.prompt_mapping, tuple(self.resident.items()))
        if mapped != self._mapped:
            self.rows.tokens.update(self._slots_of(mapping.index_mapping))
            self.rows.samples.update(self._slots_of(mapping.prompt_mapping))
            self._mapped = mapped

    def _slots_of(self, expert_ids: tuple[int, ...]) -> npt.NDArray[np.int64]:
        ids = np.asarray(expert_ids, np.int64)
        slots = np.full(len(ids), BASE_ROW, np.int64)
        for expert_id in np.unique(ids[ids > 0]):
            slots[ids == expert_id] = self.resident[int(expert_id)]
        return slots

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
        if expert_id not in self.pinned and len(self.pinned) + 1 >= self.slots.count:
            raise ValueError(
                f"pinning expert {expert_id} would pin all {self.slots.count} slots: "
                "one must stay free for the others"
            )
        self.activate_adapter(expert_id)
        self.pinned.add(expert_id)
        self.host.pin(expert_id)
        self._publish()
        return True

    def unpin_adapter(self, expert_id: int) -> bool:
        """Let an expert leave its slot like any other; it stays until another needs the slot."""
        was_pinned = expert_id in self.pinned
        self.pinned.discard(expert_id)
        self.host.unpin(expert_id)
        self._publish()
        return was_pinned

    def activate_adapter(self, expert_id: int) -> bool:
        """Bring an expert into a slot; the least recently used one makes room, a pinned one last.

        Raises:
            ValueError: The expert is not loaded.
        """
        if expert_id not in self.resident:
            if expert_id not in self.host:
                raise ValueError(f"expert {expert_id} is not loaded: load it first")
            self._activate(expert_id, keep=set())
        self.resident.move_to_end(expert_id)
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
        self.host.put(request.lora_int_id, self._nothing())
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
            self.host.put(request.lora_int_id, self._nothing())
            self._expert(request.lora_int_id).error = str(error)

    def _load(self, request: Any) -> None:
        start = time.perf_counter()
        source = open_expert(request.lora_path, self.hashes, self._largest_rank)
        self.capacity.check(source, source.image_bytes(self.shapes))
        image = self._images.image(source.content, lambda: source.image(self.shapes))
        self.capacity.check(source, image.numel())
        if not self.slots.on_cpu:
            # Or its copies to the device would not run beside other work.
            image = image.pin_memory()
        for expert_id in self.host.put(request.lora_int_id, image):
            logger.info("deltamux: expert %d left the host cache", expert_id)
        self._expert(request.lora_int_id).error = None
        self._names[request.lora_int_id] = public_name(request.lora_name)
        self._count_swap(request.lora_int_id, "host", time.perf_counter() - start)

    def _activate(self, expert_id: int, keep: set[int]) -> None:
        start = time.perf_counter()
        slot = self._free_slot(keep)
        self.slots.load(slot, self.host.get(expert_id))
        self.resident[expert_id] = slot
        self._count_swap(expert_id, "slot", time.perf_counter() - start)

    def _nothing(self) -> torch.Tensor:
        """The image of an expert that changes nothing."""
        return assemble({}, len(self.shapes))

    def _free_slot(self, keep: set[int]) -> int:
        free = set(range(self.slots.count)) - set(self.resident.values())
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
