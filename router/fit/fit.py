"""Fitting a router: labelled prompts in, a router's directory out.

    prepare -> features -> cross-validate -> calibrate -> fit all -> fold -> write

Everything that judges or calibrates (temperature, threshold, reported quality) comes from
cross-validated predictions; the classifier that is written is then fitted on all examples. Generated prompts that the held-out classifier gives to a specialist are left out of
it: the user has an expert for them.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from deltamux.router.decide.artifact import check_target, save_artifact
from deltamux.router.decide.config import EncoderConfig, HeldOut, RouterConfig, Training
from deltamux.router.decide.encoder import SentenceEncoder, load_encoder
from deltamux.router.decide.features import NUM_BUCKETS, PREFIX_TOKENS, SUFFIX_TOKENS
from deltamux.router.decide.tables import Mask, Probabilities, Tables, softmax
from deltamux.router.decide.tokenizer import identity
from deltamux.router.fit.calibration import (
    fit_temperature,
    fit_threshold,
    specialist_scores,
    wrong_expert,
)
from deltamux.router.fit.classifier import fit_classifier
from deltamux.router.fit.crossval import NUM_FOLDS, held_out_scores
from deltamux.router.fit.data import Dataset, fingerprints
from deltamux.router.fit.design import Design
from deltamux.router.fit.material import Material, design_of, prepare
from deltamux.router.fit.metrics import Labels, quality
from deltamux.router.fit.options import Features, Options

# A generated prompt that a specialist claims with this probability is the user's, not the base's.
# Chosen, not measured.
CLAIMED: Final = 0.5


@dataclass(frozen=True)
class FitReport:
    """What was written: the configuration, and the bytes of all files.

    `log_loss` is the cross-validated loss, in nats an example.
    """

    config: RouterConfig
    num_bytes: int
    log_loss: float


def fit_router(
    dataset: Dataset,
    output: Path,
    options: Options | None = None,
    *,
    base: str,
    progress: bool = False,
) -> FitReport:
    """Fit a router and write it.

    Args:
        dataset: Labelled prompts.
        output: Directory to write; an earlier router there is replaced.
        options: Bounds, features, names and descriptions; None: the defaults.
        base: Directory or hub id of the served base: its tokenizer makes the token ids; its input
            embedding, where weights are there, adds features.
        progress: Show a bar.

    Raises:
        FileNotFoundError: The base has no tokenizer.
        ValueError: An argument or the data cannot make a router, scikit-learn or the
            encoder is missing, or the output holds something else.
    """
    options = options or Options()
    options.check()
    check_target(output)
    _require_scikit_learn()
    encoder = _encoder(options.features)
    material = prepare(dataset, base, options, encoded=encoder is not None)
    with tqdm(total=NUM_FOLDS + 2, desc="fit", disable=not progress, leave=False) as bar:
        design = design_of(material, encoder)
        bar.update()
        trial = _try(design, material, options.seed, bar)
        tables = _fit_all(trial, design, material)
        bar.update()
    config = _configure(dataset, material, trial, options, encoder)
    seen = np.unique(fingerprints(dataset.prompts))
    num_bytes = save_artifact(output, tables, config, material.tokenizer, seen=seen)
    return FitReport(config, num_bytes, _log_loss(trial.probabilities, material.numbers.truth))


def _log_loss(probabilities: Probabilities, truth: Labels) -> float:
    own = probabilities[np.arange(len(truth)), truth]
    return round(-float(np.log(np.maximum(own, 1e-12)).mean()), 5)


@dataclass(frozen=True)
class Trial:
    """What cross-validation gave: float64 [N, D] calibrated probabilities, and their temperature."""

    probabilities: Probabilities
    temperature: float


def _encoder(features: Features) -> SentenceEncoder | None:
    """The encoder that the features ask for."""
    if features == "default":
        return None
    try:
        return load_encoder()
    except ValueError:
        if features == "encoder":
            raise
        return None


def _try(design: Design, material: Material, seed: int, bar: Any) -> Trial:
    """Cross-validate, and calibrate on the labelled prompts."""
    scores = held_out_scores(design, material.numbers, material.kinship, seed, bar)
    labelled = slice(material.num_labelled)
    temperature = fit_temperature(scores[labelled], material.numbers.truth[labelled])
    return Trial(softmax(scores, temperature), temperature)


def _generated(material: Material) -> Mask:
    """Bool [N], True for examples that stem from no labelled prompt."""
    return np.array([example.generated for example in material.examples], dtype=np.bool_)


def _fit_all(trial: Trial, design: Design, material: Material) -> Tables:
    """The classifier on all examples but the generated ones that an expert claims."""
    best = specialist_scores(trial.probabilities, material.specialists)
    described = material.specialists[material.numbers.truth]
    kept = np.flatnonzero(~_generated(material) | described | (best < CLAIMED))
    classifier = fit_classifier(design, material.numbers, kept)
    return classifier.fold(design, material.vocab_size, NUM_BUCKETS)


def _configure(
    dataset: Dataset,
    material: Material,
    trial: Trial,
    options: Options,
    encoder: SentenceEncoder | None,
) -> RouterConfig:
    """Threshold, reported quality and everything else in `router_config.json`."""
    truth, num_labelled = material.numbers.truth, material.num_labelled
    specialists = material.specialists
    threshold = fit_threshold(
        trial.probabilities,
        truth,
        specialists,
        _generated(material) & ~specialists[truth],
        num_labelled,
        keep=options.keep,
        max_wrong=options.max_wrong,
    )
    return RouterConfig(
        labels=material.labels,
        experts=material.experts,
        features="default" if encoder is None else "encoder",
        encoder=None if encoder is None else EncoderConfig(sha256=encoder.sha256),
        threshold=threshold,
        minimums=dict(sorted(options.minimums.items())),
        temperature=trial.temperature,
        vocab_size=material.vocab_size,
        buckets=NUM_BUCKETS,
        prefix_tokens=PREFIX_TOKENS,
        suffix_tokens=SUFFIX_TOKENS,
        tokenizer_sha256=identity(material.tokenizer),
        training=_training(dataset, material, options),
        heldout=_judge(trial.probabilities, truth, num_labelled, specialists, threshold),
    )


def _judge(
    probabilities: Probabilities,
    truth: Labels,
    num_labelled: int,
    specialists: Mask,
    threshold: float,
) -> HeldOut:
    """Held-out quality for the configuration."""
    own, labels = probabilities[:num_labelled], truth[:num_labelled]
    result = quality(own.argmax(axis=1), own.max(axis=1), labels)
    best = specialist_scores(own, specialists)
    wrong = wrong_expert(probabilities, truth, specialists, threshold)
    return HeldOut(
        accuracy=round(result.accuracy, 4),
        macro_f1=round(result.macro_f1, 4),
        ece=round(result.ece, 4),
        kept=round(float((best >= threshold)[specialists[labels]].mean()), 4),
        wrong=round(float(wrong.mean()), 4),
        abstained=round(float((best < threshold).mean()), 4),
        confidence=round(float(own.max(axis=1).mean()), 4),
        n=result.n,
    )


def _training(dataset: Dataset, material: Material, options: Options) -> Training:
    """Counts for the configuration."""
    counts = Counter(prompt.domain for prompt in dataset.prompts)
    return Training(
        prompts=dict(sorted(counts.items())),
        mix={name: round(n / counts.total(), 4) for name, n in sorted(counts.items())},
        added=len(material.examples) - material.num_labelled,
        embedding=material.embedding is not None,
        seed=options.seed,
        keep=options.keep,
        max_wrong=options.max_wrong,
    )


def _require_scikit_learn() -> None:
    """Say how to get scikit-learn, before any work."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "fitting a router needs scikit-learn; run: pip install 'deltamux[router]'"
        ) from error
