"""All training examples of a fit: the labelled prompts, and what deltamux adds to them.

- views of the labelled prompts (`frames.py`), under their labels;
- prompts that belong to no expert (`background.py`), for the base;
- the description of a domain, where the user gives one.

The wording learns from all of them. The meaning learns from the prompts as they were given: a line
without its frame ("What was the best album in 1965?" of a question about a table) is known by its
wording where it is familiar, and would claim every question like it where it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.fit.background import everyday_prompts, followups, subject_prompts
from deltamux.router.fit.data import Prompt
from deltamux.router.fit.frames import FOREIGN_WEIGHT, make_views

#: What a generated prompt counts beside a labelled one. Between 0.05 and 1 the cross-validated
#: figures barely differ.
GENERATED_WEIGHT: Final = 0.25
#: Generated prompts of each kind, to the labelled prompts of a typical domain: a few labelled
#: prompts must not drown among generated ones. With 16 of them, 1 instead of 0.25 costs bare prompts
#: of the training files four points. More than so many of a kind change nothing.
GENERATED_RATIO: Final = 0.25
MAX_GENERATED: Final = 400
#: A description says more than one prompt does.
DESCRIPTION_WEIGHT: Final = 3.0
#: What a view counts for the meaning, beside a labelled prompt.
VIEW_MEANING: Final = 0.03


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        prompt: Turns and domain.
        origin: Number of the prompt that it is or stems from. Examples of one origin must not be on
            both sides of a cross-validation split. Labelled prompts come first, in their order.
        weight: How much its wording counts within its domain.
        meaning: How much its meaning counts within its domain.
        generated: It stems from no labelled prompt.
    """

    prompt: Prompt
    origin: int
    weight: float
    meaning: float
    generated: bool = False


def augment(
    prompts: Sequence[Prompt],
    experts: Mapping[str, str | None],
    descriptions: Mapping[str, str],
    seed: int = 0,
) -> list[Example]:
    """Return the labelled prompts in their order, then their views, then generated prompts.

    Args:
        prompts: Labelled prompts.
        experts: Domain to expert; None for domains that the base answers.
        descriptions: One line about a domain; may be empty.
        seed: Of views and of the choice among generated prompts.
    """
    examples = [Example(prompt, index, 1.0, 1.0) for index, prompt in enumerate(prompts)]
    for view in make_views(prompts, seed):
        prompt = Prompt((view.text,), prompts[view.origin].domain)
        meaning = 0.0 if view.weight == FOREIGN_WEIGHT else VIEW_MEANING
        examples.append(Example(prompt, view.origin, view.weight, meaning))
    generated = [(Prompt((text,), name), DESCRIPTION_WEIGHT) for name, text in descriptions.items()]
    fallback = next((domain for domain, expert in experts.items() if expert is None), None)
    if fallback is not None:
        texts = _generated(prompts, len(experts), seed)
        generated += [(Prompt((text,), fallback), GENERATED_WEIGHT) for text in texts]
    first = len(prompts)
    examples += [
        Example(prompt, first + index, weight, weight, generated=True)
        for index, (prompt, weight) in enumerate(generated)
    ]
    return examples


def _generated(prompts: Sequence[Prompt], num_domains: int, seed: int) -> list[str]:
    """Follow-ups, everyday prompts and subjects, each kind in number like a part of a domain's."""
    rng = np.random.default_rng(seed)
    limit = min(MAX_GENERATED, max(1, round(GENERATED_RATIO * len(prompts) / num_domains)))
    texts: list[str] = []
    for pool in (followups(), everyday_prompts(seed), subject_prompts(seed)):
        chosen = np.sort(rng.permutation(len(pool))[:limit])
        texts += [pool[index] for index in chosen]
    return texts
