"""Fitting a router: labelled prompts in, a router's directory out.

    augment -> tokenize -> features -> cross-validate -> calibrate -> fit all -> fold -> write

Everything that judges or calibrates (temperature, threshold, reported quality) comes from
cross-validated predictions; the classifier that is written is then fitted on all prompts.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from deltamux.router.artifact import check_target, save_artifact
from deltamux.router.augment import augment
from deltamux.router.base import resolve_base
from deltamux.router.calibration import fit_temperature, fit_threshold, specialist_scores
from deltamux.router.config import FALLBACK_DOMAINS, HeldOut, RouterConfig, Training
from deltamux.router.data import Dataset, Prompt
from deltamux.router.decision import BASE_NAME
from deltamux.router.embedding import find_embedding
from deltamux.router.features import (
    NUM_BUCKETS,
    PREFIX_TOKENS,
    SUFFIX_TOKENS,
    Ids,
    bounded_ids,
)
from deltamux.router.head import TrainingSet, build_design, fit_head, fold
from deltamux.router.metrics import Labels, quality
from deltamux.router.policy import Mask
from deltamux.router.tables import Probabilities, softmax
from deltamux.router.tokenizer import Encode, build_encode, read_tokenizer

NUM_FOLDS: Final = 5


@dataclass(frozen=True)
class FitReport:
    """What was written: the configuration, and the bytes of all files."""

    config: RouterConfig
    num_bytes: int


def fit_router(
    dataset: Dataset,
    output: Path,
    *,
    base: str,
    keep: float = 0.95,
    experts: Mapping[str, str] | None = None,
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
        experts: Expert of a domain, where it is not called like the domain; "base" for none.
        seed: Of the folds and of the projection of a wide embedding.
        progress: Show a bar.

    Raises:
        FileNotFoundError: The base has no tokenizer.
        ValueError: An argument or the data cannot make a router, scikit-learn is missing, or the
            output holds something else.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    check_target(output)
    _require_sklearn()
    mapping = assign_experts(dataset, experts or {})
    labels = list(mapping)
    specialists = np.array([expert is not None for expert in mapping.values()], dtype=np.bool_)

    base_directory = resolve_base(base)
    tokenizer = read_tokenizer(base_directory)
    embedding = find_embedding(base_directory)
    encode, vocab_size = build_encode(tokenizer)
    vocab_size = max(vocab_size, embedding.num_rows if embedding else 0)

    examples = augment(dataset.prompts, mapping)
    ids = [_encode_prompt(example.prompt, encode, vocab_size) for example in examples]
    truth = np.array([labels.index(example.prompt.domain) for example in examples], dtype=np.int64)
    weights = np.array([example.weight for example in examples])
    origins = np.array([example.origin for example in examples])
    labelled = truth[: len(dataset.prompts)]

    with tqdm(total=NUM_FOLDS + 1, desc="fit", disable=not progress, leave=False) as bar:
        design = build_design(ids, embedding, seed)
        training = TrainingSet(design.matrix, truth, weights)
        scores = np.zeros((len(labelled), len(labels)))
        for held_out in _folds(labelled, seed):
            rows = np.flatnonzero(~np.isin(origins, held_out))
            scores[held_out] = fit_head(training.take(rows), seed).scores(design.matrix[held_out])
            bar.update()
        tables = fold(design, fit_head(training, seed), embedding, vocab_size)
        bar.update()
    temperature = fit_temperature(scores, labelled)
    probabilities = softmax(scores, temperature)
    threshold = fit_threshold(probabilities, labelled, specialists, keep)

    config = RouterConfig(
        labels=labels,
        experts=mapping,
        threshold=threshold,
        temperature=temperature,
        vocab_size=vocab_size,
        buckets=NUM_BUCKETS,
        prefix_tokens=PREFIX_TOKENS,
        suffix_tokens=SUFFIX_TOKENS,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        training=_training(
            dataset, len(examples) - len(labelled), embedding is not None, seed, keep
        ),
        heldout=_judge(probabilities, labelled, specialists, threshold),
    )
    return FitReport(config, save_artifact(output, tables, config, tokenizer))


def assign_experts(dataset: Dataset, experts: Mapping[str, str]) -> dict[str, str | None]:
    """Give every domain of the data its expert, sorted by domain.

    Raises:
        ValueError: The data or the names cannot make a router.
    """
    counts = Counter(prompt.domain for prompt in dataset.prompts)
    if len(counts) < 2:
        raise ValueError(f"a router needs prompts of two domains or more, got {sorted(counts)}")
    for domain, count in counts.items():
        if count < NUM_FOLDS:
            raise ValueError(
                f"domain {domain!r} has {count} different prompts; {NUM_FOLDS} are the least that "
                "can be cross-validated, and 64 a sensible start"
            )
    if unknown := set(experts) - set(counts):
        raise ValueError(f"no prompts of the domains {sorted(unknown)}; known: {sorted(counts)}")
    mapping: dict[str, str | None] = {}
    for domain in sorted(counts):
        expert = experts.get(domain, BASE_NAME if domain in FALLBACK_DOMAINS else domain)
        mapping[domain] = None if expert == BASE_NAME else expert
    if not any(mapping.values()):
        raise ValueError(f"no domain of {sorted(counts)} has an expert; name one: DOMAIN=EXPERT")
    return mapping


def _require_sklearn() -> None:
    """Say how to get scikit-learn, before any work."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "fitting a router needs scikit-learn; run: pip install 'deltamux[router]'"
        ) from error


def _encode_prompt(prompt: Prompt, encode: Encode, vocab_size: int) -> Ids:
    """Token ids of all turns, as the router sees them."""
    return bounded_ids([encode(turn) for turn in prompt.turns], vocab_size)


def _folds(truth: Labels, seed: int) -> Iterator[Labels]:
    """Row numbers of each held-out fold; every domain has its share in each."""
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    for _, held_out in folds.split(np.zeros(len(truth)), truth):
        yield held_out


def _judge(
    probabilities: Probabilities, truth: Labels, specialists: Mask, threshold: float
) -> HeldOut:
    """Held-out quality for the configuration."""
    result = quality(probabilities.argmax(axis=1), probabilities.max(axis=1), truth)
    own = specialist_scores(probabilities, specialists)[specialists[truth]]
    return HeldOut(
        accuracy=round(result.accuracy, 4),
        macro_f1=round(result.macro_f1, 4),
        ece=round(result.ece, 4),
        kept=round(float((own >= threshold).mean()), 4),
        n=result.n,
    )


def _training(
    dataset: Dataset, num_added: int, embedding: bool, seed: int, keep: float
) -> Training:
    """Counts for the configuration."""
    counts = Counter(prompt.domain for prompt in dataset.prompts)
    return Training(
        prompts=dict(sorted(counts.items())),
        mix={name: round(n / counts.total(), 4) for name, n in sorted(counts.items())},
        added=num_added,
        embedding=embedding,
        seed=seed,
        keep=keep,
    )
