import os
import subprocess
import sys

import pytest
import torch

from deltamux.compression.rounding import blocks
from deltamux.compression.rounding.gptq import (
    DAMPING,
    Curvature,
    Grid,
    curvature,
    round_with_feedback,
)
from deltamux.compression.rounding.quantize import Scheme

# More channels than a block of the lazy update, and not a multiple of it.
CHANNELS = 70
ROWS = 9


def correlated_moment(channels=CHANNELS, tokens=400, seed=0):
    """E[x xᵀ] of tokens whose channels share a few causes and have unlike energies."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, 12, generator=generator)
    inputs = causes @ torch.randn(12, channels, generator=generator)
    inputs += torch.randn(tokens, channels, generator=generator)
    inputs *= torch.rand(channels, generator=generator) * 2 + 0.1
    return inputs.T @ inputs / tokens


def random_delta(rows=ROWS, channels=CHANNELS, seed=1):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def flat_grid(scheme=Scheme.INT4, step=0.5, rows=ROWS):
    return Grid(scheme, torch.full((rows,), step))


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways in which a CPU rounds a block."""
    if request.param == "torch":
        monkeypatch.setattr(blocks, "_library", lambda: None)
    else:
        assert blocks._library() is not None


def levels_of(*args, **kwargs):
    return [rounded.levels_NK for rounded in round_with_feedback(*args, **kwargs)]


def damped(moment):
    """The moment that is factored, float64."""
    mean = moment.diagonal().double().mean()
    return moment.double() + (DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(moment))


def nearest(values, grid):
    """Nearest levels, float64."""
    zero = grid.scheme.zero_point
    codes = (values / grid.steps_N.double() + zero).round().clamp(0, grid.scheme.levels - 1)
    return codes - zero


def naive_rounding(delta, moment, grid, keep=None, exact=None):
    """Optimal Brain Compression as it is written: the inverse of what is left, at every channel."""
    order = moment.diagonal().argsort(descending=True, stable=True)
    hessian = damped(moment)[order][:, order]
    work, levels = delta.double()[:, order], torch.zeros(delta.shape, dtype=torch.float64)
    remainders = {}
    for j, channel in enumerate(order.tolist()):
        inverse = torch.linalg.inv(hessian[j:, j:])
        level = nearest(work[:, j], grid)
        if keep is not None:
            level = level * keep[:, channel]
        levels[:, channel] = level
        lost = work[:, j] - level * grid.steps_N.double()
        if exact is not None and exact[channel]:
            remainders[channel] = lost
        else:
            work[:, j:] -= torch.outer(lost / inverse[0, 0], inverse[0])
    stacked = [remainders[channel] for channel in sorted(remainders)]
    rest = torch.stack(stacked, dim=1) if stacked else torch.zeros(len(delta), 0)
    return levels.float(), rest.float()


def output_error(delta, other, moment):
    rest = (delta - other).double()
    return float(((rest @ moment.double()) * rest).sum())


def test_the_factor_is_upper_triangular():
    factor = curvature(correlated_moment()).factor_KK
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()


def test_the_factor_times_itself_is_the_damped_inverse():
    moment = correlated_moment()
    found = curvature(moment)
    inverse = torch.linalg.inv(damped(moment))[found.order_K][:, found.order_K]
    # The factor is rounded to float32; its products are taken in float64.
    factor = found.factor_KK.double()
    scale = float(inverse.diagonal().max())
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-5, atol=1e-6 * scale)


def test_channels_go_in_the_order_of_falling_energy():
    moment = torch.diag(torch.tensor([2.0, 5.0, 5.0, 0.0, 9.0]))
    assert curvature(moment).order_K.tolist() == [4, 1, 2, 0, 3]


def test_the_innovation_is_what_the_channels_behind_leave_unexplained():
    moment = correlated_moment()
    found = curvature(moment)
    hessian = damped(moment)[found.order_K][:, found.order_K]
    wanted = torch.empty(CHANNELS, dtype=torch.float64)
    for j, channel in enumerate(found.order_K.tolist()):
        own, cross, behind = hessian[j, j], hessian[j, j + 1 :], hessian[j + 1 :, j + 1 :]
        wanted[channel] = own - cross @ torch.linalg.solve(behind, cross)
    # Rounded to float32 twice.
    torch.testing.assert_close(found.innovation_K(), wanted.float(), rtol=1e-5, atol=0)


