"""How strongly the wording is held back: chosen on held-out kinds of prompts, of training files alone.

python -m benchmarks.routing.kinds --base .demo/base --data DATA
                                   [--features default] [--seeds 3]

A split at random keeps every data set's templates on both sides, so it rewards whatever reads them.
Here a fit does not see, one after the other,

    forms     the rows of one form of every domain (`STYLES`); asked: these rows
    domains   two whole domains; asked: their rows, which then belong to no expert
    rows      150 rows of each domain; asked: these, as they stand and bare

and each setting of `classifier.Settings` is judged by the share of prompts that come out right: the
own domain for `forms` and `rows`, no specialist for `domains`. Of the settings within a point of
the best `forms`, the product has the one with the best mean. No test file and no other data set is read.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from benchmarks.routing.data import (
    DOMAINS,
    SPECIALISTS,
    STYLES,
    Row,
    bare,
    dataset,
    read_rows,
    sample,
)
from benchmarks.routing.vectors import Remembering
from deltamux.router.console import table
from deltamux.router.decide.encoder import load_encoder
from deltamux.router.decide.features import NUM_BUCKETS, bounded_ids
from deltamux.router.decide.tokenizer import build_encode
from deltamux.router.fit.classifier import Settings, fit_classifier
from deltamux.router.fit.material import design_of, prepare
from deltamux.router.fit.options import Options

WORDING_PENALTIES = (2.0, 0.5, 0.125, 0.03)
ROWS = 450
Rows = dict[str, list[Row]]
Asked = list[tuple[str, str, str]]


def splits(rows: Rows) -> Iterator[tuple[Rows, Asked]]:
    """What is fitted on, and what is asked: kind, domain that is right, text."""
    known = {d: [r for r in own if d not in STYLES or not STYLES[d](r)] for d, own in rows.items()}
    asked = [("forms", d, r["prompt"]) for d in STYLES for r in rows[d] if STYLES[d](r)]
    yield known, asked
    for first, second in zip(SPECIALISTS[:3], SPECIALISTS[3:], strict=True):
        left = {d: own for d, own in rows.items() if d not in (first, second)}
        yield left, [("domains", "general", r["prompt"]) for d in (first, second) for r in rows[d]]
    held = {d: own[:150] for d, own in rows.items()}
    asked = [("rows", d, r["prompt"]) for d, own in held.items() for r in own]
    asked += [("bare rows", d, bare(d, r)) for d, own in held.items() for r in own]
    yield {d: own[150:] for d, own in rows.items()}, asked


def judge(rows: Rows, base: str, encoder: Any, seed: int) -> dict[float, dict[str, float]]:
    """Share of right answers by setting and kind."""
    tokenizer = Path(base, "tokenizer.json").read_bytes()
    encode = build_encode(tokenizer)[0]
    right: dict[float, dict[str, list[bool]]] = {}
    for known, asked in splits(rows):
        options = Options(0.95, 0.02, "default", {}, {}, {}, seed)
        material = prepare(dataset(known), base, options, encoded=encoder is not None)
        design = design_of(material, encoder)
        everything = np.arange(len(material.examples))
        for penalty in WORDING_PENALTIES:
            settings = Settings(wording_penalty=penalty)
            fitted = fit_classifier(design, material.numbers, everything, settings)
            tables = fitted.fold(design, material.vocab_size, NUM_BUCKETS)
            found = right.setdefault(penalty, {})
            for kind, domain, text in asked:
                ids = bounded_ids([encode(text)], material.vocab_size)
                vector = encoder.vector(text) if encoder else None
                best = material.labels[int(np.argmax(tables.scores(ids, vector)))]
                found.setdefault(kind, []).append(best == domain)
    return {
        key: {kind: float(np.mean(v)) for kind, v in found.items()} for key, found in right.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=".demo/base")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--features", choices=["default", "encoder"], default="default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vectors", type=Path)
    arguments = parser.parse_args()
    files = {name: read_rows(arguments.data / name / "train.jsonl") for name in DOMAINS}
    encoder = (
        Remembering(load_encoder(), arguments.vectors) if arguments.features == "encoder" else None
    )
    figures = [
        judge(sample(files, ROWS, np.random.default_rng(seed)), arguments.base, encoder, seed)
        for seed in range(arguments.seeds)
    ]
    if encoder is not None:
        encoder.keep()
    kinds = ("forms", "domains", "rows", "bare rows")
    result = {}
    for penalty in figures[0]:
        means = {k: float(np.mean([f[penalty][k] for f in figures])) for k in kinds}
        result[f"wording penalty {penalty:g}"] = means | {
            "mean": float(np.mean(list(means.values())))
        }
    rows = [(name, *(f"{v:.4f}" for v in means.values())) for name, means in result.items()]
    print(table(("setting", *kinds, "mean"), rows))
    record(f"routing-kinds-{arguments.features}", result)


if __name__ == "__main__":
    main()
