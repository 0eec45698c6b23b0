import math
from itertools import pairwise

import pytest
import torch

from deltamux.compression.artifact.matrices import Coded, Factored
from deltamux.compression.artifact.stored import tensor_bytes
from deltamux.compression.pruning.scores import Pattern, Score
from deltamux.compression.rounding import ladder, low_rank
from deltamux.compression.rounding.gptq import curvature
from deltamux.compression.rounding.ladder import (
    CODED_STEPS,
    Linear,
    coded_rungs,
    fixed_rung,
    low_rank_rungs,
    pruned_rungs,
)
from deltamux.compression.rounding.low_rank import FINE_STEPS, FactoredDelta, has_few_directions
from deltamux.compression.rounding.quantize import Scheme

ROWS, CHANNELS = 96, 64
# bfloat16 has 8 significant bits: a rounded step is off by at most this share.
STEP_ROUNDING = 2**-8
FIXED = [Scheme.SIGN, Scheme.TERNARY, Scheme.INT2, Scheme.INT3, Scheme.INT4]


def random_tokens(tokens=400, channels=CHANNELS, seed=0):
    """Inputs whose channels share causes and have unlike energies."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, 10, generator=generator)
    inputs = causes @ torch.randn(10, channels, generator=generator)
    inputs += torch.randn(tokens, channels, generator=generator)
    return inputs * (torch.rand(channels, generator=generator) * 2 + 0.1)


def random_delta(rows=ROWS, channels=CHANNELS, seed=1):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) * 0.01


def linear_of(delta=None, inputs=None):
    delta = random_delta() if delta is None else delta
    inputs = random_tokens(channels=delta.shape[1]) if inputs is None else inputs
    moment = inputs.T @ inputs / len(inputs)
    return Linear(delta, moment, curvature(moment))


def deltas_of(rungs, *args):
    """What the rungs store."""
    return [rung.delta for rung in rungs(*args) if rung is not None]


def stored_bytes(delta):
    kind = Factored if isinstance(delta, FactoredDelta) else Coded
    return tensor_bytes(kind(delta).encode())


def kept(linear, quantized):
    """⟨Δ̂, Δ⟩ / ⟨Δ, Δ⟩ in the metric of H, in float64."""
    weighted = linear.delta_NK.double() @ linear.moment_KK.double()
    return float((weighted * quantized.dequantize()).sum() / (weighted * linear.delta_NK).sum())


def coded_part(linear, quantized):
    """The levels with their steps, without 16-bit channels."""
    levels = quantized.codes_RC.float() - quantized.scheme.zero_point
    return levels * quantized.steps_R.float().unsqueeze(1)


def test_energy_and_loss_are_traces_over_the_second_moment():
    linear = linear_of()
    other = linear.delta_NK.round(decimals=2)
    inputs = random_tokens()
    outputs, rest = inputs @ linear.delta_NK.T, inputs @ (linear.delta_NK - other).T
    energy = float(outputs.square().sum() / len(inputs))
    # Float32 sums of some 10,000 products in two orders.
    assert linear.energy == pytest.approx(energy, rel=1e-4)
    assert linear.lost(other) == pytest.approx(
        float(rest.square().sum() / len(inputs)) / energy, rel=1e-3
    )


def test_nothing_is_lost_with_the_delta_itself_and_all_without_one():
    linear = linear_of()
    assert linear.lost(linear.delta_NK) == 0
    assert linear.lost(torch.zeros_like(linear.delta_NK)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_energies_are_never_below_zero_where_no_input_reaches_the_delta(seed):
    inputs = random_tokens(tokens=3, seed=seed)
    basis = torch.linalg.qr(inputs.T).Q
    delta = random_delta(seed=seed)
    delta -= (delta @ basis) @ basis.T
    linear = linear_of(delta, inputs)
    # What is left is float32's rounding, of either sign.
    assert linear.energy >= 0
    assert linear.lost(delta * 1.5) >= 0


def test_coarser_steps_take_fewer_bytes_and_lose_more():
    linear = linear_of()
    rungs = list(deltas_of(coded_rungs, linear))
    for scheme, steps in CODED_STEPS:
        same = [rung for rung in rungs if rung.scheme is scheme][: len(steps)]
        sizes = [stored_bytes(rung) for rung in same]
        assert all(finer > coarser for finer, coarser in pairwise(sizes))
    # The ternary rungs cut off more and more: only on their way to that do they err in order.
    fine = [rung for rung in rungs if rung.scheme is Scheme.INT4]
    errors = [linear.lost(rung.dequantize()) for rung in fine]
    assert all(finer < coarser for finer, coarser in pairwise(errors))


def test_rungs_span_from_a_tenth_of_a_bit_to_more_than_three():
    linear = linear_of(random_delta(128, 256), torch.eye(256))
    rungs = list(deltas_of(coded_rungs, linear))
    bits = [8 * stored_bytes(rung) / linear.delta_NK.numel() for rung in rungs]
    assert min(bits) < 0.1
    assert max(bits) > 3
    assert min(linear.lost(rung.dequantize()) for rung in rungs) < 0.02


def test_fine_rungs_are_within_half_a_bit_of_the_gaussian_bound():
    linear = linear_of(random_delta(256, 256), torch.eye(256))
    for rung in deltas_of(coded_rungs, linear):
        error = linear.lost(rung.dequantize())
        if error < 0.1:
            bits = 8 * stored_bytes(rung) / linear.delta_NK.numel()
            # 0.254 bit are a uniform quantizer's (Gish & Pierce 1968); the rest are the code's, and
            # the ends of the finest grid's, which cut off 2.5 deviations.
            assert bits < 0.5 * math.log2(1 / error) + 0.4


@pytest.mark.parametrize("tokens", [1, 20, 400])
def test_nothing_of_the_delta_itself_is_missing(tokens):
    linear = linear_of(inputs=random_tokens(tokens))
    for rung in deltas_of(coded_rungs, linear):
        # A coarse rung of which less than half was left is stretched no further.
        if linear.lost(rung.dequantize()) < 0.5:
            assert kept(linear, rung) == pytest.approx(1, rel=STEP_ROUNDING + 1e-4)


@pytest.mark.parametrize("salient", [0, 4])
@pytest.mark.parametrize("scheme", FIXED)
def test_nothing_of_the_delta_itself_is_missing_at_a_fixed_width(scheme, salient):
    linear = linear_of()
    # 16-bit channels are rounded too, but far less than the steps.
    assert kept(linear, fixed_rung(linear, scheme, salient)) == pytest.approx(
        1, rel=STEP_ROUNDING + 1e-3
    )


def test_a_stretch_has_a_limit(monkeypatch):
    linear = linear_of(inputs=torch.eye(CHANNELS))
    coarse = [rung for rung in deltas_of(coded_rungs, linear) if kept(linear, rung) < 0.9]
    monkeypatch.setattr(ladder, "MAX_STRETCH", 1e6)
    unlimited = {rung.codes_RC.numpy().tobytes(): rung for rung in deltas_of(coded_rungs, linear)}
    assert coarse
    for rung in coarse:
        free = unlimited[rung.codes_RC.numpy().tobytes()]
        assert rung.steps_R[0] < free.steps_R[0]
        assert kept(linear, free) == pytest.approx(1, rel=STEP_ROUNDING + 1e-4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda delta: delta,
        lambda delta: delta.index_fill_(0, torch.tensor([3]), 0),
        lambda delta: delta[:, 7].mul_(1000),
        lambda delta: delta[7].mul_(1000),
        lambda delta: delta[7, 7].mul_(1e6),
    ],
    ids=["plain", "zero-row", "outlier-channel", "outlier-row", "outlier-element"],
)
def test_levels_of_every_rung_lie_within_its_scheme(spoil):
    delta = random_delta()
    spoil(delta)
    linear = linear_of(delta)
    rungs = [
        *deltas_of(coded_rungs, linear),
        *deltas_of(pruned_rungs, linear, Score.WANDA, Pattern.UNSTRUCTURED),
    ]
    rungs += [fixed_rung(linear, scheme, 3) for scheme in FIXED]
    for rung in rungs:
        assert int(rung.codes_RC.max()) < rung.scheme.levels
        assert torch.isfinite(rung.dequantize()).all()
        assert (rung.steps_R >= 0).all()


@pytest.mark.parametrize("factor", [30, 1000])
@pytest.mark.parametrize("where", ["channel", "row", "element"])
def test_what_stands_far_out_is_not_cut_off(where, factor):
    delta = random_delta(128, 512)
    place = {"channel": (slice(None), 7), "row": 7, "element": (7, 9)}[where]
    delta[place] *= factor
    linear = linear_of(delta, random_tokens(1000, 512))
    best = min(linear.lost(rung.dequantize()) for rung in deltas_of(coded_rungs, linear))
    # Of an outlier's own energy 16 levels lose some per cent, and of the rest what is below a step.
    assert best < 0.15


def test_a_delta_without_outliers_gets_no_wider_steps():
    rungs = [rung for rung in deltas_of(coded_rungs, linear_of()) if rung.scheme is Scheme.INT4]
    assert len(rungs) == len(dict(CODED_STEPS)[Scheme.INT4])


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-10, 2.0**10, 2.0**30])
def test_the_size_of_the_delta_does_not_matter(scale):
    plain, scaled = linear_of(), linear_of(random_delta() * scale)
    for wanted, found in zip(
        deltas_of(coded_rungs, plain), deltas_of(coded_rungs, scaled), strict=True
    ):
        # Powers of two leave every rounding as it is.
        assert torch.equal(found.codes_RC, wanted.codes_RC)
        assert torch.equal(found.steps_R.float(), wanted.steps_R.float() * scale)


@pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e-39, 1e-43])
def test_a_delta_whose_squares_vanish_gives_finite_rungs_or_none(scale):
    linear = linear_of(random_delta() * scale)
    assert linear.delta_NK.any()
    rungs = [*deltas_of(coded_rungs, linear), *(fixed_rung(linear, scheme, 2) for scheme in FIXED)]
    for rung in rungs:
        assert torch.isfinite(rung.dequantize()).all()
        assert math.isfinite(linear.lost(rung.dequantize()))


def test_inputs_that_are_always_zero_leave_a_plainly_rounded_delta():
    linear = linear_of(inputs=torch.zeros(5, CHANNELS))
    assert linear.energy == 0
    finest = deltas_of(coded_rungs, linear)[0].dequantize()
    lost = (finest - linear.delta_NK).square().sum() / linear.delta_NK.square().sum()
    # Steps of 0.35 deviations lose 0.35² / 12, the ends of the grid a fifth of that.
    assert float(lost) == pytest.approx(1.2 * 0.35**2 / 12, rel=0.1)


def test_salient_channels_are_those_that_cost_most_to_drop_under_feedback():
    delta, inputs = random_delta(), random_tokens()
    delta[:, 5] *= 30
    inputs[:, 5] = inputs[:, 6] + 0.01 * inputs[:, 5]  # large, but known from another channel
    delta[:, 9] *= 6
    linear = linear_of(delta, inputs)
    cost = delta.square().sum(dim=0) * linear.curvature.innovation_K()
    wanted = cost.topk(4).indices.sort().values
    rung = fixed_rung(linear, Scheme.INT2, 4)
    assert torch.equal(rung.salient_channels_S, wanted)
    energy = delta.square().sum(dim=0) * linear.moment_KK.diagonal()
    assert not torch.equal(wanted, energy.topk(4).indices.sort().values)


def test_salient_channels_lower_the_error():
    linear = linear_of()
    errors = [
        linear.lost(fixed_rung(linear, Scheme.INT2, count).dequantize()) for count in (0, 4, 16)
    ]
    assert all(more < fewer for fewer, more in pairwise(errors))


def test_there_are_no_more_salient_channels_than_changed_ones():
    delta = torch.zeros(ROWS, CHANNELS)
    delta[:, [4, 20]] = random_delta()[:, :2]
    rung = fixed_rung(linear_of(delta), Scheme.INT4, 8)
    assert rung.salient_channels_S.tolist() == [4, 20]


@pytest.mark.parametrize("scheme", FIXED)
def test_before_the_stretch_no_other_scale_of_a_row_errs_less(scheme, monkeypatch):
    monkeypatch.setattr(ladder, "_stretched", lambda _linear, quantized: quantized)
    linear = linear_of()
    rung = fixed_rung(linear, scheme, 0)

    def row_errors(factor):
        rest = (linear.delta_NK - coded_part(linear, rung) * factor).double()
        return ((rest @ linear.moment_KK.double()) * rest).sum(dim=1)

    fitted = row_errors(1.0)
    for factor in (0.97, 0.99, 1.01, 1.03):
        # The optimum is flat: a step that is rounded by 2^-8 errs less than one 1 % beside it.
        assert (fitted <= row_errors(factor)).all()


@pytest.mark.parametrize("scheme", FIXED)
def test_a_fixed_width_under_feedback_errs_less_than_without(scheme):
    from deltamux.compression.rounding.quantize import quantize

    linear = linear_of()
    plain = quantize(linear.delta_NK, scheme, linear.moment_KK.diagonal())
    found = fixed_rung(linear, scheme, 0)
    assert linear.lost(found.dequantize()) < 0.8 * linear.lost(plain.dequantize())


def test_a_row_that_did_not_change_stays_zero():
    delta = random_delta()
    delta[5] = 0
    linear = linear_of(delta)
    rungs = [*deltas_of(coded_rungs, linear), *(fixed_rung(linear, scheme, 0) for scheme in FIXED)]
    assert all(not rung.dequantize()[5].any() for rung in rungs)


def low_rank_delta(rank, noise=0.0):
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(ROWS, rank, generator=generator)
    delta = left @ torch.randn(rank, CHANNELS, generator=generator) * 0.01
    return delta + noise * torch.randn(ROWS, CHANNELS, generator=generator) * 0.01


def test_a_delta_of_few_directions_costs_less_as_a_product():
    linear = linear_of(low_rank_delta(3))
    products = [
        (stored_bytes(rung), linear.lost(rung.dequantize())) for rung in low_rank_rungs(linear)
    ]
    assert products
    for rung in deltas_of(coded_rungs, linear):
        size, error = stored_bytes(rung), linear.lost(rung.dequantize())
        if 0.02 < error < 0.2:
            assert any(less < size and lost < error for less, lost in products)


def test_products_have_no_more_directions_than_the_delta():
    ranks = [rung.rank for rung in low_rank_rungs(linear_of(low_rank_delta(3)))]
    assert set(ranks) <= {1, 2, 3}
    assert ranks == sorted(ranks, reverse=True)


def test_nothing_of_the_delta_itself_is_missing_in_a_product():
    linear = linear_of(low_rank_delta(3, noise=0.5))
    rungs = list(low_rank_rungs(linear))
    assert rungs
    for rung in rungs:
        assert kept(linear, rung) == pytest.approx(1, rel=STEP_ROUNDING + 1e-3)


def test_finer_steps_lose_less_where_few_directions_hold_the_delta():
    linear = linear_of(low_rank_delta(3))
    rungs = list(low_rank_rungs(linear, few_directions=True))
    assert len(rungs) == len(list(low_rank_rungs(linear))) + len(FINE_STEPS)
    sizes = [stored_bytes(rung) for rung in rungs]
    assert sizes == sorted(sizes, reverse=True)
    errors = [linear.lost(rung.dequantize()) for rung in rungs]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3


def test_a_direction_far_wider_than_the_rest_is_not_cut_off():
    delta = low_rank_delta(3)
    delta += 300 * torch.outer(low_rank_delta(1)[:, 0], low_rank_delta(1)[0])
    linear = linear_of(delta)
    rung = next(iter(low_rank_rungs(linear, few_directions=True)))
    assert linear.lost(rung.dequantize()) < 1e-3
    for factor in (rung.left, rung.right):
        assert int(factor.codes_RC.min()) > 0
        assert int(factor.codes_RC.max()) < 255


def test_no_more_directions_are_kept_than_slots_take(monkeypatch):
    monkeypatch.setattr(low_rank, "MOST_DIRECTIONS", 2)
    assert {rung.rank for rung in low_rank_rungs(linear_of(low_rank_delta(3)))} <= {1, 2}


def test_a_factor_on_a_product_is_one_on_its_left_steps():
    linear = linear_of(low_rank_delta(3, noise=0.5))
    for rung in low_rank_rungs(linear, few_directions=True):
        scaled = rung.scaled(0.93)
        assert torch.equal(scaled.left.codes_RC, rung.left.codes_RC)
        assert torch.equal(scaled.right.dequantize(), rung.right.dequantize())
        ratio = scaled.left.steps_R.float() / rung.left.steps_R.float()
        assert torch.allclose(ratio, torch.tensor(0.93), rtol=STEP_ROUNDING)


def test_few_directions_are_told_from_many():
    linear = linear_of()
    assert not has_few_directions(linear.delta_NK, linear.curvature)
    adapter = low_rank_delta(3, noise=0.02)
    assert has_few_directions(adapter, linear.curvature)
    assert has_few_directions(adapter * 1e-6, linear.curvature)


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_channels_give_finite_products(tokens):
    linear = linear_of(low_rank_delta(3), random_tokens(tokens))
    for rung in low_rank_rungs(linear):
        assert torch.isfinite(rung.dequantize()).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_delta_or_inputs_of_next_to_nothing_give_finite_products_or_none(scale):
    for linear in (
        linear_of(low_rank_delta(3) * scale),
        linear_of(low_rank_delta(3), random_tokens() * scale),
    ):
        for rung in low_rank_rungs(linear):
            assert torch.isfinite(rung.dequantize()).all()


def test_pruned_rungs_drop_the_shares_asked_for():
    linear = linear_of()
    rungs = list(deltas_of(pruned_rungs, linear, Score.SPARSEGPT, Pattern.UNSTRUCTURED))
    assert len(rungs) == len(ladder.SPARSITIES)
    for rung, sparsity in zip(rungs, ladder.SPARSITIES, strict=True):
        dropped = (rung.codes_RC == rung.scheme.zero_point).float().mean()
        assert float(dropped) >= sparsity - 1e-3
    sizes = [stored_bytes(rung) for rung in rungs]
    assert all(fuller > emptier for fuller, emptier in pairwise(sizes[2:]))


def test_two_of_four_is_one_rung():
    (rung,) = deltas_of(pruned_rungs, linear_of(), Score.WANDA, Pattern.N_M)
    kept_of_four = (rung.codes_RC != rung.scheme.zero_point).view(ROWS, -1, 4).sum(dim=2)
    assert int(kept_of_four.max()) <= 2


def test_passes_that_memory_cuts_up_give_the_same_rungs(monkeypatch):
    linear = linear_of()
    whole = list(deltas_of(coded_rungs, linear))
    monkeypatch.setattr(ladder, "PASS_ELEMENTS", 3 * linear.delta_NK.numel())
    for found, wanted in zip(deltas_of(coded_rungs, linear), whole, strict=True):
        assert torch.equal(found.codes_RC, wanted.codes_RC)
