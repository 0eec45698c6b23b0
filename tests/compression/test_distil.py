import math

import pytest
import torch
from safetensors.torch import load_file

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import reconstructed
from deltamux.compression.artifact.write import write_artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.choice import distil as distil_module
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.choose import choose
from deltamux.compression.choice.distil import MAX_STRETCH, Student, distil
from deltamux.compression.choice.fixed import fixed_weights
from deltamux.compression.choice.measure import measure
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.compress import compress
from deltamux.compression.evaluate import Reference
from deltamux.compression.recipe import AllocationRecipe, DistillationRecipe, LinearRecipe, Recipe
from deltamux.compression.streaming.forward import batches
from deltamux.compression.streaming.moments import InputMoments
from deltamux.compression.streaming.text import random_samples

TEXT = random_samples(272, count=6, length=24)
STEPS = DistillationRecipe(passes=8, learning_rate=0.05)
RECIPES = {
    "coded": Recipe(allocation=AllocationRecipe(bits=3.0, slot_bits=20.0)),
    "salient": Recipe(linear=LinearRecipe(scheme="int2", salient_channels=4)),
}


@pytest.fixture(scope="module", params=RECIPES)
def chosen(request, make_pair, tmp_path_factory):
    """(candidates, a choice of them)."""
    base, expert = (open_checkpoint(root) for root in make_pair("qwen2"))
    recipe, difference = RECIPES[request.param], compare(base, expert)
    work = Workspace(tmp_path_factory.mktemp("distil") / "work", {})
    ladders = measure(
        difference, recipe, InputMoments(difference.expert, TEXT), work, progress=False
    )
    task = Task.of(difference, recipe, TEXT, [], progress=False)
    candidates = Candidates(task, work, ladders, fixed_weights(difference, recipe.embedding))
    return candidates, choose(candidates)


@pytest.fixture(scope="module")
def student(chosen):
    """(student, the weights it starts from, base, expert)."""
    candidates, choice = chosen
    difference = candidates.task.difference
    found = Student.of(candidates, choice)
    return found, candidates.weights(choice), difference.base, difference.expert


def shrunken(student, factor):
    """A student of which only a share of each delta is left."""
    whole = dict.fromkeys(student.names, 1.0)

    def scaled(factors):
        return student.scaled({n: share * factor for n, share in (whole | factors).items()})

    return Student(scaled, lambda name: student.delta(name) * factor, student.names)


def divergence(student, expert, factors):
    """KL in nats per predicting position, and its slopes."""
    teacher = distil_module._Teacher(expert, list(batches(TEXT, distil_module.BATCH_TOKENS)))
    return distil_module._gradient(student, factors, teacher, expert)


@pytest.mark.parametrize("log_factor", [0.0, 0.2])
def test_slopes_are_the_derivatives_of_the_divergence_in_the_log_factors(student, log_factor):
    found, _, _, expert = student
    factors = dict.fromkeys(found.names, math.exp(log_factor))
    _, slopes = divergence(found, expert, factors)
    largest = max(abs(slope) for slope in slopes.values())
    width = 0.005
    for name in found.names[::3]:
        around = [
            divergence(found, expert, factors | {name: factors[name] * math.exp(shift)})[0]
            for shift in (-width, width)
        ]
        numeric = (around[1] - around[0]) / (2 * width)
        # The next term of the central difference, and float32 losses that nearly cancel.
        assert slopes[name] == pytest.approx(numeric, rel=0.01, abs=0.003 * largest)


def test_the_divergence_is_that_of_the_evaluation(student):
    found, weights, base, expert = student
    kl, _ = divergence(found, expert, dict.fromkeys(found.names, 1.0))
    wanted = Reference(base, expert, TEXT, progress=False).divergence(weights)
    # The same float32 sums in another order.
    assert kl == pytest.approx(wanted, rel=1e-4)


def test_several_batches_give_the_slopes_of_one(student, monkeypatch):
    found, _, _, expert = student
    factors = dict.fromkeys(found.names, 1.0)
    kl, slopes = divergence(found, expert, factors)
    monkeypatch.setattr(distil_module, "BATCH_TOKENS", 48)
    kl_in_parts, slopes_in_parts = divergence(found, expert, factors)
    assert kl_in_parts == pytest.approx(kl, rel=1e-4)
    assert slopes_in_parts == pytest.approx(slopes, rel=1e-3, abs=1e-5)


