"""vLLM's request handlers, with the expert chosen in front of them.

`Gateway.answer` is the main path of a request in the API process:
request → decision → admission (host cache) → the expert's own template and defaults → vLLM.
"""

import copy
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from deltamux.router.decision import REASON_EXPLICIT, REASON_ROUTER_ERROR, Decision
from deltamux.serve import metrics
from deltamux.serve.autoroute import AutoRoute, explicit
from deltamux.serve.experts import Expert, ExpertError, ExpertRegistry
from deltamux.serve.settings import AUTO, BASE

logger = logging.getLogger("vllm.deltamux")


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


class Gateway:
    """Chooses the expert of each request and hands it to vLLM.

    Args:
        registry: The experts.
        route: The router.
        base_name: The base's served name.
    """

    def __init__(self, registry: ExpertRegistry, route: AutoRoute, base_name: str) -> None:
        self._registry = registry
        self._route = route
        self._base_name = base_name

    def decide(self, request: Any) -> Decision:
        """The decision for a request; an unknown model name is left to vLLM's 404."""
        model = request.get("model") if isinstance(request, dict) else request.model
        if model != AUTO:
            return explicit(model if model and self._registry.get(model) else None)
        decision, seconds = self._route.decide(request)
        expert = self._registry.get(decision.expert) if decision.expert else None
        if decision.expert and (expert is None or expert.error):
            logger.error("deltamux: the router chose %r, which is not served", decision.expert)
            decision = replace(decision, expert=None, reason=REASON_ROUTER_ERROR)
        metrics.router_decisions.labels(decision.domain, decision.reason).inc()
        metrics.router_seconds.observe(seconds)
        metrics.router_confidence.observe(decision.confidence)
        return decision

    async def answer(self, handler: Any, method: str, request: Any, raw_request: Any) -> Any:
        """Answer a request through vLLM's handler.

        Returns:
            What the handler returns: a response, an error, or an async generator of events.
        """
        decision = self.decide(request)
        expert = self._registry.get(decision.expert) if decision.expert else None
        if decision.reason != REASON_EXPLICIT:
            request.model = expert.name if expert else self._base_name
        elif expert is None and request.model == BASE:
            request.model = self._base_name
        known = expert is not None or not request.model or request.model == self._base_name
        if known:
            metrics.requests_total.labels(expert.name if expert else BASE, decision.reason).inc()
            if raw_request is not None:
                raw_request.state.deltamux = decision
        if expert is None:
            return await getattr(handler, method)(request, raw_request)
        try:
            await self._registry.admit(expert)
        except ExpertError as error:
            return unavailable(str(error))
        return await self._answer_as(expert, handler, method, request, raw_request)

    async def _answer_as(
        self, expert: Expert, handler: Any, method: str, request: Any, raw_request: Any
    ) -> Any:
        expert.enter()
        try:
            if method not in expert.variants:
                expert.variants[method] = specialise(handler, expert)
            result = await getattr(expert.variants[method], method)(request, raw_request)
        except BaseException:
            expert.leave()
            raise
        if isinstance(result, AsyncGenerator):
            return _until_end(result, expert)
        expert.leave()
        return result


def specialise(handler: Any, expert: Expert) -> Any:
    """A shallow copy of a vLLM handler that speaks for one expert.

    vLLM keeps template and sampling defaults on the handler, one set for the whole server; a copy
    shares everything else.
    """
    variant = copy.copy(handler)
    configured = getattr(handler.model_config, "generation_config", "auto")
    if configured == "auto":
        override = getattr(handler.model_config, "override_generation_config", None) or {}
        variant.default_sampling_params = {**expert.generation, **override}
    if expert.chat_template and getattr(handler, "online_renderer", None) is not None:
        variant.online_renderer = copy.copy(handler.online_renderer)
        variant.online_renderer.chat_template = expert.chat_template
        variant.chat_template = expert.chat_template
    if expert.stop_ids:
        variant.engine_client = StoppingEngine(handler.engine_client, expert.stop_ids)
    return variant


class StoppingEngine:
    """vLLM's engine client; generations also end at an expert's own end-of-sequence tokens."""

    def __init__(self, engine: Any, stop_ids: list[int]) -> None:
        self._engine = engine
        self._stop_ids = stop_ids

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self._engine, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate, with the stop tokens added unless the client ignores end-of-sequence."""
        if not sampling_params.ignore_eos:
            known = sampling_params.stop_token_ids or []
            sampling_params.stop_token_ids = sorted({*known, *self._stop_ids})
            sampling_params._all_stop_token_ids.update(self._stop_ids)
        return self._engine.generate(prompt, sampling_params, *args, **kwargs)


async def _until_end(events: AsyncGenerator[Any, None], expert: Expert) -> AsyncIterator[Any]:
    try:
        async for event in events:
            yield event
    finally:
        expert.leave()


def unavailable(message: str) -> Any:
    """Service unavailable (503), in vLLM's error body."""
    return error_response(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")


def error_response(message: str, status: HTTPStatus, kind: str) -> Any:
    """An error in the OpenAI body that vLLM's routes return."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    return ErrorResponse(error=ErrorInfo(message=message, type=kind, code=status.value))
