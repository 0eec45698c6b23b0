"""Fitting a router: labelled prompts in, a router's directory out.

    prepare -> features -> cross-validate -> choose features -> calibrate -> fit all -> fold -> write

Everything that judges or calibrates (temperature, threshold, reported quality, the choice of
features) comes from cross-validated predictions; the classifier that is written is then fitted on
all examples. Generated prompts that the held-out classifier gives to a specialist are left out of
it: the user has an expert for them.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from deltamux.router.decide.artifact import check_target, save_artifact
from deltamux.router.decide.config import EncoderConfig, HeldOut, RouterConfig, Training
from deltamux.router.decide.encoder import SentenceEncoder, load_encoder
from deltamux.router.decide.features import NUM_BUCKETS, PREFIX_TOKENS, SUFFIX_TOKENS
from deltamux.router.decide.policy import Mask
from deltamux.router.decide.tables import Probabilities, Tables
from deltamux.router.fit.calibration import (
    fit_threshold,
    specialist_scores,
    threshold_for,
    wrong_expert,
)
from deltamux.router.fit.crossval import NUM_FOLDS
from deltamux.router.fit.data import Dataset, fingerprints
from deltamux.router.fit.head import fit_head, fold
from deltamux.router.fit.material import Material, prepare
from deltamux.router.fit.metrics import Labels, quality
from deltamux.router.fit.options import Features, Options
from deltamux.router.fit.trials import Trial, better, try_default, try_encoder

#: A generated prompt that a specialist claims with this probability is the user's, not the base's.
CLAIMED: Final = 0.5


@dataclass(frozen=True)
class FitReport:
    """What was written: the configuration, and the bytes of all files.

    `log_loss` has the cross-validated loss of each kind of features that was tried, in nats an
    example.
    """

    config: RouterConfig
    num_bytes: int
    log_loss: dict[str, float]


def fit_router(
    dataset: Dataset,
    output: Path,
    *,
    base: str,
    keep: float = 0.95,
    max_wrong: float = 0.02,
    features: Features = "default",
    experts: Mapping[str, str] | None = None,
    descriptions: Mapping[str, str] | None = None,
    minimums: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FitReport:
    """Fit a router and write it.

    Args:
        dataset: Labelled prompts.
        output: Directory to write; an earlier router there is replaced.
        base: Directory or hub id of the served base: its tokenizer makes the token ids; its input
            embedding, where weights are there, adds features.
        keep: Share of the specialists' own held-out prompts that must reach their expert, in (0, 1].
        max_wrong: Largest share of held-out prompts that a wrong expert may answer, in (0, 1]; the
            threshold is raised until it holds, whatever becomes of `keep`.
        features: "default", "encoder", or "auto" for the better of both in cross-validation.
        experts: Expert of a domain, where it is not called like the domain; "base" for none.
        descriptions: One line about a domain.
        minimums: Domain to the probability that its expert needs, where that is more than the
            threshold.
        seed: Of folds, views and subsets.
        progress: Show a bar.

    Raises:
        FileNotFoundError: The base has no tokenizer.
        ValueError: An argument or the data cannot make a router, scikit-learn or the
            encoder is missing, or the output holds something else.
    """
    options = Options(
        keep, max_wrong, features, experts or {}, descriptions or {}, minimums or {}, seed
    )
    options.check()
    check_target(output)
    _require_scikit_learn()
    encoder = load_encoder() if options.features != "default" else None
    material = prepare(dataset, base, options)
    with tqdm(total=NUM_FOLDS + 1, desc="fit", disable=not progress, leave=False) as bar:
        trials = [try_default(material, options.seed, bar)]
        if encoder is not None:
            trials.append(try_encoder(trials[0], material, encoder, options.seed))
        best = better(trials, material.numbers.truth) if options.features == "auto" else trials[-1]
        tables = _fit_all(best, material)
        bar.update()
    config = _configure(dataset, material, best, options, encoder)
    seen = np.unique(fingerprints(dataset.prompts))
    num_bytes = save_artifact(
        output, tables, config, material.tokenizer, seen=seen, stack=best.stack
    )
    truth = material.numbers.truth
    losses: dict[str, float] = {t.kind: round(float(t.losses(truth).mean()), 5) for t in trials}
    return FitReport(config, num_bytes, losses)


def _generated(material: Material) -> Mask:
    """Bool [N], True for examples that stem from no labelled prompt."""
    return np.array([example.generated for example in material.examples], dtype=np.bool_)


def _fit_all(trial: Trial, material: Material) -> Tables:
    """The classifier on all examples but the generated ones that an expert claims."""
    best = specialist_scores(trial.probabilities, material.specialists)
    described = material.specialists[material.numbers.truth]
    kept = np.flatnonzero(~_generated(material) | described | (best < CLAIMED))
    head = fit_head(material.numbers.training(trial.design).take(kept))
    return fold(trial.design, head, material.vocab_size)


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
    own = trial.probabilities[:num_labelled]
    threshold = max(
        fit_threshold(own, truth[:num_labelled], specialists, options.keep),
        threshold_for(trial.probabilities, truth, specialists, options.max_wrong),
    )
    return RouterConfig(
        labels=material.labels,
        experts=material.experts,
        features=trial.kind,
        encoder=_encoder_config(trial, encoder),
        threshold=threshold,
        minimums=dict(sorted(options.minimums.items())),
        temperature=trial.temperature,
        vocab_size=material.vocab_size,
        buckets=NUM_BUCKETS,
        prefix_tokens=PREFIX_TOKENS,
        suffix_tokens=SUFFIX_TOKENS,
        tokenizer_sha256=hashlib.sha256(material.tokenizer).hexdigest(),
        training=_training(dataset, material, options),
        heldout=_judge(trial.probabilities, truth, num_labelled, specialists, threshold),
    )


def _encoder_config(trial: Trial, encoder: SentenceEncoder | None) -> EncoderConfig | None:
    """What the configuration says about the encoder."""
    if encoder is None or trial.stack is None:
        return None
    stack = trial.stack
    return EncoderConfig(
        sha256=encoder.sha256, temperature=stack.temperature, ask_below=stack.ask_below
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
