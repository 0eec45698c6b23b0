"""The training features of the linear classifier.

Three blocks of columns, each row of length about 1 in the first two:

    tokens     1 / sqrt(U) for each of the U distinct tokens
    pairs      1 / sqrt(P) for each of the P distinct pair buckets
    embedding  scale * (sum of the distinct tokens' vectors / sqrt(U) - mean over prompts)

Vectors of tokens are those of `vectors.py`. What few prompts say about single tokens is mostly
chance, while the embedding carries it over to tokens of like meaning: its block is the longer, the
fewer prompts there are. The mean over prompts only moves the bias; subtracting it makes the
optimisation well-conditioned.

Shapes: N prompts, K width of a token's vector, T token columns and Q pair columns that occur.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.features import Ids, distinct
from deltamux.router.decide.tables import Floats
from deltamux.router.fit.embedding import EmbeddingRows
from deltamux.router.fit.vectors import TokenVectors, token_vectors

#: A pair seen in a single prompt says nothing about other prompts.
MIN_PAIR_PROMPTS: Final = 2
#: Labelled prompts of a domain at which a row of the embedding's block is twice as long as the
#: others. On training files 2 instead of 1 gains one point of bare prompts with 16 a domain, costs
#: half a point of whole prompts with 64, and half a point of bare prompts with 400.
FEW_PROMPTS: Final = 16


@dataclass(frozen=True)
class Design:
    """Training features, and what is needed to fold weights on them.

    Attributes:
        columns: CSR float32 [N, T + Q + K].
        tokens: Int64 [T], token id of each column.
        pairs: Int64 [Q], bucket of each column.
        vectors: The tokens' vectors, scale included; None without an embedding.
        offset: Float32 [K], what was subtracted from the embedding block; K = 0 likewise.
    """

    columns: Any
    tokens: Ids
    pairs: Ids
    vectors: TokenVectors | None
    offset: Floats


def dense_length(prompts_per_domain: float) -> float:
    """Return the mean length of a row of the embedding block: 2 with 16 prompts, 1 with many."""
    return 1.0 + FEW_PROMPTS / prompts_per_domain


def build_design(
    prompts: Sequence[Ids], embedding: EmbeddingRows | None, dense: float = 1.0
) -> Design:
    """Build the training features.

    Args:
        prompts: Bounded token ids of each prompt.
        embedding: The base's input embedding; None leaves its block out.
        dense: Mean length of a row of the embedding's block.
    """
    from scipy import sparse

    rows = [distinct(ids) for ids in prompts]
    tokens, token_block = _presence([row[0] for row in rows], min_prompts=1)
    pairs, pair_block = _presence([row[1] for row in rows], min_prompts=MIN_PAIR_PROMPTS)
    block = np.zeros((len(rows), 0), dtype=np.float32)
    vectors: TokenVectors | None = None
    offset = np.zeros(0, dtype=np.float32)
    if embedding is not None:
        vectors = token_vectors(embedding)
        summed = token_block @ vectors.gather(tokens)
        offset = summed.mean(axis=0)
        length = float(np.linalg.norm(summed - offset, axis=1).mean())
        scale = np.float32(dense / length if length > 0 else 1.0)
        offset *= scale
        block = summed * scale - offset
        vectors = TokenVectors(embedding, vectors.projection * scale, vectors.shift * scale)
    blocks = [token_block, pair_block, sparse.csr_array(block)]
    columns = sparse.hstack(blocks, format="csr", dtype=np.float32)
    return Design(columns, tokens, pairs, vectors, offset)


def _presence(rows: Sequence[Ids], min_prompts: int) -> tuple[Ids, Any]:
    """Columns that occur in enough prompts, and the block with 1 / sqrt(row length) in them."""
    from scipy import sparse

    lengths = np.array([len(row) for row in rows])
    items = np.concatenate(rows)
    columns, inverse, counts = np.unique(items, return_inverse=True, return_counts=True)
    values = np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths).astype(np.float32)
    where = (np.repeat(np.arange(len(rows)), lengths), inverse)
    block = sparse.csr_array((values, where), shape=(len(rows), len(columns)))
    kept = np.flatnonzero(counts >= min_prompts)
    return columns[kept], block[:, kept]