def test_distillation_lowers_the_divergence_on_its_text(student):
    found, _, _, expert = student
    factors = distil(found, expert, TEXT, STEPS, progress=False)
    before, _ = divergence(found, expert, dict.fromkeys(found.names, 1.0))
    after, _ = divergence(found, expert, factors)
    assert after < before


def test_a_shrunken_delta_is_stretched_again(student):
    found, _, _, expert = student
    small = shrunken(found, 0.7)
    factors = distil(small, expert, TEXT, STEPS, progress=False)
    before, _ = divergence(small, expert, dict.fromkeys(found.names, 1.0))
    after, _ = divergence(small, expert, factors)
    assert after < 0.8 * before
    assert sum(factors.values()) / len(factors) > 1.1


def test_distillation_never_raises_the_divergence(student):
    found, _, _, expert = student
    wild = DistillationRecipe(passes=2, learning_rate=100.0)
    assert distil(found, expert, TEXT, wild, progress=False) == dict.fromkeys(found.names, 1.0)


def test_factors_stay_within_their_bounds(student):
    found, _, _, expert = student
    tiny = shrunken(found, 0.2)
    wild = DistillationRecipe(passes=4, learning_rate=3.0)
    factors = distil(tiny, expert, TEXT, wild, progress=False).values()
    assert max(factors) == pytest.approx(MAX_STRETCH)
    assert min(factors) >= 1 / MAX_STRETCH * (1 - 1e-6)


def test_factors_scale_the_named_deltas_alone(student):
    found, _, base, _ = student
    named, *others = found.names
    plain, scaled = found.scaled({}), found.scaled({named: 1.5})
    # The salient channels of a fixed width are in 16 bit and keep what they are.
    wanted = plain(named) + 0.5 * found.delta(named)
    torch.testing.assert_close(scaled(named), wanted, rtol=1e-6, atol=1e-7)
    rest = set(base.files) - {named}
    assert rest > set(others)
    assert all(torch.equal(scaled(name), plain(name)) for name in rest)


@pytest.fixture(scope="module")
def distilled(chosen, student, tmp_path_factory):
    """(factors, an artifact without and one with them)."""
    candidates, choice = chosen
    factors = {name: 1 + 0.3 * math.sin(i + 1) for i, name in enumerate(student[0].names)}
    root = tmp_path_factory.mktemp("distilled")
    for name, applied in (("plain", {}), ("scaled", factors)):
        (root / name).mkdir()
        weights = candidates.encoded(choice, applied)
        write_artifact(candidates.task.difference, candidates.task.recipe, weights, root / name)
    return factors, Artifact(root / "plain"), Artifact(root / "scaled")


def test_factors_are_written_into_the_steps_alone(distilled):
    before, after = (load_file(found.root / "model.safetensors") for found in distilled[1:])
    assert after.keys() == before.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {f"{name}.steps" for name in distilled[0]}


def test_what_is_written_is_what_was_learned(student, distilled):
    found, factors = student[0], distilled[0]
    written, learned = reconstructed(distilled[2], student[2]), found.scaled(factors)
    for name in found.names:
        # Steps are rounded to 8 significant bits, at 2^-8 of the coded delta.
        coded = found.delta(name).abs() * factors[name] * 2**-8
        assert ((written(name) - learned(name)).abs() <= coded + 1e-6).all()


def test_distillation_has_text_that_codes_were_not_fitted_to():
    text = random_samples(272, 9, 8)
    task = Task.of(None, Recipe(distillation=STEPS), text, [])
    assert task.fitted == text[:7]
    assert task.learned == text[7:]


def test_too_little_text_serves_both():
    text = random_samples(272, 3, 8)
    task = Task.of(None, Recipe(distillation=STEPS), text, [])
    assert task.fitted == task.learned == text


def test_without_distillation_all_text_is_fitted_to():
    text = random_samples(272, 9, 8)
    assert Task.of(None, Recipe(), text, []).fitted == text


def test_an_expert_equal_to_its_base_has_nothing_to_learn(make_pair, tmp_path):
    base = open_checkpoint(make_pair()[0])
    recipe = Recipe(distillation=STEPS)
    compress(base, base, tmp_path / "a", recipe, calibration=TEXT, held_out=TEXT, progress=False)
    assert Artifact(tmp_path / "a").manifest.verification["kl"] == 0
