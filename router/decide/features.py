"""Features of a prompt: which tokens and which pairs of neighbouring tokens occur in it.

Presence, not counts: repeating a word does not push a prompt towards a domain. Presence is divided
by the square root of the number of distinct items, so a block's Euclidean length is 1 whatever the
length of the prompt. A token's column is its id: the vocabulary is already a table without
collisions. Pairs are hashed into a fixed number of buckets (Weinberger et al. 2009, "Feature Hashing
for Large Scale Multitask Learning", arXiv:0902.2206).

Shapes: N tokens of a prompt, U distinct tokens, P distinct buckets.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Final

import numpy as np
import numpy.typing as npt

# Goes up whenever equal token ids would give other features.
FEATURE_VERSION: Final = 1
# Buckets of the pair table; a power of two. Chosen, not measured.
NUM_BUCKETS: Final = 1 << 16
# Tokens read at the start and at the end of the conversation. Chosen, not measured.
PREFIX_TOKENS: Final = 512
SUFFIX_TOKENS: Final = 512

# Turns looked at from each end: a turn that matters holds at least one token.
_EDGE_TURNS: Final = max(PREFIX_TOKENS, SUFFIX_TOKENS)

Ids = npt.NDArray[np.int64]


def bounded_ids(
    turns: Sequence[Sequence[int]],
    vocab_size: int,
    prefix_tokens: int = PREFIX_TOKENS,
    suffix_tokens: int = SUFFIX_TOKENS,
) -> Ids:
    """Concatenate turns and keep both ends.

    Args:
        turns: Token ids of each turn, oldest first; any of them may be empty.
        vocab_size: Ids outside [0, vocab_size) are dropped, after the bounds are applied.
        prefix_tokens: Tokens kept at the start.
        suffix_tokens: Tokens kept at the end.

    Returns:
        Int64 [N], N <= prefix_tokens + suffix_tokens.
    """
    if len(turns) > 2 * _EDGE_TURNS:
        turns = [*turns[:_EDGE_TURNS], *turns[-_EDGE_TURNS:]]
    if sum(map(len, turns)) <= prefix_tokens + suffix_tokens:
        return _valid(list(chain.from_iterable(turns)), vocab_size)
    head = list(islice(chain.from_iterable(turns), prefix_tokens))
    tail: list[int] = []
    for turn in reversed(turns):
        missing = suffix_tokens - len(tail)
        if missing <= 0:
            break
        tail = [*turn[-missing:], *tail]
    return _valid(head + tail, vocab_size)


def distinct(ids: Ids, num_buckets: int = NUM_BUCKETS) -> tuple[Ids, Ids]:
    """Return the distinct tokens [U] and the distinct pair buckets [P] of a prompt, both sorted."""
    return np.unique(ids), np.unique(pair_buckets(ids, num_buckets))


def pair_buckets(ids: Ids, num_buckets: int = NUM_BUCKETS) -> Ids:
    """Hash every pair of neighbouring tokens to a bucket.

    The pair (a, b) becomes the 64-bit key a * 2**32 + b, mixed by the finaliser of SplitMix64
    (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"); the bucket is
    the highest log2(num_buckets) bits.

    Args:
        ids: Int64 [N], each in [0, 2**32).
        num_buckets: A power of two, at least 2.

    Returns:
        Int64 [N - 1], or [0] for fewer than two tokens.
    """
    words = ids.astype(np.uint64)
    key = (words[:-1] << np.uint64(32)) | words[1:]
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return (key >> np.uint64(65 - num_buckets.bit_length())).astype(np.int64)


def _valid(ids: list[int], vocab_size: int) -> Ids:
    """Drop ids outside the vocabulary."""
    try:
        array = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        # An id beyond 64 bits cannot be a token either; the common path stays vectorised.
        array = np.asarray([i for i in ids if 0 <= i < vocab_size], dtype=np.int64)
    return array[(array >= 0) & (array < vocab_size)]
