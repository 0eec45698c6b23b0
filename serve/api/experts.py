"""The experts a server offers, as its API process knows them.

An expert reaches the engine as a LoRA request whose name and path carry a hash of the artifact's
content, so that vLLM's prefix cache (which keys on the name before 0.32, on name and path since)
never serves keys of an older version under the same name. Updating an expert loads the new version
beside the old one, swaps the name, and drops the old one when its last request has ended.
"""

import asyncio
import copy
import logging
from pathlib import Path
from typing import Any

from deltamux.serve.api.expert import (
    Expert,
    ExpertError,
    Limits,
    Origin,
    Served,
    lora_request,
    read_expert,
)
from deltamux.serve.api.gate import Gate
from deltamux.serve.api.worker import Worker, answered
from deltamux.serve.names import artifact_path, check_expert_name
from deltamux.serve.settings import ExpertSettings
from deltamux.serve.status import ExpertStatus, read_status

logger = logging.getLogger("vllm.deltamux")


class ExpertRegistry:
    """Experts by name, over vLLM's own table of LoRA requests.

    Args:
        engine: vLLM's engine client.
        models: `app.state.openai_serving_models`.
        served: What decides on the experts that are taken.
        patience: Seconds that a request waits for a slot before a busy one is drained.
        ttl: Seconds without a request after which experts leave memory; None: never.
    """

    def __init__(
        self, engine: Any, models: Any, served: Served, patience: float, ttl: float | None = None
    ) -> None:
        self._engine = engine
        self._models = models
        # vLLM's own table stays empty: what is not handed a handler from here reaches no expert.
        self._requests: dict[str, Any] = {}
        self._served = served
        self._ttl = ttl
        self._worker = Worker(engine.vllm_config.parallel_config.tensor_parallel_size)
        # How many experts are on the device at one time.
        self.slots: int = engine.vllm_config.lora_config.max_loras
        self.gate = Gate(self._worker, self.slots, patience, self._in_slot)
        # Whether vLLM's scheduler takes requests by priority; otherwise it refuses any.
        self.vllm_orders = engine.vllm_config.scheduler_config.policy == "priority"
        self._experts: dict[str, Expert] = {}
        # Every version that the engine may still be running, by LoRA id.
        self._versions: dict[int, Expert] = {}
        self._lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Any:
        return iter(self._experts.values())

    def get(self, name: str) -> Expert | None:
        """An expert by name, None if there is none."""
        return self._experts.get(name)

    def version(self, lora_id: int) -> Expert | None:
        """The version of an expert behind a LoRA id."""
        return self._versions.get(lora_id)

    def seen_by(self, handler: Any, **changes: Any) -> Any:
        """A copy of one of vLLM's handlers to which the experts exist; attributes change as given."""
        seeing, models = copy.copy(handler), copy.copy(self._models)
        models.lora_requests = self._requests
        for name, value in {"models": models, **changes}.items():
            setattr(seeing, name, value)
        return seeing

    def serves(self, name: str) -> bool:
        """Whether an expert can answer."""
        expert = self._experts.get(name)
        return expert is not None and expert.error is None

    def residents(self) -> frozenset[str]:
        """The names of the experts that are in a slot, as the worker last said."""
        return frozenset(each.name for each in self if self.status_of(each).tier == "slot")

    def status_of(self, expert: Expert) -> ExpertStatus:
        """What the worker last said of an expert's version; on disk if it never did."""
        known = read_status().experts
        seen = known.get(expert.request.lora_int_id) if expert.request else None
        return seen or ExpertStatus()

    def _in_slot(self, expert: Expert) -> bool:
        seen = self.status_of(expert)
        return seen.tier == "slot" and not seen.error

    async def adopt(self) -> None:
        """Take over what `--lora-modules` loaded, under versioned names."""
        given = dict(self._models.lora_requests)
        self._models.lora_requests.clear()
        for name, request in given.items():
            await self.register(name, artifact_path(request.lora_path))
            await self._worker.remove(Expert(name, Path(), request=request))

    async def offer(
        self, given: ExpertSettings, preload: bool, origin: Origin = "configured"
    ) -> Expert:
        """Register an expert from the configuration; a refused one is kept with its reason.

        Args:
            given: What is configured.
            preload: Whether it is loaded, and not only checked.
            origin: Where it is configured.

        Raises:
            ValueError: The name is the base model's.
        """
        name = given.name
        if self._models.is_base_model(name):
            raise ValueError(f"the expert {name!r} is called like the base model: rename one")
        try:
            expert = await self.register(name, given.path, origin=origin, load=preload)
        except ExpertError as error:
            logger.error("deltamux: expert %r is refused: %s", name, error)
            self._experts[name] = Expert(name, given.path, error=str(error), source=given.path)
            self._experts[name].origin = origin
            return self._experts[name]
        ttl = self._ttl if given.ttl is None else given.ttl
        expert.limits = Limits(given.priority, given.concurrency, ttl)
        try:
            if given.pin:
                await self.pin(name)
        except ExpertError as error:
            logger.error("deltamux: expert %r is not pinned: %s", name, error)
        return expert

    async def register(
        self,
        name: str,
        path: Path,
        pin: bool = False,
        origin: Origin = "added",
        load: bool = True,
    ) -> Expert:
        """Load an expert, or a new version of one; pin, limits and origin pass on to the new version.

        Raises:
            ExpertError: The artifact is refused, or the name is taken by a base model.
        """
        self._check_name(name)
        async with self._lock:
            expert = await self._read(name, path)
            previous = self._experts.get(name)
            if previous and previous.request and previous.same_weights(expert):
                previous.take_over(expert)
                expert, previous = previous, None
            else:
                expert.request = lora_request(expert, self._models)
                expert.on_end = self.gate.moved
                expert.origin = previous.origin if previous else origin
                expert.limits = previous.limits if previous else Limits(ttl=self._ttl)
                await (self._worker.load if load else self._worker.check)(expert)
                if load:
                    self.gate.loaded(expert)
                self._experts[name] = expert
                self._versions[expert.request.lora_int_id] = expert
                self._requests[name] = expert.request
        if previous and previous.request:
            expert.pinned = pin or previous.pinned
            self._in_background(self._succeed(previous, expert))
        elif pin:
            await self.pin(name)
        return expert

    def _check_name(self, name: str) -> None:
        if self._models.is_base_model(name):
            raise ExpertError(f"{name!r} is the base model's name: choose another")
        try:
            check_expert_name(name)
        except ValueError as error:
            raise ExpertError(str(error)) from error

    async def _read(self, name: str, path: Path) -> Expert:
        try:
            return await asyncio.to_thread(read_expert, name, path, self._served)
        except (ValueError, OSError) as error:
            raise ExpertError(str(error)) from error
        except Exception as error:
            # Not foreseen: a fault of ours, which must keep neither the server nor the others from serving.
            logger.exception("deltamux: expert %r cannot be read", name)
            reason = f"{str(path)!r} cannot be read: {type(error).__name__}: {error}"
            raise ExpertError(reason) from error

    async def admit(self, expert: Expert) -> float:
        """Let a request of an expert into the engine once the expert is in a slot; it leaves by the gate.

        Returns:
            Seconds that it waited, 0.0 if its expert was there.

        Raises:
            ExpertError: It was refused, or has gone bad on disk.
        """
        if expert.error:
            raise ExpertError(f"expert {expert.name!r} is not available: {expert.error}")
        was_bad = bool(self.status_of(expert).error)
        waited = await self.gate.enter(expert)
        if was_bad:
            try:
                # What ran while it was gone left the base's keys in the cache under its name.
                await answered(self._engine, self._engine.reset_prefix_cache())
            except BaseException:
                self.gate.leave(expert)
                raise
        return waited

    def rest(self, expert: Expert) -> None:
        """Let an expert leave memory, if nothing needs it now."""
        if self.status_of(expert).tier != "disk":
            self.gate.rest(expert)

    async def pin(self, name: str) -> None:
        """Keep an expert in a slot.

        Raises:
            ExpertError: There is no such expert, or no slot to spare.
        """
        expert = self._existing(name)
        if expert.error:
            raise ExpertError(f"expert {name!r} is not available: {expert.error}")
        await self.gate.pin(expert)

    async def unpin(self, name: str) -> None:
        """Let an expert leave its slot when another needs it.

        Raises:
            ExpertError: There is no such expert, or the worker has gone.
        """
        expert = self._existing(name)
        if expert.request:
            await self.gate.unpin(expert)
        expert.pinned = False

    async def activate(self, name: str) -> None:
        """Bring an expert into a slot now, ahead of its next request.

        Raises:
            ExpertError: There is no such expert, or it is refused.
        """
        expert = self._existing(name)
        await self.admit(expert)
        self.gate.leave(expert)

    async def delete(self, name: str) -> None:
        """Stop offering an expert; its running requests end first.

        Raises:
            ExpertError: There is no such expert.
        """
        expert = self._experts.pop(name, None)
        if expert is None:
            raise ExpertError(f"there is no expert {name!r}")
        self._requests.pop(name, None)
        if expert.request:
            await self._drop(expert)

    def _existing(self, name: str) -> Expert:
        expert = self._experts.get(name)
        if expert is None:
            raise ExpertError(f"there is no expert {name!r}")
        return expert

    async def _succeed(self, previous: Expert, expert: Expert) -> None:
        """Retire a version; then its successor can have its pin."""
        await self._drop(previous)
        if expert.pinned and self._experts.get(expert.name) is expert:
            await self.pin(expert.name)

    async def _drop(self, expert: Expert) -> None:
        await expert.drained()
        await self.gate.drop(expert)
        await self._worker.remove(expert)
        self._versions.pop(expert.request.lora_int_id, None)

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
