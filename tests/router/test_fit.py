"""Fitting on synthetic prompts with a tiny tokenizer and, where said, a tiny embedding."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deltamux.router.decide.features import NUM_BUCKETS, bounded_ids, pair_buckets
from deltamux.router.decide.router import Router
from deltamux.router.decide.tables import Tables, softmax
from deltamux.router.decide.tokenizer import build_encode, load_tokenizer, tokenizer_sha256
from deltamux.router.fit import vectors
from deltamux.router.fit.classifier import Examples, fit_classifier
from deltamux.router.fit.data import Dataset, Prompt
from deltamux.router.fit.design import build_design
from deltamux.router.fit.embedding import EmbeddingRows, find_embedding
from deltamux.router.fit.fit import fit_router
from deltamux.router.fit.head import fit_head

WORDS = {
    "math": ["sum", "product", "apples", "each", "total", "twice", "half", "minus", "equals"],
    "sql": ["table", "column", "join", "select", "rows", "where", "group", "order", "count"],
    "general": [
        "poem",
        "story",
        "weather",
        "friend",
        "holiday",
        "music",
        "travel",
        "joke",
        "hello",
    ],
}
COMMON = [
    "the",
    "a",
    "of",
    "what",
    "is",
    "please",
    "give",
    "me",
    "in",
    "how",
    "many",
    "with",
    "and",
]
WIDTH = 6


def make_prompts(domains=("general", "math", "sql"), count=40, seed=0):
    rng = random.Random(seed)
    return [
        Prompt((" ".join(rng.choices(WORDS[domain], k=3) + rng.choices(COMMON, k=5)),), domain)
        for domain in domains
        for _ in range(count)
    ]


def make_dataset(*args, **kwargs):
    return Dataset(list(dict.fromkeys(make_prompts(*args, **kwargs))), [], 0, [])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a word-level tokenizer and a bfloat16 embedding, one row more than words."""
    directory = tmp_path_factory.mktemp("base")
    words = ["<unk>", *COMMON, *(word for group in WORDS.values() for word in group)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(words) + 1, WIDTH, generator=generator).to(torch.bfloat16)
    save_file({"model.embed_tokens.weight": rows}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def fitted(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("fitted") / "router"
    report = fit_router(make_dataset(), output, base=str(base), experts={"sql": "sql-7"}, keep=0.95)
    return output, report


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
    stored = [t.astype(np.float16).astype(np.float32) for t in (tables.tokens, tables.pairs)]
    half = Tables(*stored, tables.bias)
    # float16 moves a score of order ten by up to 2**-11 of it, and a probability by a quarter of
    # what its score moves.
    got = np.stack([softmax(half.scores(row)) for row in ids])
    np.testing.assert_allclose(got, expected, atol=1e-3)


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


def test_fitted_router_separates_the_domains(fitted, base):
    output, report = fitted
    router = Router.load(output, tokenizer_sha256=tokenizer_sha256(base))
    encode = load_tokenizer(output)
    fresh = make_prompts(count=30, seed=9)
    decisions = [router.decide(prompt.turns, encode) for prompt in fresh]
    right = [made.domain == prompt.domain for made, prompt in zip(decisions, fresh, strict=True)]
    # The embedding is random: only the words themselves tell the domains apart.
    assert np.mean(right) > 0.9
    assert report.config.heldout.accuracy > 0.85
    experts = {made.expert for made in decisions}
    assert experts == {None, "math", "sql-7"}


def test_fitted_configuration_tells_what_it_was_made_of(fitted):
    _, report = fitted
    config = report.config
    assert config.experts == {"general": None, "math": "math", "sql": "sql-7"}
    counts = config.training.prompts
    assert list(counts) == ["general", "math", "sql"]
    assert sum(config.training.mix.values()) == pytest.approx(1, abs=1e-3)
    assert config.heldout.n == sum(counts.values())
    assert config.training.added > 40
    assert config.training.embedding
    assert config.heldout.kept > 0.5
    assert config.override_confidence == 0.95


def test_the_same_seed_fits_the_same_router(fitted, base, tmp_path):
    output, _ = fitted
    fit_router(make_dataset(), tmp_path / "again", base=str(base), experts={"sql": "sql-7"})
    for name in ("router.safetensors", "router_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


def test_held_out_quality_does_not_profit_from_lines_of_held_out_prompts(base, tmp_path):
    # Words say nothing about these domains: only a leak could predict them.
    rng = random.Random(0)
    words = [*COMMON, *(word for group in WORDS.values() for word in group)]

    def line():
        return " ".join(rng.sample(words, 8))

    prompts = [Prompt((f"{line()}\n{line()}",), rng.choice(["math", "sql"])) for _ in range(200)]
    report = fit_router(Dataset(prompts, [], 0, []), tmp_path / "router", base=str(base))
    assert report.config.training.added > 400
    # 0.5 by chance, standard deviation 0.035.
    assert report.config.heldout.accuracy < 0.65


def test_encoding_adds_no_special_tokens(base):
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <unk>", special_tokens=[("<unk>", 0)]
    )
    encode, vocab_size = build_encode(tokenizer.to_str().encode())
    assert encode("the a of") == [1, 2, 3]
    assert vocab_size == tokenizer.get_vocab_size()


def test_follow_ups_alone_are_left_to_the_base(fitted):
    output, _ = fitted
    router = Router.load(output)
    assert router.decide(["hello and thanks"], load_tokenizer(output)).expert is None


def test_without_weights_and_general_domain_deltamux_brings_its_own(base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    report = fit_router(make_dataset(("math", "sql")), tmp_path / "router", base=str(bare))
    assert not report.config.training.embedding
    assert report.config.experts == {"general": None, "math": "math", "sql": "sql"}
    assert report.config.training.mix == {"math": 0.5, "sql": 0.5}
    router, encode = Router.load(tmp_path / "router"), load_tokenizer(tmp_path / "router")
    assert router.decide(["twice the sum of apples"], encode).expert == "math"
    assert router.decide(["poem"], encode).expert is None


def test_the_embedding_is_found_through_an_index(base, tmp_path):
    index = {"weight_map": {"lm_head.weight": "b", "model.embed_tokens.weight": "part-1"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "part-1").write_bytes((base / "model.safetensors").read_bytes())
    embedding = find_embedding(tmp_path)
    assert embedding == EmbeddingRows(
        tmp_path / "part-1", "model.embed_tokens.weight", embedding.num_rows, WIDTH
    )
    last = embedding.num_rows - 1
    rows = embedding.gather(np.array([last, 0, last + 1]))
    np.testing.assert_array_equal(
        rows[:2], embedding.project(np.eye(WIDTH, dtype=np.float32))[[last, 0]]
    )
    assert not rows[2].any()


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (make_dataset(("math",)), {}, "two domains or more"),
        (make_dataset(count=4), {}, "4 different prompts; 5 are the least"),
        (make_dataset(), {"experts": {"law": "x"}}, r"no prompts of the domains \['law'\]"),
        (make_dataset(), {"experts": {"math": "base", "sql": "base"}}, "has an expert"),
        (make_dataset(), {"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        (make_dataset(), {"keep": 1.1}, r"keep must be in \(0, 1\], got 1.1"),
        (make_dataset(), {"max_wrong": 0.0}, r"max_wrong must be in \(0, 1\], got 0.0"),
        (make_dataset(), {"features": "deep"}, "default, encoder or auto, got 'deep'"),
        (make_dataset(), {"minimums": {"sql": 2.0}}, r"'sql' must be in \[0, 1\], got 2.0"),
        (make_dataset(), {"minimums": {"law": 0.5}}, r"no prompts of the domains \['law'\]"),
        (make_dataset(), {"descriptions": {"law": "x"}}, r"no prompts of the domains \['law'\]"),
    ],
)
def test_what_cannot_make_a_router_is_refused(base, tmp_path, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        fit_router(dataset, tmp_path / "router", base=str(base), **options)
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize("name", ["auto", "Auto", "computer science", "Datenbank für Ärzte", "-x"])
def test_a_domain_that_no_expert_can_be_called_needs_one_named(base, tmp_path, name):
    prompts = make_prompts(("math", "general")) + [
        Prompt(prompt.turns, name) for prompt in make_prompts(("sql",))
    ]
    dataset = Dataset(list(dict.fromkeys(prompts)), [], 0, [])
    with pytest.raises(ValueError, match="no expert can be called"):
        fit_router(dataset, tmp_path / "router", base=str(base))
    report = fit_router(dataset, tmp_path / "router", base=str(base), experts={name: "sql"})
    assert report.config.experts[name] == "sql"


@pytest.mark.parametrize("name", ["General", "none", "unknown", "Base", "Other"])
def test_a_domain_of_the_base_is_known_in_any_case(base, tmp_path, name):
    prompts = make_prompts(("math",)) + [
        Prompt(prompt.turns, name) for prompt in make_prompts(("general",))
    ]
    dataset = Dataset(list(dict.fromkeys(prompts)), [], 0, [])
    report = fit_router(dataset, tmp_path / "router", base=str(base))
    assert report.config.experts == {"math": "math", name: None}


def test_a_base_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        fit_router(make_dataset(), tmp_path / "router", base=str(tmp_path))


def copy_router(output, directory):
    for path in output.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return json.loads((directory / "tokenizer.json").read_text())


def test_a_changed_tokenizer_in_the_artifact_is_refused(fitted, tmp_path):
    tokenizer = copy_router(fitted[0], tmp_path)
    words = tokenizer["model"]["vocab"]
    words["poem"], words["story"] = words["story"], words["poem"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="fitted with the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_was_written_otherwise_is_the_same(fitted, tmp_path):
    tokenizer = copy_router(fitted[0], tmp_path)
    turned = dict(reversed(tokenizer.items())) | {"truncation": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(turned, indent=4))
    assert load_tokenizer(tmp_path)("poem") == load_tokenizer(fitted[0])("poem")
