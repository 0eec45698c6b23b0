"""The classifier's parts: features, softmax regression, meaning before wording, folding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltamux.router.decide.features import NUM_BUCKETS, bounded_ids, pair_buckets
from deltamux.router.decide.tables import GAIN, POWER, Tables, softmax
from deltamux.router.fit import vectors
from deltamux.router.fit.classifier import Examples, fit_classifier
from deltamux.router.fit.design import build_design
from deltamux.router.fit.embedding import find_embedding
from deltamux.router.fit.head import fit_head

NUM_WORDS, WIDTH = 42, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a bfloat16 embedding."""
    directory = tmp_path_factory.mktemp("base")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(NUM_WORDS, WIDTH, generator=generator).to(torch.bfloat16)
    save_file({"model.embed_tokens.weight": rows}, directory / "model.safetensors")
    return directory


def design_of(embedding, domains, vocab_size=60):
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(domains), 30)
    ids = [
        bounded_ids([rng.integers(d * 8, d * 8 + 24, rng.integers(1, 30)).tolist()], vocab_size)
        for d in truth
    ]
    return build_design(ids, vocab_size, len(ids), embedding=embedding), truth, ids


def examples_of(truth, domains):
    ones = np.ones(len(truth))
    return Examples(truth, ones, ones, domains)


@pytest.mark.parametrize("with_offset", [False, True])
def test_the_fit_is_the_minimum_of_the_penalised_loss(base, with_offset):
    design, truth, _ = design_of(find_embedding(base), 3)
    rng = np.random.default_rng(1)
    offset = rng.normal(size=(len(truth), 3)) if with_offset else None
    given = 0.0 if offset is None else offset
    weights = np.where(np.arange(len(truth)) % 3, 1.0, 0.25)
    found = fit_head(design.meaning, truth, weights, 3, penalty=0.5, offset=offset)
    assert bool(found.bias.any()) is not with_offset

    def objective(change, bias_change):
        moved = found.weights + change
        scores = given + design.meaning @ moved + found.bias + bias_change
        # Every domain has the same share of the weights here, so balancing changes nothing.
        misfit = weights @ -np.log(softmax(scores)[np.arange(len(truth)), truth])
        return misfit + 0.5 * (moved**2).sum() / 2

    lowest = objective(0.0, 0.0)
    for _ in range(50):
        change = rng.normal(size=found.weights.shape) * 0.03
        assert objective(change, 0.0 if with_offset else rng.normal(size=3) * 0.03) > lowest


@pytest.mark.parametrize("seen", [(0, 2), (1,), (0, 1, 3)])
def test_a_domain_without_prompts_is_never_the_most_probable(base, seen):
    design, truth, _ = design_of(find_embedding(base), 4)
    rows = np.flatnonzero(np.isin(truth, seen))
    fitted_classifier = fit_classifier(design, examples_of(truth, 4), rows)
    best = fitted_classifier.scores(design, np.arange(len(truth))).argmax(axis=1)
    assert set(best) <= set(seen)
    # Neighbouring domains share two thirds of their words here.
    assert (best[rows] == truth[rows]).mean() > 0.8


