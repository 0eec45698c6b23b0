import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.choice.measure import measure
from deltamux.compression.choice.selection import (
    STRETCH_BOUNDS,
    STRETCHES,
    Job,
    Rungs,
    least_of_parabola,
)
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.recipe import AllocationRecipe, Recipe
from deltamux.compression.streaming.text import random_samples

TEXT = random_samples(272, count=6, length=32)
HELD_OUT = random_samples(272, count=10, length=32)[6:]


@pytest.fixture(scope="module")
def make_rungs(make_pair, tmp_path_factory):
    """Rungs of the small pair under a limit of bits."""

    def make(bits):
        root = tmp_path_factory.mktemp("rungs")
        difference = compare(*(open_checkpoint(path) for path in make_pair()))
        recipe = Recipe(allocation=AllocationRecipe(bits=bits))
        work = Workspace(root / "work", {})
        measured = measure(difference, recipe, TEXT, work, progress=False)
        (root / "artifact").mkdir()
        job = Job(difference, recipe, root / "artifact", HELD_OUT, progress=False)
        return Rungs(job, work, measured)

    return make


@given(st.floats(*STRETCH_BOUNDS), st.floats(0.0, 1.0), st.floats(0.1, 100.0), st.floats(1e-6, 1e3))
def test_the_least_value_of_a_parabola_is_found(factor, least, bend, unit):
    values = [unit * (least + bend * (x - factor) ** 2) for x in STRETCHES]
    found, value = least_of_parabola(values)
    assert found == pytest.approx(factor, abs=1e-4)
    assert value == pytest.approx(unit * least, abs=1e-6 * unit * (1 + bend))


def test_a_parabola_is_not_followed_beyond_its_bounds():
    values = [(x - 3.0) ** 2 for x in STRETCHES]
    factor, value = least_of_parabola(values)
    assert factor == STRETCH_BOUNDS[1]
    assert value == pytest.approx((STRETCH_BOUNDS[1] - 3.0) ** 2)


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 1.0, 1.0]])
def test_without_a_bend_upwards_the_least_measured_value_counts(values):
    factor, value = least_of_parabola(values)
    assert (factor, value) == (STRETCHES[values.index(min(values))], min(values))


def test_the_stretch_lowers_the_divergence_on_the_text_that_it_was_measured_on(make_rungs):
    rungs = make_rungs(0.5)
    choice, factor = rungs.select(TEXT)
    own = rungs.job.reference_on(TEXT)

    def divergence(stretch):
        job = Job(rungs.job.difference, rungs.job.recipe, rungs.job.target, TEXT, progress=False)
        return job.compared(rungs.write(choice, rungs.stretched(stretch))).kl

    assert factor != 1.0
    predicted = rungs.best_stretch(choice, own)[1]
    assert divergence(factor) == pytest.approx(predicted, rel=0.1)
    assert divergence(factor) <= divergence(1.0)


def test_without_text_to_compare_on_nothing_is_stretched(make_rungs):
    rungs = make_rungs(1.0)
    assert rungs.select([])[1] == 1.0
