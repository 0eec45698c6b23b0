"""How strongly the wording counts: chosen on held-out kinds of prompts, of training files alone.

python -m benchmarks.routing.kinds --base .demo/base --data DATA
                                   [--features default] [--seeds 2] [--vectors FILE.npz]

A split at random keeps every data set's templates on both sides, so it rewards whatever reads them.
Here a fit does not see, one after the other,

    rows      100 rows of each domain; asked: these, as they stand and bare
    forms     the rows of one form of every domain (`STYLES`); asked: these rows
    domains   two whole domains; asked: their rows, which then belong to no expert
    cluster   one of four k-means clusters of the vectors of each domain's bare rows; asked: its rows
    narrow    all of these clusters but one; asked: the others' rows
    fields    half of the fields that the generated prompts are about, in each of the fits above;
              asked: their prompts, which belong to no expert

Figures of a strength, gain * known ** power: `reached` is the mean share of forms, clusters and narrow
prompts that reach their own expert at the threshold at which 6 % of all prompts of no expert would
reach one; `bare` is the share of bare rows with the right most probable domain; `kept` the share of
domains and fields left to the base at the threshold 0.5. No test file and no other data set is read.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from deltamux.router.decide.features import NUM_BUCKETS, bounded_ids, distinct
from deltamux.router.decide.tables import Tables, softmax
from deltamux.router.decide.tokenizer import build_encode
from deltamux.router.fit.background import subject_prompts
from deltamux.router.fit.classifier import fit_classifier
from deltamux.router.fit.material import design_of, prepare
from deltamux.router.fit.options import Options

STRENGTHS = (
    (0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 2.0), (1.5, 2.0), (2.0, 2.0), (1.0, 3.0),
    (2.0, 3.0), (2.5, 3.0), (2.0, 4.0), (3.0, 4.0),
)  # fmt: skip
ROWS, HELD, PER_KIND, CLUSTERS = 400, 100, 40, 4
BASE = "general"
STRAY = 0.06
Rows = dict[str, list[Row]]


class Asked(NamedTuple):
    """A prompt that a fit did not see, and the domain that is right."""

    kind: str
    domain: str
    text: str


@dataclass(frozen=True)
class Scored:
    """Of one asked prompt: scores of meaning and of wording, float64 [D], and its known share."""

    asked: Asked
    meaning: np.ndarray
    wording: np.ndarray
    known: float


def asks(kind: str, rows: Rows, count: int, also_bare: bool = True) -> list[Asked]:
    """At most `count` rows of each domain, as they stand and bare."""
    whole = [Asked(kind, d, r["prompt"]) for d, own in rows.items() for r in own[:count]]
    short = [Asked(f"{kind} bare", d, bare(d, r)) for d, own in rows.items() for r in own[:count]]
    return whole + short if also_bare else whole


def splits(rows: Rows, encoder: Any, seed: int) -> Iterator[tuple[Rows, list[Asked]]]:
    """What is fitted on, and what is asked."""
    from sklearn.cluster import KMeans

    held = {d: own[:HELD] for d, own in rows.items()}
    yield {d: own[HELD:] for d, own in rows.items()}, asks("rows", held, HELD)
    left = {d: [r for r in rows[d] if STYLES[d](r)] for d in STYLES}
    known = {d: [r for r in own if r not in left.get(d, [])] for d, own in rows.items()}
    yield known, asks("forms", left, HELD, also_bare=False)
    for pair in zip(SPECIALISTS[:3], SPECIALISTS[3:], strict=True):
        out = asks("domains", {d: rows[d] for d in pair}, 2 * HELD)
        yield (
            {d: own for d, own in rows.items() if d not in pair},
            [one._replace(domain=BASE) for one in out],
        )
    numbers = {}
    for domain, own in rows.items():
        vectors = np.stack([encoder.vector(bare(domain, row)) for row in own])
        found = KMeans(CLUSTERS, n_init=3, random_state=seed).fit(vectors).labels_
        largest = np.argsort(-np.bincount(found, minlength=CLUSTERS))
        numbers[domain] = np.argsort(largest)[found]
    for number in (0, 2):
        inside, outside = (
            {d: [r for r, n in zip(own, numbers[d], strict=True) if (n == number) == equal]
             for d, own in rows.items()}
            for equal in (True, False)
        )  # fmt: skip
        yield outside, asks("cluster", inside, PER_KIND)
        yield inside, asks("narrow", outside, PER_KIND)


def scored(
    known: Rows, asked: list[Asked], base: str, encoder: Any, *, seed: int, fields: set[str]
) -> list[Scored]:
    """Fit without some fields, and score what is asked and the prompts of these fields."""
    encode = build_encode(Path(base, "tokenizer.json").read_bytes())[0]
    options = Options(0.95, 0.02, "default", {}, {}, {}, seed)
    material = prepare(dataset(known), base, options, encoded=encoder is not None)
    design = design_of(material, encoder)
    hidden = np.array([example.field in fields for example in material.examples])
    fitted = fit_classifier(design, material.numbers, np.flatnonzero(~hidden))
    tables = fitted.fold(design, material.vocab_size, NUM_BUCKETS)
    asked = asked + [
        Asked("fields", BASE, e.prompt.turns[0]) for e in material.examples if e.field in fields
    ]
    columns = [material.labels.index(d) if d in material.labels else -1 for d in DOMAINS]
    found = []
    for one in asked:
        ids = bounded_ids([encode(one.text)], material.vocab_size)
        parts = _parts(tables, ids, encoder.vector(one.text) if encoder else None)
        spread = [np.where(np.array(columns) < 0, -99.0, part[columns]) for part in parts[:2]]
        spread[1] = np.where(np.array(columns) < 0, 0.0, spread[1])
        found.append(Scored(one, spread[0], spread[1], parts[2]))
    return found


def _parts(tables: Tables, ids: Any, vector: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores of meaning and wording, and the known share of a prompt."""
    bare_tables = Tables(tables.tokens, 0 * tables.pairs[:2], tables.bias, tables.meaning)
    meaning = bare_tables.scores(ids, vector)
    tokens, _ = distinct(ids)
    strength = tables.strength(tokens)
    wording = (tables.scores(ids, vector) - meaning) / strength if strength else 0 * meaning
    weight, known = (
        tables.trust[tokens].sum(axis=0).tolist() if tables.trust is not None else (1, 1)
    )
    return meaning, wording, known / weight if weight else 0.0


