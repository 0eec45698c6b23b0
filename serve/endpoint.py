"""Entry point of the `vllm.endpoint_plugins` group: deltamux on vLLM's own API server.

`attach_router` adds the routes under `/v1` (so that the API key guards them) and the response
headers; `init_state` puts the gateway in front of vLLM's handlers once they exist.
"""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from deltamux.compression.checkpoint.checkpoint import resolve_directory
from deltamux.serve import compat
from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.console import console_router
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.experts_api import experts_router
from deltamux.serve.api.handlers import Gateway, RoutedHandler
from deltamux.serve.api.headers import DecisionHeaders
from deltamux.serve.api.ready import ready_router
from deltamux.serve.api.router_api import routing_router
from deltamux.serve.api.state import ServerState
from deltamux.serve.names import AUTO, public_name
from deltamux.serve.observability import collector, spans
from deltamux.serve.observability.journal import Journal
from deltamux.serve.observability.memory import Memory
from deltamux.serve.settings import PluginSettings, plugin_settings


class DeltamuxEndpoint:
    """The endpoint plugin."""

    name = "deltamux"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and headers."""
        app.include_router(experts_router)
        app.include_router(ready_router)
        app.include_router(routing_router)
        app.include_router(console_router)
        app.add_middleware(DecisionHeaders)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load experts and router, and wrap vLLM's handlers."""
        if engine_client is None:
            return
        config = engine_client.vllm_config
        models = getattr(state, compat.MODELS_HANDLER)
        compat.check_server(engine_client, models)
        compat.check_one_device(config.parallel_config)
        _check_one_process(args)
        settings = plugin_settings(config.additional_config)
        registry = ExpertRegistry(engine_client, models, settings.slot.largest_rank)
        await registry.adopt()
        for expert in settings.experts:
            await registry.offer(expert.name, expert.path, expert.pin)
        route = _auto_route(settings, engine_client, registry)
        journal = Journal(settings.log_requests)
        gateway = Gateway(registry, route, models, journal)
        for attribute, method in compat.HANDLERS.items():
            handler = getattr(state, attribute, None)
            if handler is not None:
                setattr(state, attribute, RoutedHandler(handler, method, gateway))
        _list_everything(models, registry, has_router=settings.router is not None)
        collector.install(collector.Sources(registry, journal, Memory(config)))
        spans.install(config.observability_config)
        slots = config.lora_config.max_loras
        ServerState(settings, registry, route, journal, engine_client, slots).attach(state)


def _check_one_process(args: Namespace) -> None:
    count = getattr(args, "api_server_count", None) or 1
    if count > 1:
        raise ValueError(
            f"deltamux needs one API server process, got {count}: each would number the experts on "
            "its own"
        )


def _auto_route(
    settings: PluginSettings, engine_client: Any, registry: ExpertRegistry
) -> AutoRoute:
    """The router, over the tokenizer that serves."""
    model_config = engine_client.vllm_config.model_config
    return AutoRoute(
        settings.router,
        resolve_directory(model_config.tokenizer, model_config.tokenizer_revision),
        _encoder(engine_client),
        registry.serves,
        registry.residents,
    )


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
