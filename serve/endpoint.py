"""Entry point of the `vllm.endpoint_plugins` group: deltamux on vLLM's own API server.

`attach_router` adds the routes under `/v1` (so that the API key guards them) and the response
headers; `init_state` puts the gateway in front of vLLM's handlers once they exist.
"""

import time
from argparse import Namespace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from deltamux.compression.checkpoint.checkpoint import resolve_directory
from deltamux.router.decide.decision import Decision
from deltamux.serve import compat
from deltamux.serve.api import ready
from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.expert import Expert, ExpertError
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.handlers import ARRIVAL, Gateway, RoutedHandler, error_response
from deltamux.serve.api.router_api import routing_router
from deltamux.serve.observability import collector, spans
from deltamux.serve.observability.journal import Journal
from deltamux.serve.observability.memory import Memory
from deltamux.serve.settings import AUTO, BASE, RESERVED_NAMES, ExpertName, plugin_settings
from deltamux.serve.status import read_status
from deltamux.serve.worker.host_cache import public_name

router = APIRouter(prefix="/v1")
HEADER_PREFIX = b"x-deltamux-"


class DeltamuxEndpoint:
    """The endpoint plugin."""

    name = "deltamux"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and headers."""
        app.include_router(router)
        app.include_router(ready.router)
        app.include_router(routing_router)
        app.add_middleware(DecisionHeaders)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load experts and router, and wrap vLLM's handlers."""
        if engine_client is None:
            return
        config = engine_client.vllm_config
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise ValueError(
                f"deltamux needs one API server process, got {args.api_server_count}: each would "
                "number the experts on its own"
            )
        compat.check_one_device(config.parallel_config)
        settings = plugin_settings(config.additional_config)
        models = getattr(state, compat.MODELS_HANDLER)
        registry = ExpertRegistry(engine_client, models)
        await registry.adopt()
        for expert in settings.experts:
            await registry.offer(expert.name, expert.path, expert.pin)
        model_config = config.model_config
        route = AutoRoute(
            settings.router,
            resolve_directory(model_config.tokenizer, model_config.tokenizer_revision),
            _encoder(engine_client),
            registry.serves,
            registry.residents,
        )
        journal = Journal(settings.log_requests)
        gateway = Gateway(registry, route, models, journal)
        for attribute, method in compat.HANDLERS.items():
            handler = getattr(state, attribute, None)
            if handler is not None:
                setattr(state, attribute, RoutedHandler(handler, method, gateway))
        _list_everything(models, registry, has_router=settings.router is not None)
        sources = collector.Sources(registry, journal, Memory(config))
        collector.install(sources)
        spans.install(config.observability_config)
        state.deltamux_registry, state.deltamux_route = registry, route
        state.deltamux_journal, state.deltamux_settings = journal, settings


def _encoder(engine_client: Any) -> Any:
    tokenizer = engine_client.renderer.tokenizer

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return encode


def _list_everything(models: Any, registry: ExpertRegistry, has_router: bool) -> None:
    """Make `GET /v1/models` list base, `auto` and experts, and responses carry public names."""
    model_card = compat.protocol("ModelCard")
    show_base = models.registry.show_available_models
    base = models.base_model_paths[0].name

    async def show_available_models() -> Any:
        listed = await show_base()
        if has_router:
            listed.data.append(model_card(id=AUTO, root=AUTO, parent=base, owned_by="deltamux"))
        for expert in registry:
            if expert.error is None:
                card = model_card(
                    id=expert.name, root=str(expert.path), parent=base, owned_by="deltamux"
                )
                listed.data.append(card)
        return listed

    def model_name(lora_request: Any = None) -> str:
        return base if lora_request is None else public_name(lora_request.lora_name)

    models.show_available_models = show_available_models
    models.model_name = model_name