def judge(found: list[Scored], gain: float, power: float) -> dict[str, float]:
    """The three figures of one strength."""
    strengths = gain * np.array([one.known for one in found])[:, None] ** power
    p = softmax(
        np.stack([o.meaning for o in found]) + strengths * np.stack([o.wording for o in found])
    )
    kind = np.array([one.asked.kind for one in found])
    right = np.array([DOMAINS.index(one.asked.domain) for one in found])
    best, own = p.argmax(axis=1), right != DOMAINS.index(BASE)
    sure = np.where(best == DOMAINS.index(BASE), 0.0, p.max(axis=1))
    threshold = np.quantile(sure[~own], 1 - STRAY)
    reached = (best == right) & (sure >= threshold) & own
    kinds = ("forms", "cluster", "cluster bare", "narrow", "narrow bare")
    strange = ("domains", "domains bare", "fields")
    return {
        "reached": float(np.mean([reached[(kind == k) & own].mean() for k in kinds])),
        "bare": float((best == right)[kind == "rows bare"].mean()),
        "rows": float((best == right)[kind == "rows"].mean()),
        "kept": float(np.mean([(sure < 0.5)[kind == k].mean() for k in strange])),
    }


def one_seed(files: Rows, arguments: argparse.Namespace, encoder: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    rows = sample(files, ROWS, rng)
    fields = rng.permutation(sorted(set(subject_prompts(0).values())))
    found: list[Scored] = []
    used = encoder if arguments.features == "encoder" else None
    for number, (known, asked) in enumerate(splits(rows, encoder, seed)):
        halves = set(fields[number % 2 :: 2])
        found += scored(known, asked, arguments.base, used, seed=seed, fields=halves)
        print("fit", number + 1, flush=True)
    encoder.keep()
    return {f"{g:g} * known ** {p:g}": judge(found, g, p) for g, p in STRENGTHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=".demo/base")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--features", choices=["default", "encoder"], default="default")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--vectors", type=Path)
    arguments = parser.parse_args()
    files = {name: read_rows(arguments.data / name / "train.jsonl") for name in DOMAINS}
    encoder = Remembering(load_encoder(), arguments.vectors)
    seeds = [one_seed(files, arguments, encoder, seed) for seed in range(arguments.seeds)]
    result = {
        name: {key: float(np.mean([each[name][key] for each in seeds])) for key in seeds[0][name]}
        for name in seeds[0]
    }
    rows = [(name, *(f"{v:.4f}" for v in figures.values())) for name, figures in result.items()]
    print(table(("strength of the wording", "reached", "bare", "rows", "kept"), rows))
    record(f"routing-kinds-{arguments.features}", result)


if __name__ == "__main__":
    main()
