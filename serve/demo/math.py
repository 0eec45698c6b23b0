"""Arithmetic word problems with worked answers, for the demo's math expert.

A problem is a set of wordings, ranges for its numbers, and the steps that solve it, written as
`"x = a * b"`. Numbers are drawn until every step stays a positive whole number.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

NAMES = (
    "Ada", "Amir", "Bella", "Carlos", "Chen", "Dana", "Elif", "Femi", "Grace", "Hugo", "Ines",
    "Jonas", "Kofi", "Lena", "Maya", "Nina", "Omar", "Priya", "Rosa", "Sam", "Tariq", "Uma",
    "Viktor", "Wendy", "Yuki", "Zoe",
)  # fmt: skip
ITEMS = (
    "apples", "books", "buttons", "cards", "cookies", "cups", "envelopes", "erasers", "flowers",
    "keys", "lemons", "marbles", "mugs", "muffins", "notebooks", "oranges", "pencils", "plants",
    "ribbons", "shells", "stamps", "stickers", "tickets", "toys",
)  # fmt: skip
PLACES = ("shop", "market", "school", "library", "museum", "farm", "bakery", "club", "office")
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        wordings: ways to tell it; `{name}`, `{other}`, `{item}`, `{place}` and numbers are filled.
        ranges: for each number, its inclusive bounds.
        steps: pairs of an equation over earlier values and the text that introduces it.
    """

    wordings: tuple[str, ...]
    ranges: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str], ...]


PROBLEMS = (
    Problem(
        (
            "{name} has {a} {item} and buys {b} more at the {place}. How many {item} does {name} "
            "have now?",
            "At the {place}, {name} adds {b} {item} to the {a} already in the basket. What is the "
            "total number of {item}?",
            "{name} counts {a} {item} in the morning and {b} in the evening. How many {item} is "
            "that altogether?",
        ),
        {"a": (5, 79), "b": (3, 60)},
        (("x = a + b", "All the {item}"),),
    ),
    Problem(
        (
            "A {place} starts the day with {a} {item} and gives away {b} of them. How many are "
            "left in the evening?",
            "{name} collected {a} {item} but lost {b} on the way to the {place}. How many {item} "
            "remain?",
            "Of {a} {item} on a shelf at the {place}, {name} takes {b}. Find the number that stay.",
        ),
        {"a": (15, 99), "b": (4, 60)},
        (("x = a - b", "The {item} left"),),
    ),
    Problem(
        (
            "{name} packs {a} boxes with {b} {item} each, then gives {c} {item} to {other}. How "
            "many {item} does {name} keep?",
            "There are {a} bags of {b} {item} at the {place}. {other} takes {c} {item} away. How "
            "many {item} are left?",
            "The {place} sorts {item} into {a} rows of {b}. Later {c} of them are removed. What "
            "number of {item} is still there?",
        ),
        {"a": (2, 9), "b": (3, 12), "c": (2, 20)},
        (("x = a * b", "Before that"), ("y = x - c", "The {item} left")),
    ),
    Problem(
        (
            "{name} buys {a} {item} for {b} dollars each and a bag for {c} dollars. How much does "
            "{name} pay?",
            "One of the {item} costs {b} dollars. {name} takes {a} of them and pays {c} dollars "
            "for delivery. What is the bill?",
            "Work out the cost of {a} {item} at {b} dollars apiece plus a fee of {c} dollars at "
            "the {place}.",
        ),
        {"a": (2, 12), "b": (2, 11), "c": (1, 30)},
        (("x = a * b", "The {item} cost"), ("y = x + c", "The total cost")),
    ),
    Problem(
        (
            "{name} and {other} share {a} {item} and {b} more from the {place} equally among {c} "
            "children. How many {item} does each child get?",
            "{a} red and {b} blue {item} are put into {c} equal groups. How many {item} are in "
            "one group?",
        ),
        {"a": (4, 50), "b": (4, 50), "c": (2, 9)},
        (("x = a + b", "All the {item}"), ("y = x / c", "Each share")),
    ),
    Problem(
        (
            "{name} sells {a} {item} a day at the {place} for {b} days. {other} sells {c} fewer "
            "in the same time. How many {item} do they sell together?",
            "In {b} weeks {name} makes {a} {item} each week. {other} makes {c} fewer in all. What "
            "is their total?",
        ),
        {"a": (3, 12), "b": (2, 7), "c": (2, 20)},
        (
            ("x = a * b", "{name} has"),
            ("y = x - c", "{other} has"),
            ("z = x + y", "Together"),
        ),
    ),
    Problem(
        (
            "A trip of {a} km takes {name} {b} hours by bicycle. How far does {name} ride in {c} "
            "hours at the same speed?",
            "{name} reads {a} pages in {b} hours. At this pace, how many pages are read in {c} "
            "hours?",
            "A machine at the {place} fills {a} bottles in {b} minutes. How many bottles does it "
            "fill in {c} minutes?",
        ),
        {"a": (10, 90), "b": (2, 8), "c": (2, 12)},
        (("x = a / b", "In one unit of time"), ("y = x * c", "In {c} units")),
    ),
    Problem(
        (
            "{name} earns {a} dollars an hour at the {place} and works {b} hours on each of {c} "
            "days. How much money is that?",
            "Each of {c} shelves at the {place} holds {b} crates, and a crate holds {a} {item}. "
            "How many {item} are there?",
        ),
        {"a": (3, 15), "b": (2, 6), "c": (2, 5)},
        (("x = a * b", "For one"), ("y = x * c", "For all {c}")),
    ),
    Problem(
        (
            "{name} saves {a} dollars each week for {b} weeks and then spends {c} dollars on "
            "{item} and {d} dollars on lunch. How much is left?",
            "The {place} receives {b} cartons of {a} {item}. It sells {c} on Monday and {d} on "
            "Tuesday. How many {item} remain?",
        ),
        {"a": (4, 15), "b": (3, 9), "c": (5, 30), "d": (3, 20)},
        (
            ("x = a * b", "At first"),
            ("y = x - c", "After the first part"),
            ("z = y - d", "After the second part"),
        ),
    ),
)