@pytest.mark.parametrize("with_embedding", [True, False])
@pytest.mark.parametrize("max_width", [768, 4])
def test_folded_tables_give_the_probabilities_of_the_classifier(
    base, with_embedding, max_width, monkeypatch
):
    monkeypatch.setattr(vectors, "MAX_WIDTH", max_width)
    design, truth, ids = design_of(find_embedding(base) if with_embedding else None, 3)
    everything = np.arange(len(truth))
    fitted_classifier = fit_classifier(design, examples_of(truth, 3), everything)
    tables = fitted_classifier.fold(design, 60, NUM_BUCKETS)
    expected = softmax(fitted_classifier.scores(design, everything))

    exact = np.stack([softmax(tables.scores(row)) for row in ids])
    # float32 sums of about a hundred terms of order one.
    np.testing.assert_allclose(exact, expected, atol=2e-5)
    names = ("tokens", "pairs", "words", "trust")
    stored = {n: getattr(tables, n).astype(np.float16).astype(np.float32) for n in names}
    half = Tables(bias=tables.bias, **stored)
    # float16 moves a score of order ten by up to 2**-11 of it, and a probability by a quarter of
    # what its score moves.
    got = np.stack([softmax(half.scores(row)) for row in ids])
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_wording_counts_as_far_as_the_words_are_known():
    trust = np.array([[1.0, 1.0], [0.5, 0.5], [0.5, 0.0]], dtype=np.float32)
    zeros = np.zeros((3, 2), dtype=np.float32)
    words = np.array([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    tables = Tables(zeros, zeros[:2], zeros[0], words=words, trust=trust)
    for tokens, known in ([0, 1], 1.0), ([0, 2], 1 / 1.5), ([2], 0.0), ([1, 2], 0.5):
        assert tables.strength(np.array(tokens)) == pytest.approx(GAIN * known**POWER)
    assert tables.strength(np.array([], dtype=np.int64)) == 0.0
    assert tables.scores(np.array([0, 2]))[0] == pytest.approx(4 / 2**0.5 * GAIN / 1.5**POWER)
    assert not tables.scores(np.array([2])).any()


def test_words_that_no_labelled_prompt_held_do_not_decide(base):
    # The last thirty examples were made, not labelled: their words are not known.
    design, truth, ids = design_of(find_embedding(base), 3)
    design = replace(design, labelled=60)
    fitted_classifier = fit_classifier(design, examples_of(truth, 3), np.arange(90))
    labelled = np.concatenate([np.unique(row) for row in ids[:60]])
    often = np.flatnonzero(np.bincount(labelled, minlength=60) >= 2)
    assert set(np.flatnonzero(fitted_classifier.trust[:, 1])) == set(often)
    held_out = design.trust(np.arange(30, 90))
    assert np.count_nonzero(held_out[:, 1]) < np.count_nonzero(fitted_classifier.trust[:, 1])


@pytest.mark.parametrize("with_embedding", [True, False])
def test_a_sentence_vector_stands_beside_the_embedding(base, with_embedding):
    embedding = find_embedding(base) if with_embedding else None
    _, truth, ids = design_of(embedding, 3)
    told = np.random.default_rng(3).normal(size=(len(ids), 5)).astype(np.float32)
    design = build_design(ids, 60, len(ids), embedding=embedding, sentences=told)
    assert design.meaning.shape[1] == (5 + WIDTH if with_embedding else 5)
    fitted_classifier = fit_classifier(design, examples_of(truth, 3), np.arange(len(ids)))
    tables = fitted_classifier.fold(design, 60, NUM_BUCKETS)
    assert tables.tokens.any() == with_embedding
    got = np.stack([tables.scores(row, vector) for row, vector in zip(ids, told, strict=True)])
    expected = fitted_classifier.scores(design, np.arange(len(ids)))
    np.testing.assert_allclose(softmax(got), softmax(expected), atol=2e-5)


def test_the_wording_learns_only_what_the_meaning_leaves_over():
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2
    # Token 0 or 1 tells the domain in all prompts; the vector tells it in the first half alone.
    ids = [np.array([t, 2, 3 + rng.integers(5), t, 2]) for t in truth]
    told = np.eye(2, dtype=np.float32)[truth] * (np.arange(200) < 100)[:, None]
    design = build_design(ids, 10, 200, sentences=told)
    rows = np.arange(200)
    both = fit_classifier(design, examples_of(truth, 2), rows)
    alone = fit_classifier(
        build_design(ids, 10, 200, sentences=np.zeros_like(told)), examples_of(truth, 2), rows
    )
    assert (both.scores(design, rows).argmax(axis=1) == truth).all()
    assert np.abs(both.wording.weights).sum() < np.abs(alone.wording.weights).sum()


def test_token_vectors_are_centred_partly_whitened_and_weighted(base):
    embedding = find_embedding(base)
    counts = np.ones(embedding.num_rows + 5, dtype=np.int64)
    counts[3] = 100_000
    found = vectors.token_vectors(embedding, vectors.token_weights(counts))
    ids = np.arange(embedding.num_rows)
    rows = found.gather(ids)
    assert np.linalg.norm(rows[3]) < 0.1 * np.linalg.norm(rows, axis=1).mean()
    plain = rows / found.weights[ids]
    spread = np.cov(plain.T)
    raw = np.linalg.eigvalsh(np.cov(embedding.gather(ids).T))[::-1][: len(spread)]
    np.testing.assert_allclose(np.diag(spread) / raw ** (1 - 2 * vectors.WHITENING), 1.0, atol=0.05)
    np.testing.assert_allclose(
        found.project(np.eye(rows.shape[1], dtype=np.float32)), rows, atol=1e-4
    )
    assert not found.gather(ids[-1:] + 1).any()


def test_pairs_of_a_single_prompt_are_unknown():
    design = build_design([np.array([1, 2, 3]), np.array([1, 2, 4])], 10, 2)
    known = design.known(np.arange(2))
    assert np.flatnonzero(known).tolist() == pair_buckets(np.array([1, 2])).tolist()
