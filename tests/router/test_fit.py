"""Fitting on synthetic prompts with a tiny tokenizer and, where said, a tiny embedding."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import build_encode, load_tokenizer, tokenizer_sha256
from deltamux.router.fit.data import Dataset, Prompt
from deltamux.router.fit.embedding import EmbeddingRows, find_embedding
from deltamux.router.fit.fit import fit_router
from deltamux.router.fit.options import Options

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
    report = fit_router(make_dataset(), output, Options(experts={"sql": "sql-7"}), base=str(base))
    return output, report


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
    fit_router(
        make_dataset(), tmp_path / "again", Options(experts={"sql": "sql-7"}), base=str(base)
    )
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
        fit_router(dataset, tmp_path / "router", Options(**options), base=str(base))
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize("name", ["auto", "Auto", "computer science", "Datenbank für Ärzte", "-x"])
def test_a_domain_that_no_expert_can_be_called_needs_one_named(base, tmp_path, name):
    prompts = make_prompts(("math", "general")) + [
        Prompt(prompt.turns, name) for prompt in make_prompts(("sql",))
    ]
    dataset = Dataset(list(dict.fromkeys(prompts)), [], 0, [])
    with pytest.raises(ValueError, match="no expert can be called"):
        fit_router(dataset, tmp_path / "router", base=str(base))
    report = fit_router(
        dataset, tmp_path / "router", Options(experts={name: "sql"}), base=str(base)
    )
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
