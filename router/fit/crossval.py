"""Cross-validation: predictions for examples that the classifier had not seen.

Prompts that share a context (several questions about one table) must not be on both sides of a
split, nor an example and the prompt it stems from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.tables import Probabilities
from deltamux.router.fit.data import Prompt
from deltamux.router.fit.design import Design
from deltamux.router.fit.head import TrainingSet, fit_head
from deltamux.router.fit.metrics import Labels

NUM_FOLDS: Final = 3
#: A context shorter than this ("Table:") is a frame, and says nothing about kinship.
MIN_CONTEXT_CHARS: Final = 20


@dataclass(frozen=True)
class Examples:
    """Examples as numbers.

    Attributes:
        truth: Int64 [N], domain of each example.
        weights: Float64 [N], how much it counts within its domain.
        origins: Int64 [N], the prompt that it stems from.
        groups: Int64 [number of origins], the context of each such prompt.
    """

    truth: Labels
    weights: Probabilities
    origins: Labels
    groups: Labels

    def training(self, design: Design) -> TrainingSet:
        """All examples, to fit on."""
        return TrainingSet(design.columns, self.truth, self.weights, int(self.truth.max()) + 1)


def context_groups(prompts: Sequence[Prompt]) -> Labels:
    """Number prompts by their context: all lines of the first turn but the last.

    Args:
        prompts: A prompt of one line, or with a short context, is a group of its own.

    Returns:
        Int64 [N].
    """
    numbers: dict[str, int] = {}
    groups = []
    for index, prompt in enumerate(prompts):
        context = prompt.turns[0].rstrip().rpartition("\n")[0].strip()
        key = context if len(context) >= MIN_CONTEXT_CHARS else f"\0{index}"
        groups.append(numbers.setdefault(key, len(numbers)))
    return np.array(groups, dtype=np.int64)


def held_out_scores(design: Design, examples: Examples, seed: int, bar: Any) -> Probabilities:
    """Return the scores of every example by a classifier that did not see its origin's group.

    Args:
        design: Features of the examples.
        examples: Their labels.
        seed: Of the folds.
        bar: Its `update` is called after each fold.

    Returns:
        Float64 [N, D].
    """
    training = examples.training(design)
    num_domains = int(examples.truth.max()) + 1
    scores = np.zeros((len(examples.truth), num_domains))
    groups = examples.groups[examples.origins]
    for held_out in folds(examples, seed):
        inside = np.isin(groups, held_out)
        rows, out = np.flatnonzero(~inside), np.flatnonzero(inside)
        head = fit_head(training.take(rows))
        scores[out] = head.scores(design.columns[out])
        bar.update()
    return scores


def folds(examples: Examples, seed: int) -> Iterator[Labels]:
    """Groups of each held-out fold; every domain has its share in each, as far as groups allow.

    The groups of a domain, in random order, go to the fold that has least of the domain.
    """
    rng = np.random.default_rng(seed)
    num_groups = int(examples.groups.max()) + 1
    domains = np.zeros(num_groups, dtype=np.int64)
    groups = examples.groups[examples.origins]
    domains[groups] = examples.truth
    sizes = np.bincount(groups, minlength=num_groups)
    loads = np.zeros((int(domains.max()) + 1, NUM_FOLDS))
    folds = np.zeros(num_groups, dtype=np.int64)
    for group in rng.permutation(num_groups):
        fold = int(np.argmin(loads[domains[group]]))
        folds[group] = fold
        loads[domains[group], fold] += sizes[group]
    for fold in range(NUM_FOLDS):
        yield np.flatnonzero(folds == fold)
