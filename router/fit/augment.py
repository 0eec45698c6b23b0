"""All training examples of a fit: the labelled prompts, and what deltamux adds to them.

- views of the labelled prompts (`frames.py`), under their labels;
- generic follow-ups (`followups.py`) and everyday requests (`everyday.py`), for the base;
- the description of a domain, where the user gives one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.fit.data import Prompt
from deltamux.router.fit.everyday import everyday_prompts
from deltamux.router.fit.followups import followups
from deltamux.router.fit.frames import make_views

#: What a generated prompt counts beside a labelled one. Between 0.05 and 1 the cross-validated
#: figures barely differ.
GENERATED_WEIGHT: Final = 0.25
#: Generated prompts of each kind, to the labelled prompts of a typical domain: a few labelled
#: prompts must not drown among generated ones. With 16 of them, 1 instead of 0.25 costs bare prompts
#: of the training files four points.
GENERATED_RATIO: Final = 0.25
#: A description says more than one prompt does.
DESCRIPTION_WEIGHT: Final = 3.0


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        prompt: Turns and domain.
        origin: Number of the prompt that it is or stems from. Examples of one origin must not be on
            both sides of a cross-validation split. Labelled prompts come first, in their order.
        weight: How much it counts within its domain.
        generated: It stems from no labelled prompt.
    """

    prompt: Prompt
    origin: int
    weight: float
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
    examples = [Example(prompt, index, 1.0) for index, prompt in enumerate(prompts)]
    for view in make_views(prompts, seed):
        prompt = Prompt((view.text,), prompts[view.origin].domain)
        examples.append(Example(prompt, view.origin, view.weight))
    generated = [(Prompt((text,), name), DESCRIPTION_WEIGHT) for name, text in descriptions.items()]
    fallback = next((domain for domain, expert in experts.items() if expert is None), None)
    if fallback is not None:
        texts = _generated(prompts, len(experts), seed)
        generated += [(Prompt((text,), fallback), GENERATED_WEIGHT) for text in texts]
    first = len(prompts)
    examples += [
        Example(prompt, first + index, weight, generated=True)
        for index, (prompt, weight) in enumerate(generated)
    ]
    return examples


def _generated(prompts: Sequence[Prompt], num_domains: int, seed: int) -> list[str]:
    """Follow-ups and everyday prompts, in number like the prompts of one domain."""
    rng = np.random.default_rng(seed)
    limit = max(1, round(GENERATED_RATIO * len(prompts) / num_domains))
    texts: list[str] = []
    for pool in (followups(), everyday_prompts(seed)):
        chosen = np.sort(rng.permutation(len(pool))[:limit])
        texts += [pool[index] for index in chosen]
    return texts
