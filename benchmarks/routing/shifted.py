"""Prompts that are put in other words: the router against other routers, one table.

python -m benchmarks.routing.shifted --base .demo/base --data DATA --shifted DIR
                                     [--seeds 3] [--vectors FILE.npz]

DIR has other data sets, NAME.jsonl with rows of `prompt`: NAME begins with the domain whose expert
should answer ("medical pubmedqa") or with "none" where no expert should ("none legal"). Nothing is
fitted on them, nor on the test files. The routers:

    deltamux        features "default" and "encoder", as a user gets them
    MiniLM + LR     logistic regression (C = 1) on the same encoder's vectors, 250 prompts a domain
    MiniLM mean     the nearest mean vector, of the same prompts
    TF-IDF + LR     words and pairs of words, 1,000 prompts a domain

The last three always choose the most probable domain. For deltamux `right`, `wrong` and `kept` are of
decisions, abstaining included; accuracy is of the most probable domain. `curve` has the same at other
thresholds. A router of the field that needs weights from a hub cannot be run here.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from benchmarks.routing.data import DOMAINS, SPECIALISTS, Corpus, bare, dataset, read_corpus, sample
from benchmarks.routing.vectors import Remembering
from deltamux.router.console import table
from deltamux.router.decide.encoder import load_encoder
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit import fit
from deltamux.router.fit.metrics import calibration_error
from deltamux.router.fit.options import Options

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PER_SET = 300
PER_DOMAIN = 150
Probabilities = Callable[[list[str]], np.ndarray]


class Judged:
    """Probabilities over `DOMAINS` for every prompt, and the threshold of the router."""

    def __init__(self, probabilities: Probabilities, threshold: float) -> None:
        self.probabilities, self.threshold = probabilities, threshold


def deltamux(corpus: Corpus, base: str, features: Any, seed: int, encoder: Any) -> Judged:
    folder = Path(tempfile.mkdtemp()) / "router"
    config = fit.fit_router(
        dataset(corpus.train), folder, Options(features=features, seed=seed), base=base
    ).config
    router, encode = Router.load(folder), load_tokenizer(folder)
    if encoder is not None:
        router = Router(config, router.tables, encoder)

    def probabilities(texts: list[str]) -> np.ndarray:
        conversations = [router.read([text], encode) for text in texts]
        return np.stack([router.score(each, 0, 0) for each in conversations])

    return Judged(probabilities, config.threshold)


def on_vectors(corpus: Corpus, encoder: Any, seed: int, mean: bool) -> Judged:
    from sklearn.linear_model import LogisticRegression

    rows = sample(corpus.train, 250, np.random.default_rng(seed))
    vectors = np.stack([encoder.vector(row["prompt"]) for d in DOMAINS for row in rows[d]])
    truth = np.repeat(np.arange(len(DOMAINS)), [len(rows[d]) for d in DOMAINS])
    if mean:
        means = np.stack([vectors[truth == d].mean(axis=0) for d in range(len(DOMAINS))])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        return Judged(lambda texts: np.stack([encoder.vector(t) for t in texts]) @ means.T, -1.0)
    model = LogisticRegression(C=1, max_iter=1000).fit(vectors, truth)
    return Judged(
        lambda texts: model.predict_proba(np.stack([encoder.vector(t) for t in texts])), 0.0
    )


def on_words(corpus: Corpus, seed: int) -> Judged:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = sample(corpus.train, 1000, np.random.default_rng(seed))
    texts = [row["prompt"] for d in DOMAINS for row in rows[d]]
    truth = np.repeat(np.arange(len(DOMAINS)), [len(rows[d]) for d in DOMAINS])
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=5, max_iter=300, class_weight="balanced"))
    return Judged(model.fit(texts, truth).predict_proba, 0.0)


def judge(judged: Judged, corpus: Corpus, seed: int) -> dict[str, Any]:
    """Every figure of one router."""
    test = sample(corpus.test, PER_DOMAIN, np.random.default_rng(seed))
    found: dict[str, Any] = {"threshold": judged.threshold}
    for name, form in (("", lambda _, row: row["prompt"]), ("bare_", bare)):
        texts = [form(d, row) for d in DOMAINS for row in test[d]]
        truth = np.repeat(np.arange(len(DOMAINS)), [len(test[d]) for d in DOMAINS])
        p = judged.probabilities(texts)
        right = p.argmax(axis=1) == truth
        found[f"{name}accuracy"] = float(right.mean())
        if p.min() >= 0:
            found[f"{name}ece"] = calibration_error(p.max(axis=1), right)
    asked = {
        name: judged.probabilities(list(dict.fromkeys(texts))[:PER_SET])
        for name, texts in corpus.shifted.items()
    }
    found["sets"] = {name: outcome(p, name, judged.threshold) for name, p in asked.items()}
    found["curve"] = {
        str(t): {name: outcome(p, name, t) for name, p in asked.items()} for t in THRESHOLDS
    }
    kept = [each["right"] for name, each in found["sets"].items() if name.startswith("none")]
    found["kept_worst"] = min(kept)
    return found


def outcome(probabilities: np.ndarray, name: str, threshold: float) -> dict[str, float]:
    """Shares of a set's prompts: right, and to a wrong specialist."""
    best = probabilities.argmax(axis=1)
    special = np.array([DOMAINS[b] in SPECIALISTS for b in best])
    routed = special & (probabilities.max(axis=1) >= threshold)
    own = name.split(maxsplit=1)[0]
    if own == "none":
        return {"right": float((~routed).mean()), "wrong": float(routed.mean())}
    mine = best == DOMAINS.index(own)
    return {"right": float((routed & mine).mean()), "wrong": float((routed & ~mine).mean())}


def mean(figures: list[Any]) -> Any:
    if isinstance(figures[0], dict):
        return {key: mean([each[key] for each in figures]) for key in figures[0]}
    return round(float(np.mean(figures)), 4)


def show(results: dict[str, Any]) -> None:
    names = list(results)
    sets = list(results[names[0]]["sets"])
    rows: list[tuple[str, ...]] = [
        (line, *(f"{results[n].get(line, float('nan')):.3f}" for n in names))
        for line in ("accuracy", "bare_accuracy", "ece", "bare_ece", "kept_worst", "threshold")
    ]
    for one in sets:
        cells = [results[n]["sets"][one] for n in names]
        rows.append((one, *(f"{c['right']:.2f} / {c['wrong']:.2f}" for c in cells)))
    print(table(("right / wrong", *names), rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=".demo/base")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shifted", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vectors", type=Path)
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.data, arguments.shifted)
    encoder: Any = Remembering(load_encoder(), arguments.vectors)
    fit.load_encoder = lambda: encoder
    results: dict[str, list[Any]] = {}
    for seed in range(arguments.seeds):
        for name, make in {
            "default": lambda s: deltamux(corpus, arguments.base, "default", s, None),
            "encoder": lambda s: deltamux(corpus, arguments.base, "encoder", s, encoder),
            "MiniLM + LR": lambda s: on_vectors(corpus, encoder, s, mean=False),
            "MiniLM mean": lambda s: on_vectors(corpus, encoder, s, mean=True),
            "TF-IDF + LR": lambda s: on_words(corpus, s),
        }.items():
            results.setdefault(name, []).append(judge(make(seed), corpus, seed))
            print("seed", seed, flush=True)
            show({name: results[name][-1]})
            encoder.keep()
    figures = {name: mean(each) | {"seeds": each} for name, each in results.items()}
    show(figures)
    record("routing-shifted", figures)


if __name__ == "__main__":
    main()
