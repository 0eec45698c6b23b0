"""vLLM's request handlers, with the expert chosen in front of them.

`Gateway.answer` is the main path of a request in the API process:
request → decision → admission (`gate.py`) → the expert's own template and defaults → vLLM.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

from deltamux.router.decide.decision import Decision
from deltamux.serve.api import surface
from deltamux.serve.api.asked import RequestError, conversations, field
from deltamux.serve.api.autoroute import AutoRoute, explicit
from deltamux.serve.api.expert import Expert, ExpertError
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.owners import Owners
from deltamux.serve.api.refusals import Refused, refusal, unavailable
from deltamux.serve.api.tenants import Tenant, current_tenant
from deltamux.serve.api.variants import specialise
from deltamux.serve.names import AUTO, BASE, UNKNOWN
from deltamux.serve.observability import metrics
from deltamux.serve.observability.engine_stats import RequestEngine
from deltamux.serve.observability.journal import Journal, RequestRecord

# Where the middleware leaves the time at which a request's first bytes had come, before its body was
# read and its turn on the event loop had come.
ARRIVAL = "deltamux_arrival"


class RoutedHandler:
    """Stands for a vLLM handler; methods that take a model's name go through the gateway, the rest is untouched.

    Args:
        handler: vLLM's handler.
        attribute: What it is called on `app.state`.
        gateway: Who decides.
    """

    def __init__(self, handler: Any, attribute: str, gateway: "Gateway") -> None:
        self._handler = handler
        generating = surface.HANDLERS.get(attribute)
        ways: list[tuple[Any, Sequence[str]]] = [
            (gateway.answer, (generating,) if generating else ()),
            (gateway.read, surface.READING.get(attribute, ())),
            (gateway.base_alone, surface.BASE_ONLY.get(attribute, ())),
            (gateway.owned, surface.OWNED.get(attribute, ())),
        ]
        for way, methods in ways:
            for method in methods:
                setattr(self, method, partial(way, handler, method))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the handler's own."""
        return getattr(self._handler, name)


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
        engine = RequestEngine(handler.engine_client, record, registry, stop_ids)
        return await self.on(registry.seen_by(handler, engine_client=engine))

    async def on(self, handler: Any) -> Any:
        """Make it on a handler."""
        given = () if self.raw_request is None else (self.raw_request,)
        return await getattr(handler, self.method)(self.request, *given)


