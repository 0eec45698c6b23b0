"""Every route of the server, vLLM's and ours, and who may use it.

A route that is not listed is for admins: one that a new vLLM brings along is closed until somebody has thought about it.
What a route reaches does not depend on this table: experts exist for vLLM only within the gateway (`handlers.py`).
"""

import re
from enum import Enum
from functools import lru_cache


class Access(Enum):
    """Who may use a route, once a key or a tenant is configured."""

    OPEN = "everybody"
    METRICS = "everybody, or with `metrics: key` whoever has a key"
    USER = "whoever has a key"
    ADMIN = "admins, and the holders of vLLM's own key"
    GONE = "nobody"


_INFERENCE = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/derender/stream",
    "/v1/completions",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/completions/derender/stream",
    "/v1/responses",
    "/v1/responses/render",
    "/v1/responses/{response_id}/cancel",
    "/v1/messages",
    "/v1/messages/render",
    "/v1/messages/count_tokens",
    "/v1/systemone",
    "/v2/chat",
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
    "/inference/v1/generate",
    "/generative_scoring",
    "/invocations",
    "/tokenize",
    "/detokenize",
    # Of models that pool or hear, which have no experts.
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/embeddings",
    "/v2/embed",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
_LOOKING = (
    "/v1/models",
    "/v1/experts",
    "/v1/experts/{name}",
    "/v1/responses/{response_id}",
    "/v1/realtime",
    "/version",
    "/load",
    "/tokenizer_info",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
)
_ADMIN = (
    "GET /v1/router",
    "POST /v1/router/reload",
    "POST /v1/experts",
    "DELETE /v1/experts/{name}",
    "POST /v1/experts/{name}/pin",
    "DELETE /v1/experts/{name}/pin",
    "POST /v1/experts/{name}/slot",
    "POST /v1/tenants/reload",
    "POST /abort_requests",
    "POST /inference/v1/abort_requests",
    "POST /scale_elastic_ep",
    "POST /is_scaling_elastic_ep",
    "POST /start_profile",
    "POST /stop_profile",
    "POST /fault_tolerance/apply",
    "GET /fault_tolerance/status",
    "GET /kv_event_sources",
    "GET /server_info",
    "POST /reset_prefix_cache",
    "POST /reset_mm_cache",
    "POST /reset_encoder_cache",
    "POST /collective_rpc",
    "POST /sleep",
    "POST /wake_up",
    "POST /release_kv_cache_memory",
    "GET /is_sleeping",
    "POST /pause",
    "POST /resume",
    "GET /is_paused",
    "POST /init_weight_transfer_engine",
    "POST /shutdown_weight_transfer_engine",
    "POST /start_weight_update",
    "POST /start_draft_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
    "POST /update_weight_version",
    "GET /weight_info",
    "POST /weight_checker",
    "GET /get_world_size",
)
# They would bring experts in past every check, under names that carry no version.
_GONE = (
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "POST /adapters",
    "DELETE /adapters/{adapter_name}",
)
_OPEN = (
    *("GET /health", "GET /ping", "POST /ping", "GET /v1/ready"),
    # Files of a page that hold nothing of the server; it asks for a key itself.
    *("GET /console", "GET /console/", "GET /console/{name}"),
)

ROUTES: dict[str, Access] = {
    **dict.fromkeys(_OPEN, Access.OPEN),
    "GET /metrics": Access.METRICS,
    **{f"POST {path}": Access.USER for path in _INFERENCE},
    **{f"GET {path}": Access.USER for path in _LOOKING},
    "POST /v1/route": Access.USER,
    "POST /v1/route/feedback": Access.USER,
    **dict.fromkeys(_ADMIN, Access.ADMIN),
    **dict.fromkeys(_GONE, Access.GONE),
}


def _pattern(route: str) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", route)
    return re.compile("[^/]+".join(map(re.escape, parts)))


_PATTERNS = [(_pattern(route), access) for route, access in ROUTES.items()]


@lru_cache(maxsize=1024)
def access_of(method: str, path: str) -> Access:
    """Who may use a route.

    Args:
        method: HTTP's; HEAD is as GET, a WebSocket as GET.
        path: Below the server's root, decoded.
    """
    asked = f"{'GET' if method == 'HEAD' else method} {path}"
    for pattern, access in _PATTERNS:
        if pattern.fullmatch(asked):
            return access
    return Access.ADMIN