def test_without_correlation_the_innovation_is_the_damped_energy():
    energy = torch.rand(20) + 0.1
    found = curvature(torch.diag(energy)).innovation_K()
    torch.testing.assert_close(found, energy + DAMPING * energy.mean(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scheme", Scheme)
def test_levels_are_those_of_explicit_inverses(scheme):
    delta, moment = random_delta(), correlated_moment()
    grid = Grid(scheme, torch.linspace(0.3, 1.2, ROWS))
    (found,) = levels_of(delta, curvature(moment), [grid])
    wanted, _ = naive_rounding(delta, moment, grid)
    # Float32 against float64: a level differs only where a value lies on the border of two.
    assert torch.equal(found, wanted)


def test_several_grids_in_one_pass_are_each_as_alone():
    delta, inputs = random_delta(), curvature(correlated_moment())
    grids = [
        flat_grid(Scheme.INT4, 0.3),
        Grid(Scheme.INT2, torch.linspace(0.2, 2.0, ROWS)),
        flat_grid(Scheme.TERNARY, 2.0),
        flat_grid(Scheme.SIGN, 1.5),
    ]
    together = round_with_feedback(delta, inputs, grids)
    for grid, rounded in zip(grids, together, strict=True):
        (alone,) = levels_of(delta, inputs, [grid])
        assert torch.equal(rounded.levels_NK, alone)


@pytest.mark.parametrize("scheme", Scheme)
def test_levels_stay_within_the_scheme(scheme):
    delta = random_delta()
    delta[:, 4] *= 1000
    delta[2] *= 1000
    (levels,) = levels_of(delta, curvature(correlated_moment()), [flat_grid(scheme, 0.4)])
    codes = levels + scheme.zero_point
    assert torch.equal(codes, codes.round())
    assert int(codes.min()) >= 0
    assert int(codes.max()) < scheme.levels


def test_a_row_without_a_step_has_no_levels():
    grid = Grid(Scheme.INT4, torch.tensor([0.5] * (ROWS - 1) + [0.0]))
    (levels,) = levels_of(random_delta(), curvature(correlated_moment()), [grid])
    assert not levels[-1].any()
    assert levels[:-1].any(dim=1).all()


def test_exact_channels_lose_nothing_and_pass_nothing_on():
    delta, moment, grid = random_delta(), correlated_moment(), flat_grid(Scheme.INT2, 0.8)
    exact = torch.zeros(CHANNELS, dtype=torch.bool)
    exact[[3, 40, 69]] = True
    (rounded,) = round_with_feedback(delta, curvature(moment), [grid], exact_K=exact)
    levels, rest = rounded.levels_NK, rounded.rest_NS
    wanted_levels, wanted_rest = naive_rounding(delta, moment, grid, exact=exact)
    assert torch.equal(levels, wanted_levels)
    # Remainders of values of a few units that were updated up to 70 times in float32.
    torch.testing.assert_close(rest, wanted_rest, rtol=1e-4, atol=1e-5)


def test_levels_and_remainders_of_all_channels_give_the_delta_back():
    delta, grid = random_delta(), flat_grid(Scheme.SIGN, 0.8)
    everything = torch.ones(CHANNELS, dtype=torch.bool)
    (rounded,) = round_with_feedback(
        delta, curvature(correlated_moment()), [grid], exact_K=everything
    )
    levels, rest = rounded.levels_NK, rounded.rest_NS
    # One rounding of a float32 difference and one of a sum.
    torch.testing.assert_close(levels * 0.8 + rest, delta, rtol=1e-6, atol=1e-6)


def test_exact_channels_come_for_every_grid():
    exact = torch.zeros(CHANNELS, dtype=torch.bool)
    exact[[5, 6]] = True
    grids = [flat_grid(step=0.3), flat_grid(step=0.9)]
    inputs = curvature(correlated_moment())
    together = round_with_feedback(random_delta(), inputs, grids, exact_K=exact)
    for grid, rounded in zip(grids, together, strict=True):
        (alone,) = round_with_feedback(random_delta(), inputs, [grid], exact_K=exact)
        assert rounded.rest_NS.shape == (ROWS, 2)
        # The same float32 products, in blocks of another size.
        torch.testing.assert_close(rounded.rest_NS, alone.rest_NS, rtol=1e-5, atol=1e-6)


def test_without_exact_channels_there_are_no_remainders():
    (rounded,) = round_with_feedback(random_delta(), curvature(correlated_moment()), [flat_grid()])
    assert rounded.rest_NS.shape == (ROWS, 0)


def test_what_is_not_kept_has_level_zero_and_is_made_up_for():
    delta, moment, grid = random_delta(), correlated_moment(), flat_grid(Scheme.QUINARY, 0.8)
    keep = torch.rand(ROWS, CHANNELS, generator=torch.Generator().manual_seed(3)) < 0.4
    (levels,) = levels_of(delta, curvature(moment), [grid], keep_NK=keep)
    assert not levels[~keep].any()
    assert torch.equal(levels, naive_rounding(delta, moment, grid, keep=keep)[0])


@pytest.mark.parametrize("scheme", Scheme)
def test_feedback_loses_less_than_rounding_to_the_same_grid(scheme):
    moment, delta = correlated_moment(), random_delta(32)
    # Wide enough that hardly anything is cut off at the ends of the grid.
    step = {2: 2.0, 3: 1.6, 4: 1.4, 5: 1.1, 8: 0.7, 16: 0.4, 256: 0.1}[scheme.levels]
    grid = flat_grid(scheme, step, 32)
    (levels,) = levels_of(delta, curvature(moment), [grid])
    step = grid.steps_N.unsqueeze(1)
    plain = nearest(delta.double().T, grid).T.float() * step
    assert output_error(delta, levels * step, moment) < 0.7 * output_error(delta, plain, moment)


@pytest.mark.parametrize("tokens", [1, 5, CHANNELS - 1])
def test_fewer_tokens_than_channels_still_give_a_factor(tokens):
    moment = correlated_moment(tokens=tokens)
    found = curvature(moment)
    assert torch.isfinite(found.factor_KK).all()
    delta, grid = random_delta(), flat_grid()
    (levels,) = levels_of(delta, found, [grid])
    plain = nearest(delta.double(), Grid(grid.scheme, grid.steps_N.unsqueeze(1))).float()
    assert output_error(delta, levels * 0.5, moment) < output_error(delta, plain * 0.5, moment)


def test_inputs_that_are_always_zero_are_rounded_plainly():
    found = curvature(torch.zeros(CHANNELS, CHANNELS))
    delta, grid = random_delta(), flat_grid()
    (levels,) = levels_of(delta, found, [grid])
    plain = nearest(delta.double(), Grid(grid.scheme, grid.steps_N.unsqueeze(1)))
    assert torch.equal(levels, plain.float())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    delta, grid = random_delta(), flat_grid()
    moment = correlated_moment()
    (wanted,) = levels_of(delta, curvature(moment), [grid])
    (found,) = levels_of(delta, curvature(moment * scale), [grid])
    assert torch.equal(found, wanted)


def test_one_channel_alone_is_rounded():
    inputs = curvature(torch.tensor([[2.0]]))
    assert isinstance(inputs, Curvature)
    grid = Grid(Scheme.INT4, torch.tensor([0.5, 0.5]))
    (levels,) = levels_of(torch.tensor([[1.1], [-9.0]]), inputs, [grid])
    assert levels.tolist() == [[2.0], [-8.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (3, 5)], ids=["diagonal", "elsewhere"])
def test_inputs_that_are_not_finite_are_refused_by_the_linear_s_name(place, value):
    moment = correlated_moment()
    moment[place] = value
    with pytest.raises(ValueError, match=r"input of 'mlp\.up' hold NaN or infinity: the expert"):
        curvature(moment, "mlp.up")


@pytest.mark.usefixtures("path")
def test_what_is_lost_is_the_damped_output_energy_of_the_rest():
    delta, moment = random_delta(rows=21), correlated_moment()
    grids = [flat_grid(Scheme.INT4, 0.5, rows=21), flat_grid(Scheme.TERNARY, 2.0, rows=21)]
    for grid, rounded in zip(
        grids, round_with_feedback(delta, curvature(moment), grids), strict=True
    ):
        rest = delta.double() - rounded.levels_NK * grid.steps_N.unsqueeze(1)
        wanted = float(((rest @ damped(moment)) * rest).sum())
        # Sums of float32 over channels that were updated up to 70 times.
        assert rounded.lost == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_compiled_loop_rounds_as_torch_does(rows):
    generator = torch.Generator().manual_seed(3)
    exact = torch.rand(CHANNELS, generator=generator) < 0.1
    keep = torch.rand(rows, CHANNELS, generator=generator) < 0.7
    delta, inputs = random_delta(rows), curvature(correlated_moment())
    grids = [flat_grid(Scheme.INT4, 0.4, rows), flat_grid(Scheme.TERNARY, 1.5, rows)]
    compiled = round_with_feedback(delta, inputs, grids, keep, exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_library", lambda: None)
        plain = round_with_feedback(delta, inputs, grids, keep, exact)
    for found, wanted in zip(compiled, plain, strict=True):
        assert torch.equal(found.codes_NK, wanted.codes_NK)
        torch.testing.assert_close(found.rest_NS, wanted.rest_NS, rtol=1e-4, atol=1e-5)
        assert found.lost == pytest.approx(wanted.lost, rel=1e-5)


KERNEL = """
import torch
from deltamux.compression.rounding.block_kernel import launch_block
from deltamux.compression.rounding.blocks import Block, Levels, round_in_torch
from deltamux.compression.rounding.quantize import Scheme

generator = torch.Generator().manual_seed(4)
for channels, rows, kept in ((32, 70, False), (19, 64, True)):
    factor = torch.eye(channels) + 0.1 * torch.randn(channels, channels, generator=generator).triu()
    found = []
    keep = torch.rand(channels, 2 * rows, generator=generator) < 0.7 if kept else None
    work = torch.randn(channels, 2 * rows, generator=generator)
    for rounding in (launch_block, round_in_torch):
        levels = Levels.of([Scheme.INT4, Scheme.INT2], torch.full((2 * rows,), 0.3))
        exact = torch.arange(channels) % 7 == 3
        block = Block(
            work.clone(), torch.full(work.shape, 99, dtype=torch.uint8), exact, keep
        )
        errors = rounding(block, factor, levels)
        found.append((block.codes_BM, errors, levels.lost_M, block.work_BM[exact]))
    (codes, *others), (wanted, *plain) = found
    assert torch.equal(codes, wanted)
    for other, plainly in zip(others, plain, strict=True):
        torch.testing.assert_close(other, plainly, rtol=1e-4, atol=1e-5)
"""


def test_the_gpu_s_kernel_rounds_as_torch_does():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNEL], env=environment, check=True)