class Gateway:
    """Chooses the expert of each request and hands it to vLLM.

    Args:
        registry: The experts.
        route: The router.
        models: vLLM's `openai_serving_models`, for the base's names.
        journal: Where each request is recorded.
        owners: Whose each response is.
        end_id: The token that the base's tokenizer ends an answer with.
    """

    def __init__(
        self,
        registry: ExpertRegistry,
        route: AutoRoute,
        models: Any,
        journal: Journal,
        *,
        owners: Owners,
        end_id: int | None = None,
    ) -> None:
        self._registry = registry
        self._route = route
        self._models = models
        self._journal = journal
        self._owners = owners
        self._end_id = end_id

    async def decide(
        self,
        model: str | None,
        request: Any,
        counted: bool = True,
        client_id: str | None = None,
    ) -> Decision:
        """The decision for a request; an unknown model name is left to vLLM's 404.

        Raises:
            Refused: The tenant may not use the model.
            RequestError: The request cannot be routed.
        """
        tenant = current_tenant.get()
        if model != AUTO:
            if tenant is not None and model and not self._may_use(tenant, model):
                metrics.tenant_refusals.labels(tenant.name, "expert").inc()
                words = f"the tenant {tenant.name!r} may not use the model {model!r}"
                raise Refused(words, HTTPStatus.FORBIDDEN, "PermissionDeniedError")
            return explicit(model if model and self._registry.get(model) else None)
        allowed = tenant.experts if tenant else None
        decision, seconds = await self._route.decide_aside(request, counted, allowed, client_id)
        if counted:
            metrics.router_decisions.labels(decision.domain, decision.reason).inc()
            metrics.router_seconds.observe(seconds)
            metrics.router_confidence.observe(decision.confidence)
        return decision

    def _may_use(self, tenant: Tenant, model: str) -> bool:
        return tenant.may_use(model) or self._models.is_base_model(model)

    async def answer(self, handler: Any, method: str, request: Any, raw_request: Any = None) -> Any:
        """Answer a request through vLLM's handler.

        Returns:
            What the handler returns: a response, an error, or an async generator of events.
        """
        arrival = getattr(getattr(raw_request, "state", None), ARRIVAL, None) or time.time()
        try:
            client_id = getattr(raw_request, "headers", {}).get("X-Request-Id")
            decision, expert = await self._chosen(request, client_id)
            self._check(request, expert)
        except (Refused, RequestError) as error:
            return refusal(error)
        known = expert or not request.model or self._models.is_base_model(request.model)
        if known and raw_request is not None:
            raw_request.state.deltamux = decision
        # A model's name that nobody configured is a client's text: it never becomes a label.
        label = expert.name if expert else BASE if known else UNKNOWN
        record = self._journal.begin(label, decision, arrival)
        if getattr(request, "use_beam_search", False):
            record.beam_prompts = len(conversations(request))
        call = Call(handler, method, request, raw_request)
        return await self._journal.follow(record, self._answer(record, expert, call))

    async def read(self, handler: Any, method: str, request: Any, raw_request: Any = None) -> Any:
        """Let vLLM's handler read a request as its expert would; nothing is generated and nothing counted."""
        try:
            _, expert = await self._chosen(request, counted=False)
        except (Refused, RequestError) as error:
            return refusal(error)
        variant = handler if expert is None else specialise(handler, expert)
        return await Call(handler, method, request, raw_request).on(self._registry.seen_by(variant))

    async def base_alone(
        self, handler: Any, method: str, request: Any, raw_request: Any = None
    ) -> Any:
        """Let vLLM's handler answer for the base; experts are refused by name."""
        if request.model == AUTO or self._registry.get(request.model or ""):
            return refusal(
                Refused(f"this route answers with the base alone, not with {request.model!r}")
            )
        if request.model == BASE:
            request.model = self._models.base_model_paths[0].name
        return await Call(handler, method, request, raw_request).on(handler)

    async def owned(self, handler: Any, method: str, response_id: str, **arguments: Any) -> Any:
        """Let vLLM's handler look up a response, where it is the client's."""
        if not self._owners.may_read(response_id, current_tenant.get()):
            words = f"Response with id '{response_id}' not found."
            return refusal(Refused(words, HTTPStatus.NOT_FOUND, "NotFoundError"))
        return await getattr(handler, method)(response_id, **arguments)

    async def _chosen(
        self, request: Any, client_id: str | None = None, counted: bool = True
    ) -> tuple[Decision, Expert | None]:
        """The decision for a request and its expert; the request names who answers from here on."""
        model = getattr(request, "model", None)
        decision = await self.decide(model, request, counted, client_id)
        expert = self._registry.get(decision.expert) if decision.expert else None
        if expert is not None:
            request.model = expert.name
        elif model in (AUTO, BASE):
            request.model = self._models.base_model_paths[0].name
        return decision, expert

    def _check(self, request: Any, expert: Expert | None) -> None:
        """Refuse what cannot be answered rightly, and keep tenants apart.

        Raises:
            Refused: With the reason.
        """
        stop_ids = set(expert.stop_ids) - {self._end_id} if expert else set()
        if stop_ids and getattr(request, "use_beam_search", False):
            raise Refused(
                f"beam search ends at the base's own end alone, and {request.model!r} also ends with "
                f"{sorted(stop_ids)}: ask it without use_beam_search"
            )
        tenant = current_tenant.get()
        if tenant is None:
            return
        if tenant.apart and hasattr(request, "cache_salt"):
            request.cache_salt = tenant.cache_salt(request.cache_salt)
        if field(request, "input") is None:
            return
        previous, name = field(request, "previous_response_id"), field(request, "request_id")
        if previous and not self._owners.may_read(previous, tenant):
            words = f"Response with id '{previous}' not found."
            raise Refused(words, HTTPStatus.NOT_FOUND, "NotFoundError")
        if isinstance(name, str):
            if self._owners.is_of_another(name, tenant):
                raise Refused(f"the request_id {name!r} is taken: leave it to the server")
            self._owners.note(name, tenant)

    async def _answer(self, record: RequestRecord, expert: Expert | None, call: Call) -> Any:
        if expert is None:
            return await call.through(call.handler, record, self._registry, [])
        expert.last_used = record.arrival
        record.at_end.append(expert.hold())
        try:
            record.swap_wait_seconds = await self._registry.admit(expert)
        except ExpertError as error:
            tenant = current_tenant.get()
            if tenant is None or tenant.admin:
                return unavailable(str(error))
            return unavailable(f"expert {expert.name!r} is not available")
        record.at_end.append(partial(self._registry.gate.leave, expert))
        if call.method not in expert.variants:
            expert.variants[call.method] = specialise(call.handler, expert)
        variant = expert.variants[call.method]
        return await call.through(variant, record, self._registry, expert.stop_ids)
