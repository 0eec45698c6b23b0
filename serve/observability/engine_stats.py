"""Latencies and tokens per expert, measured where vLLM measures its own.

Three methods of vLLM are wrapped. `OutputProcessor.add_request` runs in the task of the request and so
sees whose record is current; it leaves the record on the statistics object of each sequence. Two
methods of `IterationStats` see that object with every engine output, streaming or not:

    ttft = first output − arrival at the server          once a request
    itl  = output − previous output                      each later output of a sequence
    queue = first scheduled − queued                      from the engine's own clock
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

from deltamux.serve import compat
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.names import BASE, public_name
from deltamux.serve.observability import metrics
from deltamux.serve.observability.journal import ABORTED, ERROR, RequestRecord, outcome_of
from deltamux.serve.status import read_status

current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)


class RequestEngine:
    """vLLM's engine client as one request sees it.

    It names the request's record to the statistics, counts generations of an expert's version, and
    adds the expert's own stop tokens.

    Args:
        engine: vLLM's engine client.
        record: The request's.
        registry: The experts.
        stop_ids: End-of-sequence ids of the expert.
    """

    def __init__(
        self,
        engine: Any,
        record: RequestRecord,
        registry: ExpertRegistry,
        stop_ids: list[int],
    ) -> None:
        self._engine = engine
        self._record = record
        self._registry = registry
        self._stop_ids = stop_ids

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Generate, with the stop tokens added unless the client ignores end-of-sequence."""
        record = self._record
        if self._stop_ids and not sampling_params.ignore_eos:
            known = sampling_params.stop_token_ids or []
            sampling_params.stop_token_ids = sorted({*known, *self._stop_ids})
            sampling_params._all_stop_token_ids.update(self._stop_ids)
        request = kwargs.get("lora_request")
        version = self._registry.version(request.lora_int_id) if request else None
        record.request_id = record.request_id or request_id
        record.lora_id = request.lora_int_id if request else None
        if version is not None:
            prompt = salted(prompt, version.content)
            if self._registry.vllm_orders:
                kwargs["priority"] = kwargs.get("priority", 0) + version.limits.priority
        outputs = self._engine.generate(prompt, sampling_params, request_id, *args, **kwargs)
        with version.generating() if version else nullcontext():
            try:
                # vLLM registers the request in the first step; each step may be a task of its own.
                mark = current_record.set(record)
                try:
                    first = await anext(outputs, None)
                finally:
                    current_record.reset(mark)
                if first is not None:
                    _note_failure(record, first)
                    yield first
                    async for output in outputs:
                        _note_failure(record, output)
                        yield output
            except (GeneratorExit, asyncio.CancelledError):
                record.failure = ABORTED
                raise
            except Exception as error:
                record.failure = outcome_of(compat.error_status(error))
                raise
            finally:
                await outputs.aclose()


def salted(prompt: Any, content: str) -> Any:
    """A prompt whose keys and values no cache mixes with those of other weights.

    vLLM's own prefix cache tells experts apart by name and path; a cache outside of it may know tokens and salt
    alone. What the client salts with stays part of it.
    """
    if not isinstance(prompt, dict):
        return prompt
    return {**prompt, "cache_salt": content + (prompt.get("cache_salt") or "")}


def _note_failure(record: RequestRecord, output: Any) -> None:
    """Keep that a request's own step failed: vLLM says so by the reason of its last output."""
    if output.finished and any(each.finish_reason == ERROR for each in output.outputs):
        record.failure = ERROR


def install(speculative: bool = False) -> None:
    """Wrap vLLM's methods; harmless when called again.

    Args:
        speculative: Whether tokens are drafted, so that acceptance is counted.
    """
    processor: Any = compat.symbol(*compat.OUTPUT)
    stats: Any = compat.symbol(*compat.STATS)
    if hasattr(stats.update_from_output, "deltamux"):
        return
    processor.add_request = _marking(processor.add_request)
    stats.update_from_output = _observing(stats.update_from_output, speculative)


