"""Decide who answers a request: the model that was named, or, for `auto`, the router's choice.

A router that cannot be loaded or fails on a request is no reason to turn the request away: the
fallback answers, with reason `router-error`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamux.router.decision import (
    REASON_EXPLICIT,
    REASON_ROUTER_ERROR,
    Decision,
)
from deltamux.router.messages import user_turns
from deltamux.router.router import Router
from deltamux.router.tokenizer import tokenizer_sha256
from deltamux.serve.settings import BASE, RouterSettings

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
    """

    def __init__(
        self,
        settings: RouterSettings | None,
        tokenizer_directory: Path,
        encode: Callable[[str], list[int]],
        serves: Callable[[str], bool],
    ) -> None:
        self.settings = settings
        self.error: str | None = None
        self._encode = encode
        self._serves = serves
        self._router: Router | None = None
        self._reported: set[str] = set()
        if settings is None:
            self.error = "no router is configured"
            return
        try:
            identity = tokenizer_sha256(tokenizer_directory)
            self._router = Router.load(settings.path, tokenizer_sha256=identity)
        except (ValueError, OSError) as error:
            self.error = str(error)
            logger.error("deltamux: the router is not usable: %s", error)

    @property
    def router(self) -> Router | None:
        """The router in use, None where it could not be loaded."""
        return self._router

    @property
    def fallback(self) -> str | None:
        """The expert that answers where the router does not; None is the base."""
        name = self.settings.fallback if self.settings else BASE
        return name if name != BASE and self._serves(name) else None

    def decide(self, request: Any) -> tuple[Decision, float]:
        """Route one request.

        Args:
            request: A chat, completions, responses or messages request of vLLM, or a dict.

        Returns:
            The decision, and the seconds it took, tokenization included.
        """
        start = time.perf_counter()
        decision = self._decide(request)
        if decision.expert and not self._serves(decision.expert):
            self._report(decision.expert)
            decision = replace(decision, expert=None, reason=REASON_ROUTER_ERROR)
        if decision.expert is None and self.fallback:
            decision = replace(decision, expert=self.fallback)
        return decision, time.perf_counter() - start

    def _report(self, expert: str) -> None:
        if expert not in self._reported:
            self._reported.add(expert)
            logger.error("deltamux: the router chooses %r, which is not served", expert)

    def _decide(self, request: Any) -> Decision:
        failed = Decision(None, BASE, 0.0, REASON_ROUTER_ERROR, {})
        if self._router is None:
            return failed
        try:
            ids = _token_ids(_field(request, "prompt"))
            if ids is not None:
                return self._router.decide_ids([ids])
            return self._router.decide(_texts(request), self._encode)
        except Exception:
            # Whatever the client sent, it gets an answer; the log keeps what was wrong.
            logger.exception("deltamux: the router failed on a request")
            return failed


def _field(request: Any, name: str) -> Any:
    return request.get(name) if isinstance(request, dict) else getattr(request, name, None)


def _texts(request: Any) -> list[str]:
    for name in ("messages", "prompt", "input"):
        content = _field(request, name)
        if content is not None:
            return user_turns(content)
    return []


def _token_ids(prompt: Any) -> list[int] | None:
    """The ids of a prompt that came as token ids, else None."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return prompt
    return None
