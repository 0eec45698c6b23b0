"""Entry point of the `vllm.endpoint_plugins` group: deltamux on vLLM's own API server.

`attach_router` adds the routes under `/v1` (so that the API key guards them) and the response
headers; `init_state` puts the gateway in front of vLLM's handlers once they exist.
"""

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from deltamux.compression.paths import resolve_directory
from deltamux.serve import compat
from deltamux.serve.api import surface
from deltamux.serve.api.autoroute import AutoRoute
from deltamux.serve.api.console import console_router
from deltamux.serve.api.expert import Expert, Served
from deltamux.serve.api.experts import ExpertRegistry
from deltamux.serve.api.experts_api import experts_router, sees_paths
from deltamux.serve.api.guard import Doors, Guard
from deltamux.serve.api.handlers import Gateway, RoutedHandler
from deltamux.serve.api.headers import DecisionHeaders
from deltamux.serve.api.invocations import Invocations
from deltamux.serve.api.liveness import end_with_error
from deltamux.serve.api.offers import offer_all
from deltamux.serve.api.owners import Owners
from deltamux.serve.api.ready import ready_router
from deltamux.serve.api.roots import Roots
from deltamux.serve.api.router_api import routing_router
from deltamux.serve.api.saved import SavedExperts
from deltamux.serve.api.state import ServerState
from deltamux.serve.api.tenants import current_tenant
from deltamux.serve.api.tenants_api import tenants_router
from deltamux.serve.names import AUTO, public_name
from deltamux.serve.observability import collector, spans
from deltamux.serve.observability.journal import Journal
from deltamux.serve.observability.memory import Memory
from deltamux.serve.settings import MULTIPROCESS_VARIABLE, PluginSettings, plugin_settings

# On `app.state`, from the making of the application to its start.
DOORS = "deltamux_doors"


class DeltamuxEndpoint:
    """The endpoint plugin."""

    name = "deltamux"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes, headers and the check of keys; the last middleware is the first to see a request."""
        routers = (experts_router, ready_router, routing_router, tenants_router, console_router)
        for router in routers:
            app.include_router(router)
        setattr(app.state, DOORS, _doors(app.state.args))
        app.add_middleware(Invocations)
        app.add_middleware(Guard, doors=getattr(app.state, DOORS))
        app.add_middleware(DecisionHeaders)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load experts and router, and wrap vLLM's handlers."""
        if engine_client is None:
            return
        config = engine_client.vllm_config
        models = getattr(state, compat.MODELS_HANDLER)
        compat.check_server(engine_client, models)
        compat.check_parallel(config.parallel_config)
        _check_one_process(args)
        settings = plugin_settings(config.additional_config)
        served = _served(settings, engine_client)
        registry = ExpertRegistry(engine_client, models, served, settings.slot_wait, settings.ttl)
        saved = SavedExperts(settings.state)
        await offer_all(settings, registry, saved)
        route = _auto_route(settings, engine_client, registry)
        journal = Journal(settings.log_requests)
        owners, doors = Owners(), getattr(state, DOORS)
        _check_stats(doors, args)
        end_id = engine_client.renderer.tokenizer.eos_token_id
        gateway = Gateway(registry, route, models, journal, owners=owners, end_id=end_id)
        for attribute in surface.ROUTED:
            handler = getattr(state, attribute, None)
            if handler is not None:
                setattr(state, attribute, RoutedHandler(handler, attribute, gateway))
        _list_everything(models, registry, has_router=settings.router is not None)
        drafts = config.speculative_config is not None
        collector.install(collector.Sources(registry, journal, Memory(config), drafts))
        spans.install(config.observability_config)
        end_with_error(engine_client)
        roots = Roots(settings.folders)
        ServerState(
            *(settings, registry, route, journal, engine_client, owners, doors, roots, saved)
        ).attach(state)


def _doors(args: Namespace) -> Doors:
    """Whose keys open the server; vLLM's own check of its keys, which would turn tenants away, has nothing to do then."""
    settings = plugin_settings(args.additional_config)
    api_keys = [key for key in (args.api_key or [os.environ.get(compat.API_KEY_VARIABLE)]) if key]
    args.api_key = [""]
    return Doors(settings.tenants, api_keys, settings.metrics == "open")


def _check_stats(doors: Doors, args: Namespace) -> None:
    """Refuse limits of tokens where nobody counts tokens."""
    if getattr(args, "disable_log_stats", False) and any(
        t.counts_tokens for t in doors.keys.tenants
    ):
        raise ValueError("tokens_per_minute needs vLLM's statistics: drop --disable-log-stats")


def _check_one_process(args: Namespace) -> None:
    if MULTIPROCESS_VARIABLE in os.environ:
        raise ValueError(
            f"{MULTIPROCESS_VARIABLE} is set, by which metrics of gauges and at scrapes get lost: unset it; "
            "deltamux has one API server process"
        )
    count = getattr(args, "api_server_count", None) or 1
    if count > 1:
        raise ValueError(
            f"deltamux needs one API server process, got {count}: each would number the experts on "
            "its own"
        )


def _served(settings: PluginSettings, engine_client: Any) -> Served:
    """What experts are held against."""

    def token_id(token: str) -> int | None:
        found: int | None = engine_client.renderer.tokenizer.get_vocab().get(token)
        return found

    vocabulary = engine_client.vllm_config.model_config.get_vocab_size()
    return Served(settings.slot.largest_rank, vocabulary, token_id)


def _auto_route(
    settings: PluginSettings, engine_client: Any, registry: ExpertRegistry
) -> AutoRoute:
    """The router, over the tokenizer that serves."""
    model_config = engine_client.vllm_config.model_config
    return AutoRoute(
        settings.router,
        resolve_directory(
            model_config.tokenizer,
            model_config.tokenizer_revision,
            engine_client.vllm_config.load_config.download_dir,
        ),
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
            if visible(expert):
                root = str(expert.path) if sees_paths() else expert.name
                card = model_card(id=expert.name, root=root, parent=base, owned_by="deltamux")
                listed.data.append(card)
        if not sees_paths():
            for card in listed.data:
                card.root = card.id
        return listed

    def visible(expert: Expert) -> bool:
        tenant = current_tenant.get()
        return expert.error is None and (tenant is None or tenant.may_use(expert.name))

    def model_name(lora_request: Any = None) -> str:
        return base if lora_request is None else public_name(lora_request.lora_name)

    models.show_available_models = show_available_models
    models.model_name = model_name
