"""The router at run time: text or token ids in, decision out.

Deciding needs numpy and the router's directory (and onnxruntime with features "encoder"), and takes
bounded time on any input. A router never changes after it was loaded, so threads may share it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deltamux.router.decide.artifact import load_artifact
from deltamux.router.decide.config import Kind, RouterConfig
from deltamux.router.decide.conversation import Conversation, bound, read_ends
from deltamux.router.decide.decision import REASON_ABSTAIN, REASON_ROUTER, Decision
from deltamux.router.decide.encoder import SentenceEncoder, join, load_encoder
from deltamux.router.decide.features import Ids
from deltamux.router.decide.messages import bound_text, bound_turns
from deltamux.router.decide.policy import Choice, Rules, follow
from deltamux.router.decide.tables import Floats, Probabilities, Tables, softmax
from deltamux.router.decide.tokenizer import (
    Decode,
    Encode,
    build_decode,
    check_tokenizer,
    read_tokenizer,
)

# Whether an expert of a name is on the device.
Resident = Callable[[str], bool]


class Router:
    """A loaded router.

    Args:
        config: The contents of `router_config.json`.
        tables: The classifier.
        encoder: The sentence encoder; None with features "default".
        decode: Token ids to text, for requests that come as ids; needed beside an encoder.

    Attributes:
        config: As given.
        tables: As given.
    """

    def __init__(
        self,
        config: RouterConfig,
        tables: Tables,
        encoder: SentenceEncoder | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.config = config
        self.tables = tables
        self._encoder = encoder
        self._decode = decode
        minimums = [config.minimums.get(label, 0.0) for label in config.labels]
        self._rules = Rules(
            specialists=np.array(
                [config.experts[label] is not None for label in config.labels], dtype=np.bool_
            ),
            thresholds=np.maximum(config.threshold, np.array(minimums)),
            override_confidence=config.override_confidence,
            hysteresis=config.hysteresis,
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        tokenizer_sha256: str | None = None,
        features: Kind | None = None,
    ) -> "Router":
        """Read a router's directory.

        Args:
            path: The directory.
            tokenizer_sha256: Identity of the tokenizer whose ids will be given; None skips the
                check.
            features: Refuses a router that was fitted with others; None takes any.

        Raises:
            FileNotFoundError: The directory or one of its files is missing.
            ValueError: The files are damaged, too new, made for another tokenizer, or need an
                encoder that is not installed.
        """
        config, tables = load_artifact(Path(path))
        if tokenizer_sha256 is not None:
            check_tokenizer(config.tokenizer_sha256, tokenizer_sha256)
        if features is not None and features != config.features:
            raise ValueError(
                f"{path} was fitted with features {config.features!r}; fit it again with "
                f"--features {features}"
            )
        if config.encoder is None:
            return cls(config, tables)
        encoder = load_encoder()
        if encoder.sha256 != config.encoder.sha256:
            raise ValueError(
                f"the router was fitted with the encoder {config.encoder.sha256[:12]}, "
                f"installed is {encoder.sha256[:12]}; fit the router again"
            )
        return cls(config, tables, encoder, build_decode(read_tokenizer(path)))

    @property
    def labels(self) -> list[str]:
        """Domains in the order of the probabilities."""
        return self.config.labels

    @property
    def asks_encoder(self) -> bool:
        """Whether a decision may take the milliseconds of a sentence encoder."""
        return self._encoder is not None

    def thresholds(self) -> dict[str, float]:
        """Return the probability that each domain's expert needs; domains of the base have none."""
        return {
            label: float(least)
            for label, least, special in zip(
                self.labels, self._rules.thresholds, self._rules.specialists, strict=True
            )
            if special
        }

    def probabilities(self, ids: Sequence[int]) -> Probabilities:
        """Return the calibrated probabilities of one text, float64 [D].

        Args:
            ids: Token ids without special tokens. Those outside the vocabulary are ignored, and
                of a long text only both ends are read.
        """
        return self.score(Conversation([ids]), 0, 0)

    def decide_ids(
        self,
        turns: Sequence[Sequence[int]],
        *,
        resident: Resident | None = None,
        margin: float = 0.0,
    ) -> Decision:
        """Decide on the token ids of the user's turns, oldest first.

        No turns, or turns without a known token, are no evidence: the router abstains.

        Args:
            turns: As read by the tokenizer, without special tokens.
            resident: Whether an expert of a name is on the device.
            margin: How far behind the winner such an expert may be, and still answer.
        """
        return self.decide_read(self.read_ids(turns), resident, margin)

    def decide(
        self,
        turns: Sequence[str],
        encode: Encode,
        *,
        resident: Resident | None = None,
        margin: float = 0.0,
    ) -> Decision:
        """Decide on the texts of the user's turns, oldest first.

        Args:
            turns: As `user_turns` gives them.
            encode: Text to token ids, without special tokens.
            resident: As for `decide_ids`.
            margin: As for `decide_ids`.
        """
        return self.decide_read(self.read(turns, encode), resident, margin)

    def decide_read(
        self,
        conversation: Conversation,
        resident: Resident | None = None,
        margin: float = 0.0,
        allow: frozenset[str] | None = None,
    ) -> Decision:
        """Decide on a conversation that was read before.

        Args:
            conversation: As `read` gives it.
            resident: As for `decide_ids`.
            margin: As for `decide_ids`.
            allow: Experts that may answer; None: all.
        """
        choice = self.choose(conversation, resident, margin, allow)
        domain = self.labels[choice.domain]
        return Decision(
            expert=self.config.experts[domain] if choice.routed else None,
            domain=domain,
            confidence=choice.confidence,
            reason=REASON_ROUTER if choice.routed else REASON_ABSTAIN,
            probabilities=dict(zip(self.labels, choice.probabilities.tolist(), strict=True)),
        )

    def read(self, turns: Sequence[str], encode: Encode) -> Conversation:
        """Tokenize the turns that count: those at both ends of a long conversation."""
        texts = bound_turns([bound_text(text) for text in turns])
        known = read_ends(texts, encode, self.config)
        return Conversation([ids for _, ids in known], [text for text, _ in known])

    def read_ids(self, turns: Sequence[Sequence[int]]) -> Conversation:
        """Take turns that are tokenized already; both ends of a long conversation count."""
        found = read_ends(turns, lambda turn: turn, self.config)
        return Conversation([ids for _, ids in found])

    def choose(
        self,
        conversation: Conversation,
        resident: Resident | None = None,
        margin: float = 0.0,
        allow: frozenset[str] | None = None,
    ) -> Choice:
        """Apply the policy to a conversation."""
        rules = self._rules
        if allow is not None:
            allowed = np.array([self.config.experts[label] in allow for label in self.labels])
            rules = replace(rules, specialists=rules.specialists & allowed)
        if not conversation.ids:
            rules = replace(rules, specialists=np.zeros_like(rules.specialists))
        elif resident is not None and margin > 0:
            names = [self.config.experts[label] for label in self.labels]
            here = np.array([name is not None and resident(name) for name in names])
            rules = replace(rules, margin=margin, resident=here)
        num_turns = max(1, len(conversation.ids))
        return follow(num_turns, lambda i, j: self.score(conversation, i, j), rules)

    def score(self, conversation: Conversation, first: int, last: int) -> Probabilities:
        """Return the probabilities of the turns first..last together, float64 [D]."""
        scores = self.tables.scores(*self.features(conversation, first, last))
        return softmax(scores, self.config.temperature)

    def features(
        self, conversation: Conversation, first: int, last: int
    ) -> tuple[Ids, Floats | None]:
        """Return the bounded token ids of some turns, and with an encoder their sentence vector."""
        ids = self._ids(conversation, first, last + 1)
        if self._encoder is None:
            return ids, None
        turns = range(first, min(last + 1, len(conversation.ids)))
        return ids, join([self._vector(conversation, turn, self._encoder) for turn in turns])

    def _ids(self, conversation: Conversation, first: int, stop: int) -> Ids:
        """Bounded token ids of some turns together."""
        return bound(conversation.ids[first:stop], self.config)

    def _vector(self, conversation: Conversation, turn: int, encoder: SentenceEncoder) -> Floats:
        """The sentence vector of a turn, found once."""
        if turn not in conversation.vectors:
            conversation.vectors[turn] = encoder.vector(self._text(conversation, turn))
        return conversation.vectors[turn]

    def _text(self, conversation: Conversation, turn: int) -> str:
        """A turn's text, decoded where it came as ids."""
        if conversation.texts is not None:
            return conversation.texts[turn]
        ids = self._ids(conversation, turn, turn + 1).tolist()
        return self._decode(ids) if self._decode is not None else ""
