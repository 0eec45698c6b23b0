"""Kinds of features, cross-validated: the tables alone, and with a sentence encoder's opinion."""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from deltamux.router.decide.encoder import SentenceEncoder, join
from deltamux.router.decide.second_opinion import ASK_BELOW, Stack, fit_stack
from deltamux.router.decide.tables import Probabilities, softmax
from deltamux.router.fit.calibration import fit_temperature
from deltamux.router.fit.crossval import held_out_scores
from deltamux.router.fit.design import Design, build_design, dense_length
from deltamux.router.fit.material import Material
from deltamux.router.fit.metrics import Labels
from deltamux.router.fit.options import Kind

#: Examples that the encoder reads of those that it will be asked about; half as many of the others.
MAX_ENCODED: Final = 1500
#: Examples of each domain that it reads at least.
MIN_ENCODED: Final = 16


@dataclass(frozen=True)
class Trial:
    """One kind of features, cross-validated.

    Attributes:
        kind: The features.
        design: Of all N examples.
        scores: Float64 [N, D], held out, of the tables, divided by `temperature`.
        temperature: Of the tables.
        probabilities: Float64 [N, D], held out and calibrated.
        stack: The second classifier, with features "encoder".
    """

    kind: Kind
    design: Design
    scores: Probabilities
    temperature: float
    probabilities: Probabilities
    stack: Stack | None = None

    def losses(self, truth: Labels) -> Probabilities:
        """Return -log of the true domain's probability, float64 [N]."""
        own = self.probabilities[np.arange(len(truth)), truth]
        return np.asarray(-np.log(np.maximum(own, 1e-12)))


def try_default(material: Material, seed: int, bar: Any) -> Trial:
    """Cross-validate the tables.

    Args:
        material: What to fit on.
        seed: Of the folds.
        bar: Its `update` is called after each fold.
    """
    typical = material.num_labelled / len(set(material.numbers.truth[: material.num_labelled]))
    design = build_design(material.ids, material.embedding, dense_length(typical))
    scores = held_out_scores(design, material.numbers, seed, bar)
    labelled = slice(material.num_labelled)
    temperature = fit_temperature(scores[labelled], material.numbers.truth[labelled])
    scores /= temperature
    return Trial("default", design, scores, temperature, softmax(scores))


def try_encoder(default: Trial, material: Material, encoder: SentenceEncoder, seed: int) -> Trial:
    """Cross-validate the encoder's opinion on the prompts that are not plain to the tables.

    Args:
        default: The tables' trial.
        material: What to fit on.
        encoder: The sentence encoder.
        seed: Of the folds and of the examples that are read.
    """
    rng = np.random.default_rng(seed)
    best = default.probabilities.max(axis=1)
    unsure, plain = np.flatnonzero(best < ASK_BELOW), np.flatnonzero(best >= ASK_BELOW)
    truth = material.numbers.truth
    chosen = [rng.permutation(unsure)[:MAX_ENCODED], rng.permutation(plain)[: MAX_ENCODED // 2]]
    chosen += [
        rng.permutation(np.flatnonzero(truth == domain))[:MIN_ENCODED]
        for domain in range(len(material.labels))
    ]
    rows = np.unique(np.concatenate(chosen))
    prompts = [material.examples[row].prompt for row in rows]
    vectors = np.stack([join([encoder.vector(turn) for turn in p.turns]) for p in prompts])
    asked = best[rows] < ASK_BELOW
    stack, scores = fit_stack(
        default.scores[rows], vectors, material.numbers, rows, asked=asked, seed=seed
    )
    probabilities = default.probabilities.copy()
    probabilities[rows[asked]] = softmax(scores[asked])
    return replace(default, kind="encoder", probabilities=probabilities, stack=stack)


def better(trials: list[Trial], truth: Labels) -> Trial:
    """Return the default features unless the encoder's loss is smaller by two standard errors.

    The encoder costs a hundred times the time of a decision; chance alone must not choose it.
    """
    first, *others = trials
    for other in others:
        gains = first.losses(truth) - other.losses(truth)
        if gains.mean() > 2 * gains.std() / np.sqrt(len(gains)):
            first = other
    return first
