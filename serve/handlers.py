"""vLLM's request handlers, with the expert chosen in front of them.

`Gateway.answer` is the main path of a request in the API process:
request → decision → admission (host cache) → the expert's own template and defaults → vLLM.
"""

import copy
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from http import HTTPStatus
from typing import Any

from deltamux.router.decision import Decision
from deltamux.serve import compat, metrics
from deltamux.serve.autoroute import AutoRoute, explicit
from deltamux.serve.expert import Expert, ExpertError
from deltamux.serve.experts import ExpertRegistry
from deltamux.serve.settings import AUTO, BASE

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


class Gateway:
    """Chooses the expert of each request and hands it to vLLM.

    Args:
        registry: The experts.
        route: The router.
        models: vLLM's `openai_serving_models`, for the base's names.
    """

    def __init__(self, registry: ExpertRegistry, route: AutoRoute, models: Any) -> None:
        self._registry = registry
        self._route = route
        self._models = models

    def decide(self, model: str | None, request: Any) -> Decision:
        """The decision for a request; an unknown model name is left to vLLM's 404."""
        if model != AUTO:
            return explicit(model if model and self._registry.get(model) else None)
        decision, seconds = self._route.decide(request)
        metrics.router_decisions.labels(decision.domain, decision.reason).inc()
        metrics.router_seconds.observe(seconds)
        metrics.router_confidence.observe(decision.confidence)
        return decision

    async def answer(self, handler: Any, method: str, request: Any, raw_request: Any) -> Any:
        """Answer a request through vLLM's handler.

        Returns:
            What the handler returns: a response, an error, or an async generator of events.
        """
        decision = self.decide(request.model, request)
        expert = self._registry.get(decision.expert) if decision.expert else None
        if expert is not None:
            request.model = expert.name
        elif request.model in (AUTO, BASE):
            request.model = self._models.base_model_paths[0].name
        if expert or not request.model or self._models.is_base_model(request.model):
            metrics.requests_total.labels(expert.name if expert else BASE, decision.reason).inc()
            if raw_request is not None:
                raw_request.state.deltamux = decision
        if expert is None:
            return await getattr(handler, method)(request, raw_request)
        with expert.held():
            try:
                await self._registry.admit(expert)
            except ExpertError as error:
                return unavailable(str(error))
            if method not in expert.variants:
                expert.variants[method] = specialise(handler, expert, self._registry)
            return await getattr(expert.variants[method], method)(request, raw_request)


def specialise(handler: Any, expert: Expert, registry: ExpertRegistry) -> Any:
    """A shallow copy of a vLLM handler that speaks for one expert.

    vLLM keeps template and sampling defaults on the handler, one set for the whole server; a copy
    shares everything else.
    """
    variant = copy.copy(handler)
    if getattr(handler.model_config, "generation_config", "auto") == "auto":
        override = getattr(handler.model_config, "override_generation_config", None) or {}
        variant.default_sampling_params = sampling_defaults(expert.generation | override)
    if expert.chat_template and getattr(handler, "online_renderer", None) is not None:
        variant.online_renderer = copy.copy(handler.online_renderer)
        variant.online_renderer.chat_template = expert.chat_template
        variant.chat_template = expert.chat_template
    variant.engine_client = ExpertEngine(handler.engine_client, expert.stop_ids, registry)
    return variant


def sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters in a generation_config.json, under vLLM's names."""
    found = {key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found


class ExpertEngine:
    """vLLM's engine client; it counts generations, which also end at an expert's own stop tokens."""

    def __init__(self, engine: Any, stop_ids: list[int], registry: ExpertRegistry) -> None:
        self._engine = engine
        self._stop_ids = stop_ids
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Generate, with the stop tokens added unless the client ignores end-of-sequence."""
        if self._stop_ids and not sampling_params.ignore_eos:
            known = sampling_params.stop_token_ids or []
            sampling_params.stop_token_ids = sorted({*known, *self._stop_ids})
            sampling_params._all_stop_token_ids.update(self._stop_ids)
        request = kwargs.get("lora_request")
        version = self._registry.version(request.lora_int_id) if request else None
        with version.generating() if version else nullcontext():
            async for output in self._engine.generate(prompt, sampling_params, *args, **kwargs):
                yield output


def unavailable(message: str) -> Any:
    """Service unavailable (503), in vLLM's error body."""
    return error_response(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")


def error_response(message: str, status: HTTPStatus, kind: str) -> Any:
    """An error in the OpenAI body that vLLM's routes return."""
    info = compat.protocol("ErrorInfo")(message=message, type=kind, code=status.value)
    return compat.protocol("ErrorResponse")(error=info)
