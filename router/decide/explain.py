"""Why a router decided as it did: what each token added to the winner's lead.

Scores are sums over tokens and pairs (`tables.py`), so the lead of one domain over another is too:

    lead(token) = (row[token, winner] - row[token, other]) / sqrt(number of distinct tokens)

where a row is the token's meaning and, as far as the wording counts, its wording. A pair's part is given to it as a whole. Other is the runner-up. A sentence vector has no tokens: its
lead stands alone, as `encoder_lead`.
"""

from typing import Any, Final

import numpy as np

from deltamux.router.decide.conversation import Conversation
from deltamux.router.decide.features import Ids, pair_buckets
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import Decode

# Entries that are returned.
TOP: Final = 10


def explain(router: Router, conversation: Conversation, decode: Decode) -> dict[str, Any]:
    """Explain the decision on a conversation.

    Args:
        router: Who decides.
        conversation: As `Router.read` gives it.
        decode: Token ids to text.

    Returns:
        `probabilities` by domain; `thresholds` by domain with an expert; `domain` and `runner_up`;
        `turns`, how many of the read turns decided; `encoder_lead`, None without an encoder;
        `tokens`, the texts of tokens and pairs that decided, each with its `lead`, most important
        first.
    """
    choice = router.choose(conversation)
    labels = router.labels
    others = np.array(choice.probabilities)
    others[choice.domain] = -1.0
    pair = (choice.domain, int(np.argmax(others)))
    last = len(conversation.ids) - 1
    ids, vector = router.features(conversation, choice.first_turn, last)
    return {
        "probabilities": dict(zip(labels, choice.probabilities.tolist(), strict=True)),
        "thresholds": router.thresholds(),
        "override_confidence": router.config.override_confidence,
        "domain": labels[pair[0]],
        "runner_up": labels[pair[1]],
        "turns": len(conversation.ids) - choice.first_turn,
        "encoder_lead": None if vector is None else round(_lead(router, vector, pair), 4),
        "tokens": _leads(router, ids, pair, decode),
    }


def _lead(router: Router, vector: Any, pair: tuple[int, int]) -> float:
    """What a sentence vector adds to the winner's lead."""
    scores = vector @ router.tables.meaning / router.config.temperature
    return float(scores[pair[0]] - scores[pair[1]])


def _leads(router: Router, ids: Ids, pair: tuple[int, int], decode: Decode) -> list[dict[str, Any]]:
    """Tokens and pairs by the size of what they add, largest first."""
    if not ids.size:
        return []
    winner, other = pair
    tables, temperature = router.tables, router.config.temperature
    tokens = np.unique(ids)
    pairs, places = np.unique(pair_buckets(ids, len(tables.pairs)), return_index=True)
    strength = tables.strength(tokens)
    rows = tables.tokens[tokens]
    if tables.words is not None:
        rows = rows + strength * tables.words[tokens]
    found: dict[tuple[int, ...], float] = {}
    for table, keys in (
        (rows, [(int(token),) for token in tokens]),
        (strength * tables.pairs[pairs], [(int(ids[i]), int(ids[i + 1])) for i in places]),
    ):
        if keys:
            leads = (table[:, winner] - table[:, other]) / np.sqrt(len(keys)) / temperature
            found |= dict(zip(keys, leads.tolist(), strict=True))
    order = sorted(found, key=lambda key: -abs(found[key]))[:TOP]
    return [{"text": decode(list(key)), "lead": round(found[key], 4)} for key in order]
