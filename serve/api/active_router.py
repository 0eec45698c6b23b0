"""The router in use, with its shadow and their figures."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from deltamux.router.decide.conversation import Conversation
from deltamux.router.decide.decision import Decision
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Decode, build_decode, read_tokenizer, tokenizer_sha256
from deltamux.serve.observability import routing_metrics
from deltamux.serve.settings import RouterSettings

logger = logging.getLogger("vllm.deltamux")


@dataclass(frozen=True)
class ActiveRouter:
    """What decides for `auto`; replaced as a whole.

    Attributes:
        router: Who decides.
        shadow: Who decides too, and is only counted.
        drift: Decisions of `router` against its fit.
        decode: Token ids to text, to explain.
        settings: What it was loaded from.
    """

    router: Router
    shadow: Router | None
    drift: routing_metrics.Drift
    decode: Decode
    settings: RouterSettings

    @property
    def asks_encoder(self) -> bool:
        """Whether a decision may take milliseconds, too long for an event loop."""
        return any(router.asks_encoder for router in (self.router, self.shadow) if router)


def load_active_router(settings: RouterSettings, tokenizer_directory: Path) -> ActiveRouter:
    """Load routers, every part checked.

    Raises:
        OSError: A file is missing.
        ValueError: A directory holds no usable router for this tokenizer.
    """
    identity = tokenizer_sha256(tokenizer_directory)
    router = Router.load(settings.path, tokenizer_sha256=identity, features=settings.features)
    shadow = Router.load(settings.shadow, tokenizer_sha256=identity) if settings.shadow else None
    return ActiveRouter(
        router=router,
        shadow=shadow,
        drift=routing_metrics.Drift(router.config),
        decode=build_decode(read_tokenizer(tokenizer_directory)),
        settings=settings,
    )


def ask_shadow(active: ActiveRouter, conversation: Conversation, decision: Decision) -> None:
    """Let the shadow router decide, and count whether it agrees. It never fails a request."""
    if active.shadow is None:
        return
    start = time.perf_counter()
    try:
        # Of its own: the two may read vectors of different encoders.
        own = Conversation(conversation.ids, conversation.texts)
        agree = str(active.shadow.decide_read(own).expert == decision.expert).lower()
    except Exception:
        logger.exception("deltamux: the shadow router failed on a request")
        agree = "error"
    routing_metrics.shadow_total.labels(agree).inc()
    routing_metrics.shadow_seconds.observe(time.perf_counter() - start)
