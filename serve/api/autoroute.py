"""Decide who answers a request: the model that was named, or, for `auto`, the router's choice.

A router that cannot be loaded or fails on a request is no reason to turn the request away: the
fallback answers, with reason `router-error`. Router, shadow router and their figures are replaced
as a whole: a request keeps those that it started with.

The router reads the user's turns, and an expert's own chat template makes the engine's token ids of
them, so for text these ids exist only after the decision: the turns are tokenized for the router,
and that time is part of `deltamux_router_seconds`. A prompt that comes as token ids is read as it is.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from deltamux.router.decide.conversation import Conversation
from deltamux.router.decide.decision import (
    REASON_EXPLICIT,
    REASON_ROUTER_ERROR,
    Decision,
)
from deltamux.router.decide.explain import explain
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Encode
from deltamux.serve.api.active_router import ActiveRouter, ask_shadow, load_active_router
from deltamux.serve.api.asked import Hints, Reader, RequestError, hints, request_id
from deltamux.serve.api.decision_log import DecisionLog
from deltamux.serve.names import BASE
from deltamux.serve.observability import routing_metrics
from deltamux.serve.settings import RouterSettings

logger = logging.getLogger("vllm.deltamux")


def explicit(expert: str | None) -> Decision:
    """The decision of a client that named the model itself."""
    return Decision(expert, expert or BASE, 1.0, REASON_EXPLICIT, {})


class AutoRoute:
    """The router of a server.

    Args:
        settings: Where it lies and who answers when it abstains; None: no router.
        tokenizer_directory: The served model's, to check that the router was made for it.
        encode: Text to token ids, without special tokens.
        serves: Whether an expert of a name can answer.
        residents: The names of the experts in a slot; None: nobody knows.
    """

    def __init__(
        self,
        settings: RouterSettings | None,
        tokenizer_directory: Path,
        encode: Encode,
        serves: Callable[[str], bool],
        residents: Callable[[], Collection[str]] | None = None,
    ) -> None:
        self.settings = settings
        self.error: str | None = None
        self._tokenizer_directory = tokenizer_directory
        self._serves = serves
        self._reader = Reader(encode, lambda kind: routing_metrics.token_source.labels(kind).inc())
        self.log: DecisionLog | None = None
        self._residents = residents
        self._active: ActiveRouter | None = None
        self._reported: set[str] = set()
        if settings is None:
            self.error = "no router is configured"
            return
        if settings.log is not None:
            self.log = DecisionLog(settings.log, settings.log_prompts)
        try:
            self._put(load_active_router(settings, self._tokenizer_directory))
        except (ValueError, OSError) as error:
            self.error = str(error)
            logger.error("deltamux: the router is not usable: %s", error)

    @property
    def router(self) -> Router | None:
        """The router in use, None where it could not be loaded."""
        return self._active.router if self._active else None

    @property
    def fallback(self) -> str | None:
        """The expert that answers where the router does not; None is the base."""
        name = self.settings.fallback if self.settings else BASE
        return name if name != BASE and self._serves(name) else None

    @property
    def active(self) -> ActiveRouter | None:
        """What decides now; None where no router is usable."""
        return self._active

    def experts(self) -> list[str]:
        """Return who the router may choose, the base included."""
        router = self.router
        names = router.config.experts.values() if router else []
        return sorted({name for name in names if name is not None} | {BASE})

    def reload(self, path: Path | None = None, shadow: Path | None = None) -> ActiveRouter:
        """Load the router again, or another one, and put it in the place of the old one.

        Args:
            path: Its directory; None for the one in use.
            shadow: Of the shadow router; None for the one in use, if any.

        Raises:
            OSError: A file is missing.
            ValueError: No router is configured and none is given, or a directory holds no usable
                router. The old one stays in both cases.
        """
        settings = self.settings
        if settings is None and path is None:
            raise ValueError("no router is configured; give 'path', the directory of one")
        settings = settings or RouterSettings(path=Path(str(path)))
        changes = {"path": path or settings.path, "shadow": shadow or settings.shadow}
        try:
            fresh = load_active_router(
                settings.model_copy(update=changes), self._tokenizer_directory
            )
        except (ValueError, OSError):
            routing_metrics.reloads_total.labels("refused").inc()
            raise
        self._put(fresh)
        routing_metrics.reloads_total.labels("done").inc()
        return fresh

    def decide(
        self,
        request: Any,
        counted: bool = True,
        allowed: frozenset[str] | None = None,
        client_id: str | None = None,
    ) -> tuple[Decision, float]:
        """Route one request.

        Args:
            request: A chat, completions, responses or messages request of vLLM, or a dict.
            counted: Count the decision among those that drift is measured of, and log it.
            allowed: The experts that the client may use, the base aside; None: all.
            client_id: The client's header X-Request-Id.

        Returns:
            The decision, and the seconds it took, tokenization included.

        Raises:
            RequestError: Its hints are malformed, or it holds prompts of different experts.
        """
        start = time.perf_counter()
        found = self.decide_each(request, counted, allowed, client_id)
        names = sorted({decision.expert or BASE for decision in found})
        if len(names) > 1:
            raise RequestError(
                f"the {len(found)} prompts of this request belong to different models "
                f"({', '.join(names)}); send a request for each, or name the model"
            )
        return found[0], time.perf_counter() - start

    def decide_each(
        self,
        request: Any,
        counted: bool = False,
        allowed: frozenset[str] | None = None,
        client_id: str | None = None,
    ) -> list[Decision]:
        """Route every conversation of a request; arguments and errors are those of `decide`."""
        active, said = self._active, hints(request).within(allowed)
        fallback = self.fallback
        if allowed is not None and fallback not in allowed:
            fallback = None
        decisions = []
        for made, conversation in self._decide(active, request, said):
            chosen = self._servable(made)
            decision = chosen
            if chosen.expert is None and fallback:
                decision = replace(chosen, expert=fallback)
            decisions.append(self._seen(decision, allowed))
            if counted and active is not None and conversation is not None:
                active.drift.observe(chosen)
                ask_shadow(active, conversation, chosen)
                if self.log is not None:
                    name = request_id(request, client_id)
                    self.log.decided(name, conversation.texts, decision)
        if counted:
            self._reader.remember(request)
        return decisions

    def _seen(self, decision: Decision, allowed: frozenset[str] | None) -> Decision:
        """The decision as a client may see it: a domain whose expert it may not use is the base's."""
        if allowed is None or self.visible({decision.domain: 1.0}, allowed):
            return decision
        return replace(decision, domain=BASE)

    def _servable(self, decision: Decision) -> Decision:
        """The decision, or the base where its expert is not served."""
        if decision.expert is None or self._serves(decision.expert):
            return decision
        self._report(decision.expert)
        return replace(decision, expert=None, reason=REASON_ROUTER_ERROR)

    async def decide_aside(
        self,
        request: Any,
        counted: bool = True,
        allowed: frozenset[str] | None = None,
        client_id: str | None = None,
    ) -> tuple[Decision, float]:
        """Route one request on the event loop; in a thread where a sentence encoder is asked.

        The tables take less than going to a thread and back does. Arguments and result are those of
        `decide`.
        """
        if self._active is None or not self._active.asks_encoder:
            return self.decide(request, counted, allowed, client_id)
        return await run_in_threadpool(self.decide, request, counted, allowed, client_id)

    def explain(self, request: Any) -> dict[str, Any] | None:
        """Why the router decides as it does; None where it cannot decide."""
        active = self._active
        if active is None:
            return None
        try:
            conversation = self._reader.read(active.router, request)[0]
            return explain(active.router, conversation, active.decode)
        except Exception:
            logger.exception("deltamux: the router cannot explain a request")
            return None

    def visible(
        self, probabilities: dict[str, float], allowed: frozenset[str] | None
    ) -> dict[str, float]:
        """The probabilities of the domains whose experts a client may use; None: all."""
        router = self.router
        if allowed is None or router is None:
            return probabilities
        seen = {
            domain for domain, name in router.config.experts.items() if name in {*allowed, None}
        }
        return {domain: share for domain, share in probabilities.items() if domain in seen}

    def not_served(self) -> list[str]:
        """Return the experts that the router may choose and that cannot answer now."""
        return [name for name in self.experts() if name != BASE and not self._serves(name)]

    def _put(self, active: ActiveRouter) -> None:
        """Let it decide from now on: one assignment, so no request sees a mixture."""
        self._active = active
        self.settings = active.settings
        self.error = None
        routing_metrics.collector.drift = active.drift

    def _report(self, expert: str) -> None:
        if expert not in self._reported:
            self._reported.add(expert)
            logger.error("deltamux: the router chooses %r, which is not served", expert)

    def _decide(
        self, active: ActiveRouter | None, request: Any, said: Hints
    ) -> list[tuple[Decision, Conversation | None]]:
        """The router's decisions, and what it read; without the latter the router failed."""
        failed = Decision(None, BASE, 0.0, REASON_ROUTER_ERROR, {})
        if active is None:
            return [(failed, None)]
        router, margin = active.router, active.settings.resident_margin
        try:
            resident = None
            if margin > 0 and self._residents is not None:
                resident = self._residents().__contains__
            return [
                (router.decide_read(conversation, resident, margin, said.allow), conversation)
                for conversation in self._reader.read(router, request)
            ]
        except Exception:
            # Whatever the client sent, it gets an answer; the log keeps what was wrong.
            logger.exception("deltamux: the router failed on a request")
            return [(failed, None)]
