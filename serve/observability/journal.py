"""What happened to each request: one record from its arrival to the end of its response.

The gateway opens a record when it has decided who answers, vLLM's statistics fill it in while tokens
come (`engine_stats.py`), and it is closed when the response has ended, whichever way. A record feeds the
request metrics, the counts of waiting and running requests, the attributes of trace spans and, where
`log_requests` is set, one line of JSON. It never holds a prompt or an answer.
"""

import asyncio
import json
import logging
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from deltamux.router.decide.decision import Decision
from deltamux.serve import compat
from deltamux.serve.api.tenants import Tenant, current_tenant
from deltamux.serve.observability import metrics

OK, ABORTED, INVALID, UNAVAILABLE, ERROR = "ok", "aborted", "invalid", "unavailable", "error"
OUTCOMES = (OK, ABORTED, INVALID, UNAVAILABLE, ERROR)
# Status of a response whose client had left, as nginx numbers it; vLLM uses it likewise.
CLIENT_CLOSED = 499

request_log = logging.getLogger("deltamux.requests")


@dataclass(eq=False)
class RequestRecord:
    """One request.

    Attributes:
        expert: The metrics' label: a configured name, `base` or `unknown`.
        decision: Who answers, and why.
        arrival: Unix time at which the request came in.
        request_id: vLLM's id, as in the response; empty before it reached the engine.
        lora_id: The expert's version in the engine, None for the base.
        queue_seconds: From vLLM's queue to its first step; None before the first token.
        swap_wait_seconds: Spent on bringing its expert to the host cache and into a slot.
        ttft_seconds: From arrival to the first token; None before it.
        prompt_tokens: Tokens of its prompts, once they were computed.
        generated_tokens: Tokens made for it so far, over all its sequences.
        failure: How the engine ended it, if not well.
        outcome: One of `OUTCOMES`, None while it is open.
        at_end: What to call when it is closed.
        beam_prompts: Prompts of a beam search that are not counted yet; None: it is none.
        tenant: Whose request it is, None where nobody is asked.
    """

    expert: str
    decision: Decision
    arrival: float
    request_id: str = ""
    lora_id: int | None = None
    queue_seconds: float | None = None
    swap_wait_seconds: float = 0.0
    ttft_seconds: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failure: str | None = None
    outcome: str | None = None
    at_end: list[Callable[[], None]] = field(default_factory=list)
    beam_prompts: int | None = None
    tenant: Tenant | None = None

    @property
    def seconds(self) -> float:
        """Since its arrival; never below nought, though somebody may have set the clock back meanwhile."""
        return max(0.0, time.time() - self.arrival)

    def spend(self, kind: str, tokens: int) -> None:
        """Count tokens, `prompt` or `generated`; those that come behind the response's end are charged at once.

        A response that is made in the background ends before its first token.
        """
        if kind == "prompt":
            self.prompt_tokens += tokens
        else:
            self.generated_tokens += tokens
        if self.outcome is not None and self.tenant is not None:
            self.tenant.limits.spend(tokens)
            metrics.tenant_tokens.labels(self.tenant.name, kind).inc(tokens)

    def to_json(self) -> dict[str, Any]:
        """The fields of a log line."""
        return {
            "event": "request",
            "time": round(time.time(), 3),
            "request_id": self.request_id,
            "tenant": self.tenant.name if self.tenant else None,
            "expert": self.expert,
            "domain": self.decision.domain,
            "reason": self.decision.reason,
            "confidence": round(self.decision.confidence, 4),
            "outcome": self.outcome,
            "queue_seconds": _rounded(self.queue_seconds),
            "swap_wait_seconds": _rounded(self.swap_wait_seconds),
            "ttft_seconds": _rounded(self.ttft_seconds),
            "e2e_seconds": _rounded(self.seconds),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class Journal:
    """The records of a server.

    Args:
        log_requests: Whether each closed record is written to standard output as a line of JSON.
    """

    def __init__(self, log_requests: bool = False) -> None:
        self._log_requests = log_requests
        self._open: set[RequestRecord] = set()
        if log_requests and not request_log.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(message)s"))
            request_log.addHandler(handler)
            request_log.setLevel(logging.INFO)
            request_log.propagate = False

    def in_flight(self) -> dict[str, tuple[int, int]]:
        """By expert: requests that wait for their first token, and requests that have it."""
        counts: dict[str, tuple[int, int]] = {}
        for record in list(self._open):
            waiting, running = counts.get(record.expert, (0, 0))
            if record.ttft_seconds is None:
                waiting += 1
            else:
                running += 1
            counts[record.expert] = waiting, running
        return counts

    def begin(self, expert: str, decision: Decision, arrival: float) -> RequestRecord:
        """Open a record, and count the request."""
        record = RequestRecord(expert, decision, arrival, tenant=current_tenant.get())
        metrics.requests_total.labels(expert, decision.reason).inc()
        self._open.add(record)
        return record

    async def follow(self, record: RequestRecord, answer: Awaitable[Any]) -> Any:
        """Await vLLM's answer, and close the record when the response has ended.

        Returns:
            What the handler returns; a stream of events is followed to its end.
        """
        try:
            response = await answer
        except asyncio.CancelledError:
            self.close(record, ABORTED)
            raise
        except Exception as error:
            self.close(record, outcome_of(compat.error_status(error)))
            raise
        if isinstance(response, AsyncGenerator):
            stream = self._stream(record, response)
            # A stream that is dropped before its first event never runs any code of its own.
            weakref.finalize(stream, self.close, record, ABORTED).atexit = False
            return stream
        code = getattr(getattr(response, "error", None), "code", None)
        if isinstance(code, int):
            # vLLM answers a client that has left with a 400; the engine knows better.
            self.close(record, record.failure or outcome_of(code))
        else:
            self.close(record, OK)
        return response

    async def _stream(
        self, record: RequestRecord, events: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        try:
            async for event in events:
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            self.close(record, ABORTED)
            raise
        except Exception as error:
            self.close(record, outcome_of(compat.error_status(error)))
            raise
        # vLLM tells a failure within a stream by an event, not by an exception. Who reads a stream to
        # its end has not left, even if vLLM itself needed no more of the engine's output.
        failed = record.failure if record.failure != ABORTED else None
        self.close(record, failed or OK)

    def close(self, record: RequestRecord, outcome: str) -> None:
        """Count how a request ended, once."""
        if record.outcome is not None:
            return
        record.outcome = outcome
        self._open.discard(record)
        for done in record.at_end:
            done()
        reason = record.decision.reason
        metrics.request_outcomes.labels(record.expert, reason, outcome).inc()
        if outcome == OK:
            metrics.e2e_seconds.labels(record.expert).observe(record.seconds)
        _charge(record)
        if self._log_requests:
            request_log.info(json.dumps(record.to_json()))


def _charge(record: RequestRecord) -> None:
    """Take what a request was from what its tenant has."""
    if record.tenant is None:
        return
    name = record.tenant.name
    metrics.tenant_requests.labels(name, record.outcome).inc()
    metrics.tenant_tokens.labels(name, "prompt").inc(record.prompt_tokens)
    metrics.tenant_tokens.labels(name, "generated").inc(record.generated_tokens)
    record.tenant.limits.spend(record.prompt_tokens + record.generated_tokens)


def outcome_of(status: int) -> str:
    """The outcome that a response's HTTP status stands for."""
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return UNAVAILABLE
    if status == CLIENT_CLOSED:
        return ABORTED
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
        return ERROR
    return INVALID if status >= HTTPStatus.BAD_REQUEST else OK
