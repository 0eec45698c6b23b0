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

# What a generated prompt counts beside a labelled one. Between 0.05 and 1 the cross-validated
# figures barely differ.
GENERATED_WEIGHT: Final = 0.25
# Generated prompts of each kind, to the labelled prompts of a typical domain: a few labelled
# prompts must not drown among generated ones. With 16 of them, 1 instead of 0.25 costs bare prompts
# of the training files four points. More than so many of a kind change nothing.
GENERATED_RATIO: Final = 0.25
MAX_GENERATED: Final = 400
# A description says more than one prompt does. Chosen, not measured.
DESCRIPTION_WEIGHT: Final = 3.0
# All views of a domain count for its meaning like so many labelled prompts: with few prompts they
# are worth as much as these, with many nearly nothing. Chosen, not measured.
VIEWS_LIKE: Final = 12


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
        field: What a generated prompt is about; a fold holds out whole fields. Empty: unknown.
    """

    prompt: Prompt
    origin: int
    weight: float
    meaning: float
    generated: bool = False
    field: str = ""


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
    counted = min(1.0, VIEWS_LIKE * len({prompt.domain for prompt in prompts}) / len(prompts))
    for view in make_views(prompts, seed):
        prompt = Prompt((view.text,), prompts[view.origin].domain)
        meaning = 0.0 if view.weight == FOREIGN_WEIGHT else counted
        examples.append(Example(prompt, view.origin, view.weight, meaning))
    described = [(Prompt((text,), name), "") for name, text in descriptions.items()]
    generated = []
    fallback = next((domain for domain, expert in experts.items() if expert is None), None)
    if fallback is not None:
        found = _generated(prompts, len(experts), seed)
        generated = [(Prompt((text,), fallback), field) for text, field in found.items()]
    for number, (prompt, field) in enumerate(described + generated, start=len(prompts)):
        weight = DESCRIPTION_WEIGHT if number < len(prompts) + len(described) else GENERATED_WEIGHT
        examples.append(Example(prompt, number, weight, weight, generated=True, field=field))
    return examples


def _generated(prompts: Sequence[Prompt], num_domains: int, seed: int) -> dict[str, str]:
    """Follow-ups, everyday prompts and subjects with their fields, as many of each kind."""
    rng = np.random.default_rng(seed)
    limit = min(MAX_GENERATED, max(1, round(GENERATED_RATIO * len(prompts) / num_domains)))
    fields = subject_prompts(seed)
    found: dict[str, str] = {}
    for pool in (followups(), everyday_prompts(seed), list(fields)):
        chosen = np.sort(rng.permutation(len(pool))[:limit])
        found |= {pool[index]: fields.get(pool[index], "") for index in chosen}
    return found