def _marking(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.add_request`, leaving the current record on the statistics it makes."""
    names = list(inspect.signature(add_request).parameters)

    def marked(*args: Any, **kwargs: Any) -> Any:
        added = add_request(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        state = given["self"].request_states.get(given["request"].request_id)
        stats = getattr(state, "stats", None)
        if stats is not None and not hasattr(stats, "deltamux_record"):
            stats.deltamux_record = current_record.get()
            # The sequences of one request share its prompt.
            first = given.get("request_index", 0) == 0
            stats.deltamux_prompt_tokens = _prompt_tokens(stats.deltamux_record, state, first)
        return added

    return marked


def _prompt_tokens(record: RequestRecord | None, state: Any, first: bool) -> int:
    """Tokens of a prompt that is new: a beam's steps come as prompts of their own, each a token longer."""
    if not first:
        return 0
    if record is None or record.beam_prompts is None:
        return int(state.prompt_len)
    record.beam_prompts -= 1
    return int(state.prompt_len) if record.beam_prompts >= 0 else 0


def _observing(update_from_output: Callable[..., Any], speculative: bool) -> Callable[..., Any]:
    """`IterationStats.update_from_output`, observing per expert what vLLM observes in sum."""
    # Releases differ in the order of these arguments, not in their names.
    names = list(inspect.signature(update_from_output).parameters)

    def observed(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        stats = given["req_stats"]
        previous = stats.last_token_ts
        update_from_output(*args, **kwargs)
        record = getattr(stats, "deltamux_record", None)
        label = record.expert if record else expert_label(given["lora_name"])
        if given["is_prefilling"]:
            _first_token(label, record, stats, given["self"].iteration_timestamp)
        else:
            metrics.itl_seconds.labels(label).observe(given["engine_core_timestamp"] - previous)
        generated = len(given["output"].new_token_ids)
        if speculative and generated and not given["is_prefilling"]:
            # A step gives one token of its own, and the drafted ones that it accepted before it.
            metrics.speculative_steps.labels(label).inc()
            metrics.speculative_accepted.labels(label).inc(generated - 1)
        metrics.tokens_total.labels(label, "generated").inc(generated)
        if record is not None:
            record.spend("generated", generated)

    observed.deltamux = True  # type: ignore[attr-defined]
    return observed


def _first_token(label: str, record: RequestRecord | None, stats: Any, now: float) -> None:
    prompt_tokens = getattr(stats, "deltamux_prompt_tokens", 0)
    metrics.tokens_total.labels(label, "prompt").inc(prompt_tokens)
    if record is None:
        metrics.ttft_seconds.labels(label).observe(stats.first_token_latency)
        return
    record.spend("prompt", prompt_tokens)
    if record.ttft_seconds is not None:
        return
    # Wall clocks both: somebody may have set them back meanwhile.
    record.ttft_seconds = max(0.0, now - record.arrival)
    record.queue_seconds = stats.scheduled_ts - stats.queued_ts
    metrics.ttft_seconds.labels(label).observe(record.ttft_seconds)
    if record.lora_id is not None:
        record.swap_wait_seconds += _swap_in_step(record.lora_id, stats)
        metrics.swap_wait_seconds.labels(label).observe(record.swap_wait_seconds)


def _swap_in_step(lora_id: int, stats: Any) -> float:
    """How long a request's first step waited for its expert to enter a slot, seconds.

    The move counts if it ended between the request's first schedule and its first token; the worker
    and the engine read the same clock. 0.0 if the expert was there.
    """
    seen = read_status().experts.get(lora_id)
    if seen is None or not stats.scheduled_ts <= seen.swapped_at <= stats.first_token_ts:
        return 0.0
    return seen.swap_seconds


def expert_label(lora_name: str | None) -> str:
    """The value of the label `expert` for a generation that no gateway has seen."""
    return BASE if lora_name is None else public_name(lora_name)
