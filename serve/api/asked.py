"""What the router is asked by a request: its conversations, what went before, and the client's hints.

A request may hold several prompts (an array for completions, a list of conversations for the batch
of chats, lists of token ids); each is a conversation of its own. Hints are `metadata.deltamux`, an
object or, where the API allows strings alone, the same as JSON:

    {"allow": ["math", "sql"]}    the experts that may answer; the base always may
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

from deltamux.router.decide.conversation import Conversation
from deltamux.router.decide.messages import user_turns
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Encode

# Conversations that are remembered for `previous_response_id`, and turns and characters of each.
MAX_REMEMBERED: Final = 2048
MAX_TURNS: Final = 8
MAX_CHARS: Final = 2000

# Where a request holds what is asked, in the order of the APIs that are looked at.
_FIELDS: Final = ("messages", "prompt", "input", "token_ids", "query")
_ID_PREFIXES: Final = ("chatcmpl-", "cmpl-", "resp_", "msg_")

Asked = list[str] | list[int]


class RequestError(ValueError):
    """A request that cannot be routed as it stands; the client gets the message with status 400."""


@dataclass(frozen=True)
class Hints:
    """What the client says about routing; None where it says nothing."""

    allow: frozenset[str] | None = None

    def within(self, allowed: frozenset[str] | None) -> "Hints":
        """The same, of no more than these experts; None: of all."""
        if allowed is None:
            return self
        return Hints(allowed if self.allow is None else self.allow & allowed)


def field(request: Any, name: str) -> Any:
    """Return a field of a request of vLLM or of a dict, None where it has none."""
    return request.get(name) if isinstance(request, dict) else getattr(request, name, None)


def conversations(request: Any) -> list[Asked]:
    """Return the user's turns, or the token ids, of each conversation of a request; at least one."""
    for name in _FIELDS:
        content = field(request, name)
        if content is None:
            continue
        if name in ("messages", "prompt") and _is_several(content):
            return [_one(each) for each in content]
        return [_one(content)]
    return [[]]


def request_id(request: Any, client_id: str | None = None) -> str | None:
    """Return what the response will be called, without the prefix of its API.

    Args:
        request: A request of vLLM or a dict.
        client_id: The header X-Request-Id. vLLM names responses by it, but those of the Responses API.
    """
    if client_id is not None and field(request, "input") is None:
        return bare_id(client_id)
    found = field(request, "request_id")
    return bare_id(found) if isinstance(found, str) else None


def bare_id(name: str) -> str:
    """Return a response's id without the prefix of its API, however often it stands there.

    A client may well send an earlier response's id as its X-Request-Id, and vLLM adds the prefix again.
    """
    while prefix := next((p for p in _ID_PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def hints(request: Any) -> Hints:
    """Return the client's hints.

    Raises:
        RequestError: They are not of the form above.
    """
    metadata = field(request, "metadata")
    found = metadata.get("deltamux") if isinstance(metadata, dict) else None
    if found is None:
        return Hints()
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise RequestError(f"metadata.deltamux is not JSON: {error}") from error
    if not isinstance(found, dict) or set(found) - {"allow"}:
        raise RequestError('metadata.deltamux takes {"allow": [names of experts]}')
    allow = found.get("allow")
    if allow is None:
        return Hints()
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise RequestError("metadata.deltamux.allow must be a list of names of experts")
    return Hints(frozenset(allow))


class Reader:
    """Reads conversations for a router, those that go on with an earlier response included.

    Args:
        encode: Text to token ids.
        observe: Called with "ids" or "text" for each conversation.
    """

    def __init__(self, encode: Encode, observe: Callable[[str], None]) -> None:
        self._encode, self._observe = encode, observe
        self._turns: OrderedDict[str, list[str]] = OrderedDict()
        self._lock = Lock()

    def read(self, router: Router, request: Any) -> list[Conversation]:
        """Return each conversation of a request, as the router reads it."""
        found = []
        for asked in conversations(request):
            if asked and isinstance(asked[0], int):
                self._observe("ids")
                found.append(router.read_ids([_ids(asked)]))
                continue
            self._observe("text")
            turns = self._before(request) + [str(turn) for turn in asked]
            found.append(router.read(turns, self._encode))
        return found

    def remember(self, request: Any) -> None:
        """Keep the turns of a request of the Responses API, for those that go on with it."""
        name = request_id(request)
        if name is None or field(request, "input") is None:
            return
        new = [str(turn) for turn in conversations(request)[0]]
        turns = [_cut(turn) for turn in self._before(request) + new][-MAX_TURNS:]
        with self._lock:
            self._turns[name] = turns
            while len(self._turns) > MAX_REMEMBERED:
                self._turns.popitem(last=False)

    def _before(self, request: Any) -> list[str]:
        """The turns of the response that a request goes on with, as far as they are known."""
        previous = field(request, "previous_response_id")
        with self._lock:
            known = self._turns.get(bare_id(previous), []) if isinstance(previous, str) else []
            return list(known)


def _is_several(content: Any) -> bool:
    """Whether a `prompt` or `messages` holds several conversations."""
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(each, str) for each in content) or all(
        isinstance(each, list) for each in content
    )


def _one(content: Any) -> Asked:
    """One conversation."""
    if isinstance(content, list) and content and isinstance(content[0], int):
        return content
    return user_turns(content)


def _ids(asked: Sequence[Any]) -> list[int]:
    return [token for token in asked if isinstance(token, int)]


def _cut(text: str) -> str:
    """Both ends of a long turn."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS // 2] + text[-MAX_CHARS // 2 :]
