import re
import shutil
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.matrices import FactoredEntry
from deltamux.compression.artifact.write import linear_weights, write_artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import Difference, compare
from deltamux.compression.choice.candidates import Candidates
from deltamux.compression.choice.choose import (
    LOW_RANK_COST,
    check_measurable,
    choose_within,
    importances,
    rate_curves,
)
from deltamux.compression.choice.fixed import fixed_weights
from deltamux.compression.choice.measure import measure
from deltamux.compression.choice.problem import predicted_loss
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.compress import compress
from deltamux.compression.evaluate import evaluate
from deltamux.compression.names import WEIGHTS_FILE
from deltamux.compression.recipe import (
    AllocationRecipe,
    EmbeddingRecipe,
    Importance,
    LinearRecipe,
    Method,
    Recipe,
)
from deltamux.compression.streaming.fisher import output_sensitivity
from deltamux.compression.streaming.moments import InputMoments
from deltamux.compression.streaming.text import random_samples

TEXT = random_samples(272, count=6, length=32)
HELD_OUT = random_samples(272, count=10, length=32)[6:]
# Records and padding take most of a slot of matrices so small.
WIDE_SLOT = 20.0
ROOMY = Recipe(allocation={"slot_bits": WIDE_SLOT})
BITS = (0.05, 0.2, 0.5, 1.0, 2.0, 3.3, 8.0)


@dataclass
class Case:
    """A measured pair, to be written under many limits."""

    difference: Difference
    work: Workspace
    target: object
    recipe: Recipe = ROOMY

    def __post_init__(self):
        ladders = measure(
            self.difference,
            self.recipe,
            InputMoments(self.difference.expert, TEXT),
            self.work,
            progress=False,
        )
        fixed = fixed_weights(self.difference, EmbeddingRecipe())
        task = Task.of(self.difference, self.recipe, TEXT, HELD_OUT, progress=False)
        self.candidates = Candidates(task, self.work, ladders, fixed)
        costs = importances(Importance.ENERGY, ladders, self.difference.expert, TEXT)
        self.curves = rate_curves(ladders, costs)
        self.target.mkdir()

    @property
    def ladders(self):
        return self.candidates.ladders

    def choose(self, measured=lambda _choice: None, **limits):
        allocation = AllocationRecipe(**({"slot_bits": WIDE_SLOT} | limits))
        recipe = self.recipe.model_copy(update={"allocation": allocation})
        task = replace(self.candidates.task, recipe=recipe)
        return choose_within(replace(self.candidates, task=task), self.curves, measured)

    def written(self, choice):
        weights = self.candidates.encoded(choice)
        write_artifact(self.difference, self.recipe, weights, self.target)
        return Artifact(self.target)

    def file_bytes(self, choice):
        self.written(choice)
        return (self.target / WEIGHTS_FILE).stat().st_size

    def least_bytes(self):
        """What a refusal names."""
        with pytest.raises(ValueError, match="num_bytes must be at least") as caught:
            self.choose(num_bytes=1)
        return int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))


def make_case(base, expert, root, **settings):
    difference = compare(open_checkpoint(base), open_checkpoint(expert))
    return Case(difference, Workspace(root / "work", {}), root / "artifact", **settings)


@pytest.fixture(scope="module")
def case(make_pair, tmp_path_factory):
    return make_case(*make_pair("qwen3"), tmp_path_factory.mktemp("budget"))


def run(pair, output, allocation, held_out=HELD_OUT, **settings):
    """Compress with a limit and verify."""
    limits = {"slot_bits": WIDE_SLOT} | allocation
    recipe = Recipe.model_validate({"allocation": limits, **settings})
    checkpoints = (open_checkpoint(root) for root in pair)
    return compress(
        *checkpoints, output, recipe, calibration=TEXT, held_out=held_out, progress=False
    )


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("bits", BITS[1:-1:2])
def test_linears_never_take_more_bits_than_told(case, method, bits):
    totals = case.written(case.choose(method=method, bits=bits)).manifest.totals
    assert totals.bits_per_weight <= bits


def test_more_bits_are_spent_and_never_predicted_to_lose_more(case):
    choices = [case.choose(bits=bits) for bits in BITS]
    losses = [predicted_loss(case.curves, choice) for choice in choices]
    assert all(more <= fewer for fewer, more in pairwise(losses))
    spent = [case.written(choice).manifest.totals.bits_per_weight for choice in choices]
    # Rungs are coarse in a model of a few matrices.
    for bits, found in zip(BITS[1:-1], spent[1:-1], strict=True):
        assert 0.75 * bits < found <= bits


