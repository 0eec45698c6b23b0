"""The router at run time: token ids in, decision out.

Deciding needs numpy and the router's directory, nothing else, and takes bounded time on any input.
A router never changes after it was loaded, so threads may share it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deltamux.router.artifact import load_artifact
from deltamux.router.config import RouterConfig
from deltamux.router.decision import REASON_ABSTAIN, REASON_ROUTER, Decision
from deltamux.router.features import bounded_ids
from deltamux.router.messages import bound_text, bound_turns
from deltamux.router.policy import choose
from deltamux.router.tables import Probabilities, Tables, softmax
from deltamux.router.tokenizer import Encode, check_tokenizer


class Router:
    """A loaded router.

    Attributes:
        config: The contents of `router_config.json`.
    """

    def __init__(self, config: RouterConfig, tables: Tables) -> None:
        self.config = config
        self._tables = tables
        self._specialists = np.array(
            [config.experts[label] is not None for label in config.labels], dtype=np.bool_
        )

    @classmethod
    def load(cls, path: str | Path, *, tokenizer_sha256: str | None = None) -> "Router":
        """Read a router's directory.

        Args:
            path: The directory.
            tokenizer_sha256: Identity of the tokenizer whose ids will be given; None skips the
                check.

        Raises:
            FileNotFoundError: The directory or one of its files is missing.
            ValueError: The files are damaged, too new, or made for another tokenizer.
        """
        config, tables = load_artifact(Path(path))
        if tokenizer_sha256 is not None:
            check_tokenizer(config.tokenizer_sha256, tokenizer_sha256)
        return cls(config, tables)

    @property
    def labels(self) -> list[str]:
        """Domains in the order of the probabilities."""
        return self.config.labels

    def probabilities(self, ids: Sequence[int]) -> Probabilities:
        """Return the calibrated probabilities of one text, float64 [D].

        Args:
            ids: Token ids without special tokens. Those outside the vocabulary are ignored, and
                of a long text only both ends are read.
        """
        return self._score([ids])[0]

    def decide_ids(self, turns: Sequence[Sequence[int]]) -> Decision:
        """Decide on the token ids of the user's turns, oldest first.

        No turns, or turns without a known token, are no evidence: the router abstains.
        """
        turns = [turn for turn in turns if len(turn)]
        conversation, num_tokens = self._score(turns)
        choice = choose(
            conversation,
            self._last_turn(turns),
            specialists=self._specialists & (num_tokens > 0),
            threshold=self.config.threshold,
            override_confidence=self.config.override_confidence,
        )
        domain = self.labels[choice.domain]
        return Decision(
            expert=self.config.experts[domain] if choice.routed else None,
            domain=domain,
            confidence=choice.confidence,
            reason=REASON_ROUTER if choice.routed else REASON_ABSTAIN,
            probabilities=dict(zip(self.labels, choice.probabilities.tolist(), strict=True)),
        )

    def decide(self, turns: Sequence[str], encode: Encode) -> Decision:
        """Decide on the texts of the user's turns, oldest first.

        Turns in the middle of a long conversation are not even tokenized, since only both ends of
        it count.

        Args:
            turns: As `user_turns` gives them.
            encode: Text to token ids, without special tokens.
        """
        texts = bound_turns([bound_text(text) for text in turns])
        return self.decide_ids(self._encode_ends(texts, encode))

    def _encode_ends(self, texts: list[str], encode: Encode) -> list[list[int]]:
        """Encode turns from the end until the suffix is full, then from the start."""
        first, last = 0, len(texts)
        head: list[list[int]] = []
        tail: list[list[int]] = []
        while first < last and sum(map(len, tail)) < self.config.suffix_tokens:
            last -= 1
            tail.insert(0, encode(texts[last]))
        while first < last and sum(map(len, head)) < self.config.prefix_tokens:
            head.append(encode(texts[first]))
            first += 1
        return head + tail

    def _last_turn(self, turns: Sequence[Sequence[int]]) -> Probabilities | None:
        """Probabilities of the last turn alone; None where it is the only one or says nothing."""
        if len(turns) < 2:
            return None
        probabilities, num_tokens = self._score(turns[-1:])
        return probabilities if num_tokens else None

    def _score(self, turns: Sequence[Sequence[int]]) -> tuple[Probabilities, int]:
        """Probabilities of concatenated turns, and how many tokens they rest on."""
        config = self.config
        ids = bounded_ids(turns, config.vocab_size, config.prefix_tokens, config.suffix_tokens)
        return softmax(self._tables.scores(ids), config.temperature), ids.size