def draw(rng: Random) -> tuple[str, str]:
    """One problem and its worked answer, which ends in `Answer: <number>`."""
    problem = rng.choice(PROBLEMS)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "item": rng.choice(ITEMS), "place": rng.choice(PLACES)}
    values = _draw_numbers(problem, rng)
    filled = {**words, **{key: str(value) for key, value in values.items()}}
    lines = [
        f"{label.format(**filled)}: {_equation(step, values)}." for step, label in problem.steps
    ]
    answer = values[problem.steps[-1][0].split()[0]]
    response = "\n".join([*lines, f"Answer: {answer}"])
    return rng.choice(problem.wordings).format(**filled), response


def _draw_numbers(problem: Problem, rng: Random) -> dict[str, int]:
    """Draw numbers until the problem solves in positive whole numbers; return all of its values."""
    while True:
        values = {key: rng.randint(low, high) for key, (low, high) in problem.ranges.items()}
        if _solve(problem, values):
            return values


def _solve(problem: Problem, values: dict[str, int]) -> bool:
    """Add the result of every step to `values`; return whether all are positive and exact."""
    for step, _ in problem.steps:
        target, _, left, sign, right = step.split()
        if sign == "/" and values[left] % values[right]:
            return False
        values[target] = OPERATORS[sign](values[left], values[right])
    return min(values.values()) > 0


def _equation(step: str, values: dict[str, int]) -> str:
    """A step with its numbers, such as `4 * 6 = 24`."""
    target, _, left, sign, right = step.split()
    return f"{values[left]} {sign} {values[right]} = {values[target]}"
