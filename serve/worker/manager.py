"""The engine worker's manager of experts, in the place of vLLM's LoRA manager.

It answers vLLM's calls: before every step `set_active_adapters` maps the rows of the batch to slots. Experts come
and go by orders of the API server (`control.py`), beside the steps; vLLM's own calls to load, pin and remove an
adapter do the same within the engine's loop, for whoever uses vLLM without deltamux's API server.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.logger import init_logger

from deltamux.compression.checkpoint.architecture import tensor_specs
from deltamux.compression.checkpoint.checkpoint import Checkpoint, open_checkpoint
from deltamux.compression.image.cut import NO_CUTS, Cuts
from deltamux.compression.image.layout import assemble
from deltamux.serve import compat
from deltamux.serve.settings import PluginSettings, plugin_settings
from deltamux.serve.worker.capacity import capacity
from deltamux.serve.worker.control import listen
from deltamux.serve.worker.decoder import Task
from deltamux.serve.worker.deltas import Hooks, Rows, base_bytes, hook_model
from deltamux.serve.worker.host_cache import HostCache
from deltamux.serve.worker.loader import Loader
from deltamux.serve.worker.ops import define_ops
from deltamux.serve.worker.ranks import Ranks, cuts_of
from deltamux.serve.worker.residency import Residency
from deltamux.serve.worker.rows import BASE_ROW, RowMap
from deltamux.serve.worker.slots import Slots
from deltamux.serve.worker.table import Wanted

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
        compat.check_parallel(vllm_config.parallel_config)
        define_ops()
        self._config, self._device = vllm_config, torch.device(device)
        self._mapped: tuple[Any, ...] = ()

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Make room beside a model and hook its layers; called once, right after its weights are loaded."""
        tied = vllm_config.model_config.hf_config.tie_word_embeddings
        ranks = Ranks.of_worker()
        self.make_room(ranks, lambda names: cuts_of(model, names, tied))
        direct = self.slots.on_cpu and compat.runs_eagerly(vllm_config)
        hook_model(model, Hooks(self.slots, self.rows, self.capacity.norms, direct, tied))
        base, slots = base_bytes(model), self.slots.buffer.numel()
        memory = {"base": base, "slots": slots, "host_cache": 0}
        self.residency.status.memory_bytes = memory
        self.residency.publish()
        self.loader.start()
        listen(self.residency, self.loader.check, ranks.rank)
        logger.info(
            "deltamux: %d slots of %.1f MB beside a base of %.1f MB",
            self.slots.count,
            self.slots.slot_bytes / 1e6,
            base / 1e6,
        )
        return model

    def make_room(self, ranks: Ranks, cuts_of_names: Callable[[Collection[str]], Cuts]) -> None:
        """Slots, host cache and decoder for the experts that are configured.

        Args:
            ranks: The workers that share the model.
            cuts_of_names: The parts of weights that this rank holds, asked where there are several.
        """
        vllm_config, self.ranks = self._config, ranks
        settings = plugin_settings(vllm_config.additional_config)
        scheduler = vllm_config.scheduler_config
        base = _base(settings, vllm_config)
        specs = [spec for spec in tensor_specs(base.config, set(base.files)) if spec.served]
        # In the order of the base's list: a weight's place is its record's in every image.
        self.shapes = {spec.name: base.shape(spec.name) for spec in specs}
        names, on_cpu = list(self.shapes), self._device.type == "cpu"
        cuts = cuts_of_names(names) if ranks.size > 1 else NO_CUTS
        room = capacity(settings, self.shapes, specs, on_cpu, cuts)
        # An expert that fits on one rank fits on all.
        room = self.capacity = replace(room, num_bytes=ranks.largest([room.num_bytes])[0])
        count = vllm_config.lora_config.max_loras
        self.slots = Slots(count, room.num_bytes, names, self._device, room.rank)
        # The folder, wherever it was found: the decoder need not look for it again.
        task = Task(
            *(str(base.root), None, room),
            *(settings.slot.largest_rank, settings.image_cache, cuts),
            vllm_config.model_config.quantization,
        )
        self.loader = Loader(task, pin=not self.slots.on_cpu)
        self.residency = Residency(
            self.slots,
            HostCache(settings.host_cache),
            self.loader.image,
            nothing=assemble({}, len(self.shapes)),
            ranks=ranks,
        )
        max_rows = scheduler.max_num_batched_tokens + scheduler.max_num_seqs
        self.rows = Rows(*(RowMap(max_rows, count, self._device) for _ in range(2)))

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """A step starts: map the rows of its batch to the slots of their experts."""
        placed = self.residency.begin(map(_wanted, filter(None, requests)))
        if mapping is None:
            return
        # Most decoding steps have the rows of the one before.
        mapped = (mapping.index_mapping, mapping.prompt_mapping, tuple(sorted(placed.items())))
        if mapped != self._mapped:
            self.rows.tokens.update(_slots_of(mapping.index_mapping, placed))
            self.rows.samples.update(_slots_of(mapping.prompt_mapping, placed))
            self._mapped = mapped

    def step_ended(self) -> None:
        """The step's work is done, or, on a GPU, is on its way (see `patches.tell_ends_of_steps`)."""
        done = None
        if not self.slots.on_cpu:
            done = torch.cuda.Event()
            done.record()
        self.residency.end(done)

    def add_adapter(self, request: Any) -> bool:
        """Bring an expert into the host cache.

        Raises:
            ValueError: The artifact is refused; the message says why.
        """
        self.residency.load(_wanted(request))
        return True

    def pin_adapter(self, expert_id: int) -> bool:
        """Bring an expert into a slot, and let it be the last to leave.

        Raises:
            ValueError: The expert is not loaded, or no slot would be left for the others.
        """
        if expert_id not in self.residency.ids():
            raise ValueError(f"expert {expert_id} is not loaded: load it before pinning it")
        self.residency.enter(Wanted(expert_id, "", ""), pin=True)
        return True

    def remove_adapter(self, expert_id: int) -> bool:
        """Forget an expert: its slot, its pin and its host copy."""
        return self.residency.remove(expert_id)

    def remove_all_adapters(self) -> None:
        """Forget every expert; vLLM calls it after its warm-up, whose steps have no end that it tells."""
        self.residency.end()
        for expert_id in self.residency.ids():
            self.remove_adapter(expert_id)

    def list_adapters(self) -> set[int]:
        """Ids of the experts in slots or in the host cache."""
        return self.residency.ids()

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Part of vLLM's warm-up; dummies cost nothing here."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An expert that changes nothing, for warm-up and graph capture."""
        del rank
        self.residency.add_nothing(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Part of vLLM's warm-up; ranks mean nothing here."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Experts of multimodal towers are not supported."""
        return False


def _base(settings: PluginSettings, vllm_config: Any) -> Checkpoint:
    """What experts are deltas of: of a base that vLLM has quantized, the weights before that."""
    model, cache = vllm_config.model_config, vllm_config.load_config.download_dir
    if settings.base is not None:
        return open_checkpoint(settings.base, settings.base_revision, cache)
    return open_checkpoint(model.model, model.revision, cache)


def _wanted(request: Any) -> Wanted:
    return Wanted(request.lora_int_id, request.lora_name, request.lora_path)


def _slots_of(expert_ids: tuple[int, ...], placed: dict[int, int]) -> npt.NDArray[np.int64]:
    ids = np.asarray(expert_ids, np.int64)
    slots = np.full(len(ids), BASE_ROW, np.int64)
    for expert_id in np.unique(ids[ids > 0]):
        slots[ids == expert_id] = placed[int(expert_id)]
    return slots
