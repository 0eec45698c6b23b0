"""Why a router decided as it did: what each token added to the winner's lead.

The tables' score is a sum over tokens and pairs, so the lead of one domain over another is too:

    lead(token) = (table[token, winner] - table[token, other]) / sqrt(number of distinct tokens)

A pair's part is given to it as a whole. Other is the runner-up. With a sentence encoder that was
asked, the tokens explain the tables' part alone; `asked_encoder` says so.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from deltamux.router.decide.conversation import Conversation, bound
from deltamux.router.decide.features import pair_buckets
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Decode

#: Entries that are returned.
TOP: Final = 10


def explain(router: Router, conversation: Conversation, decode: Decode) -> dict[str, Any]:
    """Explain the decision on a conversation.

    Args:
        router: Who decides.
        conversation: As `Router.read` gives it.
        decode: Token ids to text.

    Returns:
        `probabilities` by domain; `thresholds` by domain with an expert; `domain` and `runner_up`;
        `turns`, how many of the read turns decided; `asked_encoder`; `tokens`, the texts of tokens
        and pairs that decided, each with its `lead`, most important first.
    """
    choice = router.choose(conversation)
    labels = router.labels
    others = np.array(choice.probabilities)
    others[choice.domain] = -1.0
    other = int(np.argmax(others))
    turns = conversation.ids[choice.first_turn :]
    return {
        "probabilities": dict(zip(labels, choice.probabilities.tolist(), strict=True)),
        "thresholds": router.thresholds(),
        "override_confidence": router.config.override_confidence,
        "domain": labels[choice.domain],
        "runner_up": labels[other],
        "turns": len(turns),
        "asked_encoder": bool(conversation.vectors),
        "tokens": _leads(router, turns, (choice.domain, other), decode),
    }


def _leads(
    router: Router, turns: Sequence[Sequence[int]], domains: tuple[int, int], decode: Decode
) -> list[dict[str, Any]]:
    """Tokens and pairs by the size of what they add, largest first."""
    winner, other = domains
    ids = bound(turns, router.config)
    if not ids.size:
        return []
    tables, temperature = router.tables, router.config.temperature
    tokens = np.unique(ids)
    pairs, places = np.unique(pair_buckets(ids, len(tables.pairs)), return_index=True)
    found: dict[tuple[int, ...], float] = {}
    for rows, table, keys in (
        (tokens, tables.tokens, [(int(token),) for token in tokens]),
        (pairs, tables.pairs, [(int(ids[i]), int(ids[i + 1])) for i in places]),
    ):
        if rows.size:
            leads = (table[rows, winner] - table[rows, other]) / np.sqrt(rows.size) / temperature
            found |= dict(zip(keys, leads.tolist(), strict=True))
    order = sorted(found, key=lambda key: -abs(found[key]))[:TOP]
    return [{"text": decode(list(key)), "lead": round(found[key], 4)} for key in order]
