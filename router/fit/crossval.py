"""Cross-validation: predictions for examples that the classifier had not seen.

Prompts that share a context (several questions about one table) must not be on both sides of a
split, nor an example and the prompt it stems from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.tables import Probabilities
from deltamux.router.fit.classifier import Examples, fit_classifier
from deltamux.router.fit.data import Prompt
from deltamux.router.fit.design import Design
from deltamux.router.fit.metrics import Labels

# Chosen, not measured.
NUM_FOLDS: Final = 3
# A context shorter than this ("Table:") is a frame, and says nothing about kinship. Chosen,
# not measured.
MIN_CONTEXT_CHARS: Final = 20


@dataclass(frozen=True)
class Kinship:
    """Which examples must stay together.

    Attributes:
        origins: Int64 [N], the prompt that each example stems from.
        groups: Int64 [number of origins], the context of each such prompt.
    """

    origins: Labels
    groups: Labels

    @property
    def contexts(self) -> Labels:
        """Int64 [N], the context of each example."""
        return self.groups[self.origins]


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


def held_out_scores(
    design: Design, examples: Examples, kinship: Kinship, seed: int, bar: Any
) -> Probabilities:
    """Return the scores of every example by a classifier that did not see its context.

    Args:
        design: Features of the examples.
        examples: Their labels.
        kinship: Their contexts.
        seed: Of the folds.
        bar: Its `update` is called after each fold.

    Returns:
        Float64 [N, D].
    """
    scores = np.zeros((len(examples.truth), examples.num_domains))
    contexts = kinship.contexts
    for held_out in folds(examples.truth, contexts, seed):
        inside = np.isin(contexts, held_out)
        rows, out = np.flatnonzero(~inside), np.flatnonzero(inside)
        scores[out] = fit_classifier(design, examples, rows).scores(design, out)
        bar.update()
    return scores


def folds(truth: Labels, contexts: Labels, seed: int) -> Iterator[Labels]:
    """Contexts of each held-out fold; every domain has its share in each, as far as they allow.

    The contexts of a domain, in random order, go to the fold that has least of the domain.
    """
    rng = np.random.default_rng(seed)
    num_contexts = int(contexts.max()) + 1
    domains = np.zeros(num_contexts, dtype=np.int64)
    domains[contexts] = truth
    sizes = np.bincount(contexts, minlength=num_contexts)
    loads = np.zeros((int(domains.max()) + 1, NUM_FOLDS))
    chosen = np.zeros(num_contexts, dtype=np.int64)
    for context in rng.permutation(num_contexts):
        fold = int(np.argmin(loads[domains[context]]))
        chosen[context] = fold
        loads[domains[context], fold] += sizes[context]
    for fold in range(NUM_FOLDS):
        yield np.flatnonzero(chosen == fold)
