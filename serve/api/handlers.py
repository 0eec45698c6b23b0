"""vLLM's request handlers, with the expert chosen in front of them.

`Gateway.answer` is the main path of a request in the API process:
request → decision → admission (host cache) → the expert's own template and defaults → vLLM.
"""

import copy
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from deltamux.router.decide.decision import Decision
from deltamux.serve import compat
from deltamux.serve.api.asked import RequestError
from deltamux.serve.api.autoroute import AutoRoute, explicit
from deltamux.serve.api.expert import Expert, ExpertError
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.names import AUTO, BASE, UNKNOWN
from deltamux.serve.observability import metrics
from deltamux.serve.observability.engine_stats import RequestEngine
from deltamux.serve.observability.journal import Journal, RequestRecord

# Where the middleware leaves the time at which a request's first bytes had come, before its body was
# read and its turn on the event loop had come.
ARRIVAL = "deltamux_arrival"
# What vLLM reads from a generation_config.json.
GENERATION_KEYS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)


class RoutedHandler:
    """Stands for a vLLM handler; one method goes through the gateway, the rest is untouched.

    Args:
        handler: vLLM's handler.
        method: Name of the method that answers a request.
        gateway: Who decides.
    """

    def __init__(self, handler: Any, method: str, gateway: "Gateway") -> None:
        self._handler = handler
        self._gateway = gateway
        self._method = method
        setattr(self, method, self._answer)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the handler's own."""
        return getattr(self._handler, name)

    async def _answer(self, request: Any, raw_request: Any = None) -> Any:
        return await self._gateway.answer(self._handler, self._method, request, raw_request)


@dataclass(frozen=True)
class Call:
    """One call of a vLLM handler's method."""

    handler: Any
    method: str
    request: Any
    raw_request: Any

    async def through(
        self, handler: Any, record: RequestRecord, registry: ExpertRegistry, stop_ids: list[int]
    ) -> Any:
        """Make it on a copy of a handler that has an engine of the request's own."""
        bound = copy.copy(handler)
        bound.engine_client = RequestEngine(handler.engine_client, record, registry, stop_ids)
        return await getattr(bound, self.method)(self.request, self.raw_request)


class Gateway:
    """Chooses the expert of each request and hands it to vLLM.

    Args:
        registry: The experts.
        route: The router.
        models: vLLM's `openai_serving_models`, for the base's names.
        journal: Where each request is recorded.
    """

    def __init__(
        self, registry: ExpertRegistry, route: AutoRoute, models: Any, journal: Journal
    ) -> None:
        self._registry = registry
        self._route = route
        self._models = models
        self._journal = journal

    async def decide(
        self, model: str | None, request: Any, client_id: str | None = None
    ) -> Decision:
        """The decision for a request; an unknown model name is left to vLLM's 404."""
        if model != AUTO:
            return explicit(model if model and self._registry.get(model) else None)
        decision, seconds = await self._route.decide_aside(request, client_id=client_id)
        metrics.router_decisions.labels(decision.domain, decision.reason).inc()
        metrics.router_seconds.observe(seconds)
        metrics.router_confidence.observe(decision.confidence)
        return decision

    async def answer(self, handler: Any, method: str, request: Any, raw_request: Any) -> Any:
        """Answer a request through vLLM's handler.

        Returns:
            What the handler returns: a response, an error, or an async generator of events.
        """
        arrival = getattr(getattr(raw_request, "state", None), ARRIVAL, None) or time.time()
        try:
            client_id = getattr(raw_request, "headers", {}).get("X-Request-Id")
            decision = await self.decide(request.model, request, client_id)
        except RequestError as error:
            return error_response(str(error), HTTPStatus.BAD_REQUEST, "BadRequestError")
        expert = self._registry.get(decision.expert) if decision.expert else None
        if expert is not None:
            request.model = expert.name
        elif request.model in (AUTO, BASE):
            request.model = self._models.base_model_paths[0].name
        known = expert or not request.model or self._models.is_base_model(request.model)
        if known and raw_request is not None:
            raw_request.state.deltamux = decision
        # A model's name that nobody configured is a client's text: it never becomes a label.
        label = expert.name if expert else BASE if known else UNKNOWN
        record = self._journal.begin(label, decision, arrival)
        call = Call(handler, method, request, raw_request)
        return await self._journal.follow(record, self._answer(record, expert, call))

    async def _answer(self, record: RequestRecord, expert: Expert | None, call: Call) -> Any:
        if expert is None:
            return await call.through(call.handler, record, self._registry, [])
        expert.last_used = record.arrival
        with expert.held():
            try:
                record.swap_wait_seconds = await self._registry.admit(expert)
            except ExpertError as error:
                return unavailable(str(error))
            if call.method not in expert.variants:
                expert.variants[call.method] = specialise(call.handler, expert)
            variant = expert.variants[call.method]
            return await call.through(variant, record, self._registry, expert.stop_ids)


def specialise(handler: Any, expert: Expert) -> Any:
    """A shallow copy of a vLLM handler that speaks for one expert.

    vLLM keeps template and sampling defaults on the handler, one set for the whole server; a copy
    shares everything else.
    """
    variant = copy.copy(handler)
    if getattr(handler.model_config, "generation_config", "auto") == "auto":
        override = getattr(handler.model_config, "override_generation_config", None) or {}
        variant.default_sampling_params = sampling_defaults(expert.generation_config | override)
    if expert.chat_template and getattr(handler, "online_renderer", None) is not None:
        variant.online_renderer = copy.copy(handler.online_renderer)
        variant.online_renderer.chat_template = expert.chat_template
        variant.chat_template = expert.chat_template
    return variant


def sampling_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters in a generation_config.json, under vLLM's names."""
    found = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found


def unavailable(message: str) -> Any:
    """Service unavailable (503), in vLLM's error body."""
    return error_response(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")


def error_response(message: str, status: HTTPStatus, kind: str) -> Any:
    """An error in the OpenAI body that vLLM's routes return."""
    info = compat.protocol("ErrorInfo")(message=message, type=kind, code=status.value)
    return compat.protocol("ErrorResponse")(error=info)