def test_without_a_limit_linears_take_a_bit(case):
    totals = case.written(case.choose()).manifest.totals
    assert 0.75 < totals.bits_per_weight <= 1


@settings(deadline=None, max_examples=25)
@given(share=st.floats(0, 1))
def test_the_weights_file_never_takes_more_bytes_than_told(case, share):
    least = case.least_bytes()
    num_bytes = round(least * (1 + 2 * share))
    assert case.file_bytes(case.choose(num_bytes=num_bytes)) <= num_bytes


def test_the_bytes_told_are_used(case):
    num_bytes = case.least_bytes() + 20_000
    found = case.file_bytes(case.choose(num_bytes=num_bytes))
    # Headers are counted as if all matrices were products, and rungs of small matrices are coarse.
    assert found > 0.8 * num_bytes


def test_more_bytes_are_never_predicted_to_lose_more(case):
    least = case.least_bytes()
    losses = [
        predicted_loss(case.curves, case.choose(num_bytes=least + extra))
        for extra in range(0, 60_000, 3_000)
    ]
    assert all(more <= fewer for fewer, more in pairwise(losses))


def test_too_few_bytes_are_refused_with_the_least_that_work(case):
    least = case.least_bytes()
    assert not any(case.choose(num_bytes=least))
    with pytest.raises(
        ValueError, match=rf"must be at least {least:,} .* got {least - 1:,}: raise"
    ):
        case.choose(num_bytes=least - 1)


def changed_only(pair, name, root):
    """A pair whose expert differs in one tensor, or in none."""
    copied = shutil.copytree(pair[0], root / "expert")
    weights = load_file(copied / "model.safetensors")
    if name:
        weights[name] = load_file(pair[1] / "model.safetensors")[name]
    save_file(weights, copied / "model.safetensors")
    return pair[0], copied


