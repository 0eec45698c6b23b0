import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.choose import choose
from deltamux.compression.choice.fixed import fixed_weights
from deltamux.compression.choice.measure import measure
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.tune import (
    STRETCH_BOUNDS,
    TRIED_STRETCHES,
    best_stretch,
    least_of_parabola,
    tune,
)
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.recipe import AllocationRecipe, Recipe
from deltamux.compression.streaming.moments import InputMoments
from deltamux.compression.streaming.text import random_samples

TEXT = random_samples(272, count=6, length=32)
HELD_OUT = random_samples(272, count=10, length=32)[6:]


@pytest.fixture(scope="module")
def make_candidates(make_pair, tmp_path_factory):
    """The candidates of the small pair under a limit of bits."""

    def make(bits, text=TEXT):
        root = tmp_path_factory.mktemp("candidates")
        difference = compare(*(open_checkpoint(path) for path in make_pair()))
        recipe = Recipe(allocation=AllocationRecipe(bits=bits, slot_bits=20.0))
        work = Workspace(root / "work", {})
        ladders = measure(
            difference, recipe, InputMoments(difference.expert, TEXT), work, progress=False
        )
        task = Task.of(difference, recipe, text, HELD_OUT, progress=False)
        return Candidates(task, work, ladders, fixed_weights(difference, recipe.embedding))

    return make


@given(st.floats(*STRETCH_BOUNDS), st.floats(0.0, 1.0), st.floats(0.1, 100.0), st.floats(1e-6, 1e3))
def test_the_least_value_of_a_parabola_is_found(factor, least, bend, unit):
    values = [unit * (least + bend * (x - factor) ** 2) for x in TRIED_STRETCHES]
    found, value = least_of_parabola(values)
    assert found == pytest.approx(factor, abs=1e-4)
    assert value == pytest.approx(unit * least, abs=1e-6 * unit * (1 + bend))


def test_a_parabola_is_not_followed_beyond_its_bounds():
    values = [(x - 3.0) ** 2 for x in TRIED_STRETCHES]
    factor, value = least_of_parabola(values)
    assert factor == STRETCH_BOUNDS[1]
    assert value == pytest.approx((STRETCH_BOUNDS[1] - 3.0) ** 2)


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 1.0, 1.0]])
def test_without_a_bend_upwards_the_least_measured_value_counts(values):
    factor, value = least_of_parabola(values)
    assert (factor, value) == (TRIED_STRETCHES[values.index(min(values))], min(values))


def test_the_stretch_lowers_the_divergence_on_the_text_that_it_was_measured_on(make_candidates):
    candidates = make_candidates(0.5)
    choice = choose(candidates)
    factor = best_stretch(candidates, choice)
    assert factor != 1.0
    predicted = least_of_parabola(
        [candidates.divergence(choice, each) for each in TRIED_STRETCHES]
    )[1]
    assert candidates.divergence(choice, factor) == pytest.approx(predicted, rel=0.1)
    assert candidates.divergence(choice, factor) <= candidates.divergence(choice, 1.0)


def test_a_divergence_is_measured_once(make_candidates, monkeypatch):
    candidates = make_candidates(0.5)
    choice = choose(candidates)
    first = candidates.divergence(choice, TRIED_STRETCHES[1])
    monkeypatch.setattr(candidates.task.trial, "divergence", None)
    assert candidates.divergence(choice, TRIED_STRETCHES[1]) == first


def test_without_text_to_compare_on_nothing_is_stretched(make_candidates):
    candidates = make_candidates(1.0, text=[])
    assert set(tune(candidates, choose(candidates)).values()) == {1.0}


def test_a_choice_is_evaluated_as_it_is_written(make_candidates, tmp_path):
    from deltamux.compression.artifact.artifact import Artifact
    from deltamux.compression.artifact.merge import reconstructed
    from deltamux.compression.artifact.write import write_artifact

    candidates = make_candidates(0.5)
    choice = choose(candidates)
    factors = candidates.evenly(1.07)
    difference = candidates.task.difference
    write_artifact(
        difference, candidates.task.recipe, candidates.encoded(choice, factors), tmp_path
    )
    weights = candidates.weights(choice, factors)
    written = reconstructed(Artifact(tmp_path), difference.base)
    for spec in difference.specs:
        assert (weights(spec.name) == written(spec.name)).all()