class DecisionHeaders:
    """ASGI middleware: when a request came in; who answered, and why, as response headers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Note the arrival; add headers to responses of requests that were decided on."""
        scope.setdefault("state", {})[ARRIVAL] = time.time()

        async def send_with_headers(message: Any) -> None:
            decision = scope.get("state", {}).get("deltamux")
            if message["type"] == "http.response.start" and decision is not None:
                message["headers"] = [*message.get("headers", []), *_headers(decision)]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _headers(decision: Decision) -> list[tuple[bytes, bytes]]:
    fields = {
        "expert": decision.expert or BASE,
        "domain": decision.domain,
        "confidence": f"{decision.confidence:.4f}",
        "reason": decision.reason,
    }
    return [(HEADER_PREFIX + key.encode(), _header_value(value)) for key, value in fields.items()]


def _header_value(text: str) -> bytes:
    """Visible ASCII; a domain's name comes from training data and may hold anything."""
    return "".join(c if " " <= c <= "~" else "?" for c in text).encode()


class RegisterBody(BaseModel):
    """`POST /v1/experts`."""

    model_config = ConfigDict(extra="forbid")

    name: ExpertName
    path: Path
    pin: bool = False


def _registry(request: Request) -> ExpertRegistry:
    registry: ExpertRegistry = request.app.state.deltamux_registry
    return registry


def _describe(expert: Expert, request: Request) -> dict[str, Any]:
    status = read_status()
    journal: Journal = request.app.state.deltamux_journal
    waiting, running = journal.in_flight().get(expert.name, (0, 0))
    seen = expert.request and status.experts.get(expert.request.lora_int_id)
    return {
        "id": expert.name,
        "object": "expert",
        "path": str(expert.path),
        "content": expert.content or None,
        "tier": seen.tier if seen else "disk",
        "slot": seen.slot if seen else None,
        "pinned": bool(seen and seen.pinned),
        "bytes": expert.num_bytes,
        "bits_per_weight": expert.bits_per_weight,
        "last_used": expert.last_used,
        "running": running,
        "waiting": waiting,
        "error": expert.error or (seen.error if seen else None),
    }


def _failure(message: str, status: HTTPStatus) -> JSONResponse:
    kind = "NotFoundError" if status is HTTPStatus.NOT_FOUND else "BadRequestError"
    body = error_response(message, status, kind)
    return JSONResponse(body.model_dump(), status_code=status.value)


def _missing(name: str) -> JSONResponse:
    return _failure(f"The expert `{name}` does not exist.", HTTPStatus.NOT_FOUND)


@router.get("/experts")
async def list_experts(request: Request) -> JSONResponse:
    """All experts with their residency."""
    data = [_describe(expert, request) for expert in _registry(request)]
    return JSONResponse({"object": "list", "data": data})


@router.post("/experts")
async def register_expert(body: RegisterBody, request: Request) -> JSONResponse:
    """Load an expert, or a new version of one."""
    if body.name in RESERVED_NAMES:
        return _failure(f"an expert cannot be called {body.name!r}", HTTPStatus.BAD_REQUEST)
    try:
        expert = await _registry(request).register(body.name, body.path, body.pin)
    except ExpertError as error:
        return _failure(str(error), HTTPStatus.BAD_REQUEST)
    content = _describe(expert, request)
    return JSONResponse(content, status_code=HTTPStatus.CREATED.value)


@router.get("/experts/{name}")
async def get_expert(name: str, request: Request) -> JSONResponse:
    """One expert."""
    expert = _registry(request).get(name)
    return JSONResponse(_describe(expert, request)) if expert else _missing(name)


@router.delete("/experts/{name}")
async def delete_expert(name: str, request: Request) -> JSONResponse:
    """Stop offering an expert; answers once its running requests have ended."""
    if _registry(request).get(name) is None:
        return _missing(name)
    await _registry(request).delete(name)
    return JSONResponse({"id": name, "object": "expert", "deleted": True})


@router.post("/experts/{name}/pin")
async def pin_expert(name: str, request: Request) -> JSONResponse:
    """Keep an expert in a slot."""
    expert = _registry(request).get(name)
    if expert is None:
        return _missing(name)
    try:
        await _registry(request).pin(name)
    except ExpertError as error:
        return _failure(str(error), HTTPStatus.BAD_REQUEST)
    return JSONResponse(_describe(expert, request))