@pytest.mark.parametrize(
    "name", [None, "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_file_of_a_tensor_or_none_stays_within_its_bytes(make_pair, tmp_path, name):
    case = make_case(*changed_only(make_pair(), name, tmp_path), tmp_path)
    least = case.least_bytes()
    for num_bytes in (least, least + 100, least + 1_000):
        assert case.file_bytes(case.choose(num_bytes=num_bytes)) <= num_bytes


def test_a_fixed_width_has_one_rung_and_no_choice(make_pair, tmp_path):
    recipe = Recipe(linear=LinearRecipe(scheme="int2"))
    case = make_case(*make_pair(), tmp_path, recipe=recipe)
    assert choose_within(case.candidates, case.curves, lambda _choice: 0.0) == [1] * 14


def test_errors_of_low_rank_rungs_count_more(case):
    ladder = case.ladders[0]
    full = ladder.entries[-1]
    common = full.model_dump(exclude={"kind", "scheme", "rows", "channels", "salient"})
    reduced = FactoredEntry(rank=2, **common)
    curve = rate_curves([replace(ladder, entries=(full, reduced))], [1.0])[0]
    assert [rung.error / full.error for rung in curve.rungs[1:]] == [1, LOW_RANK_COST]
    assert [rung.slot_bytes for rung in curve.rungs] == [0, full.slot_bytes, full.slot_bytes]


@pytest.mark.parametrize("slot_bits", [1.5, 2.5, 4.0, 6.0])
def test_linears_never_take_more_bits_in_a_slot_than_told(case, slot_bits):
    totals = case.written(case.choose(bits=4.0, slot_bits=slot_bits)).manifest.totals
    assert 0.5 * slot_bits < totals.slot_bits_per_weight <= slot_bits


def test_a_slot_without_room_for_its_records_is_refused_with_both_figures(case):
    with pytest.raises(
        ValueError,
        match=r"slot_bits 0\.1 cannot be kept: no less than 0\.\d+ bits .* raise slot_bits",
    ):
        case.choose(bits=1.0, slot_bits=0.1)


def test_a_fixed_width_that_a_slot_has_no_room_for_is_refused_with_both_figures(
    make_pair, tmp_path
):
    recipe = Recipe(linear=LinearRecipe(scheme="int4"), allocation={"slot_bits": 3.0})
    case = make_case(*make_pair(), tmp_path, recipe=recipe)
    with pytest.raises(ValueError, match=r"slot_bits 3 cannot be kept: no less than 4\.\d+ bits"):
        choose_within(case.candidates, case.curves, lambda _choice: 0.0)


def test_bytes_on_disk_that_the_slot_leaves_unused_are_told(case, caplog):
    case.choose(bits=4.0, slot_bits=2.0)
    assert re.search(r"slot_bits leave [\d,]+ of the [\d,]+ bytes on disk unused", caplog.text)
    caplog.clear()
    case.choose(bits=1.0)
    assert caplog.text == ""


def test_importance_by_weights_counts_them(case):
    found = importances(Importance.WEIGHTS, case.ladders, case.difference.expert, TEXT)
    assert sum(found) == linear_weights(case.difference)


def test_importance_by_energy_is_the_root_of_the_delta_s_output_energy(case):
    found = importances(Importance.ENERGY, case.ladders, case.difference.expert, TEXT)
    assert [cost**2 for cost in found] == pytest.approx([ladder.energy for ladder in case.ladders])


def test_importance_by_fisher_weighs_energies_by_what_predictions_feel(case):
    expert = case.difference.expert
    felt = output_sensitivity(expert, TEXT)
    found = importances(Importance.FISHER, case.ladders, expert, TEXT)
    wanted = [ladder.energy * float(felt[ladder.name].mean()) for ladder in case.ladders]
    assert [cost**2 for cost in found] == pytest.approx(wanted)


@pytest.mark.parametrize("target", [0.08, 0.2, 0.6])
def test_a_target_is_met_on_the_held_out_text(make_pair, tmp_path, target):
    pair = make_pair("qwen3")
    manifest = run(pair, tmp_path / "artifact", {"target_kl": target})
    assert manifest.verification["kl"] <= target
    again = evaluate(
        *(open_checkpoint(root) for root in pair),
        Artifact(tmp_path / "artifact"),
        HELD_OUT,
        progress=False,
    )
    assert again.kl == pytest.approx(manifest.verification["kl"])


def test_a_looser_target_takes_fewer_bits(make_pair, tmp_path):
    found = [
        run(make_pair("qwen3"), tmp_path / f"{target}", {"target_kl": target}).totals
        for target in (0.08, 0.2, 0.6)
    ]
    assert all(strict.linear_bytes > loose.linear_bytes for strict, loose in pairwise(found))


def test_a_target_that_distillation_misses_is_met_without_it(make_pair, tmp_path, monkeypatch):
    from deltamux.compression.choice import tune as module

    def spoil(student, *_):
        return dict.fromkeys(student.names, 2.0)

    monkeypatch.setattr(module, "distil", spoil)
    distillation = {"passes": 1}
    found = run(
        make_pair("qwen3"),
        tmp_path / "artifact",
        {"target_kl": 0.2},
        distillation=distillation,
    )
    assert found.verification["kl"] <= 0.2


def test_a_target_out_of_reach_is_refused_with_what_is_in_reach(make_pair, tmp_path):
    with pytest.raises(
        ValueError, match=r"target_kl 1e-09 cannot be met: within 20 slot_bits .* reach 0\.\d+ nats"
    ):
        run(make_pair(), tmp_path / "artifact", {"target_kl": 1e-9})
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize(
    ("limits", "named"),
    [({"target_kl": 0.1}, "target_kl"), ({"objective": "measured"}, "objective 'measured'")],
)
def test_what_must_be_measured_is_refused_without_text_before_any_work(
    make_pair, tmp_path, limits, named
):
    with pytest.raises(ValueError, match=f"{named} needs held-out text: pass --held-out"):
        run(make_pair(), tmp_path / "artifact", limits, held_out=[])
    assert list(tmp_path.iterdir()) == []


def test_what_is_predicted_needs_no_text():
    check_measurable(AllocationRecipe(bits=1.0, method="evolution"), held_out=False)


def test_a_measured_objective_decides_between_tilts(case):
    asked = []

    def measured(choice):
        asked.append(choice)
        return float(len(asked) != 3)

    choice = case.choose(measured, method="atp", objective="measured", bits=1.0)
    assert choice == asked[2]


def test_the_step_of_an_embedding_widens_until_a_slot_has_room(case):
    def embedding(slot_bits):
        found = fixed_weights(case.difference, EmbeddingRecipe(), slot_bits)
        return next(each.entry for each in found if each.entry.role == "embedding")

    whole, narrow = embedding(None), embedding(1.8)
    weights = narrow.shape[0] * narrow.shape[1]
    assert whole.slot_bytes * 8 > 2.7 * weights
    assert narrow.slot_bytes * 8 <= 2.7 * weights
    assert whole.error < narrow.error < 0.5
    assert embedding(20.0) == whole
