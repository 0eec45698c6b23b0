from itertools import pairwise

import pytest
import torch

from deltamux.compression.rounding.quantize import (
    QuantizedDelta,
    Scheme,
    quantize,
    quantize_changed_rows,
    quantize_rows,
)

BY_WIDTH = (
    Scheme.SIGN,
    Scheme.TERNARY,
    Scheme.INT2,
    Scheme.QUINARY,
    Scheme.INT3,
    Scheme.INT4,
)
# Mean squared error of the best uniform quantizer of a unit Gaussian (Max 1960, table II).
GAUSSIAN_DISTORTION = {
    Scheme.SIGN: 0.3634,
    Scheme.TERNARY: 0.1902,
    Scheme.INT2: 0.1188,
    Scheme.QUINARY: 0.0822,
    Scheme.INT3: 0.03744,
    Scheme.INT4: 0.01154,
}


def random_delta(rows=6, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, columns, generator=generator)
    # Rows of unlike size, as a checkpoint's are.
    return delta * torch.logspace(-4, 0, rows).unsqueeze(1)


def random_energy(columns=64, seed=1):
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) * 4 + 0.01


def weighted_error(delta, approximation, energy):
    return (delta - approximation).square() @ energy


def grid_search_error(row, scheme, energy):
    """The least weighted error over 2,000 steps between nothing and the largest weight."""
    steps = torch.linspace(0, 2.5 * row.abs().max(), 2001)[1:].unsqueeze(1)
    codes = (row / steps + scheme.zero_point).round().clamp(0, scheme.levels - 1)
    return weighted_error(row, (codes - scheme.zero_point) * steps, energy).min()


def naive_dequantize(quantized):
    rows, columns = quantized.shape
    delta = torch.zeros(rows, columns)
    coded_rows = range(rows) if quantized.rows_R is None else quantized.rows_R.tolist()
    coded = range(columns) if quantized.channels_C is None else quantized.channels_C.tolist()
    for r, row in enumerate(coded_rows):
        for c, channel in enumerate(coded):
            level = float(quantized.codes_RC[r, c]) - quantized.scheme.zero_point
            delta[row, channel] = level * float(quantized.steps_R[r])
    if quantized.salient_channels_S is not None:
        for s, channel in enumerate(quantized.salient_channels_S.tolist()):
            for row in range(rows):
                delta[row, channel] += float(quantized.salient_values_NS[row, s])
    return delta


@pytest.mark.parametrize("scheme", BY_WIDTH)
def test_steps_minimise_the_weighted_error(scheme):
    delta, energy = random_delta(columns=2048), random_energy(2048)
    approximation = quantize(delta, scheme, energy).dequantize()
    error = weighted_error(delta, approximation, energy)
    best = torch.stack([grid_search_error(row, scheme, energy) for row in delta])
    # The error has several minima in the step and the search starts from two points: in rows as
    # long as a model's it ends within 5 % of the best (int4; the others within 1 %).
    assert (error <= best * (1.05 if scheme is Scheme.INT4 else 1.01)).all()


def test_steps_are_searched_under_the_calibration_energy():
    delta = random_delta()
    energy = torch.full((64,), 1e-3)
    energy[:8] = 10.0
    weighted = quantize(delta, Scheme.INT2, energy).dequantize()
    flat = quantize(delta, Scheme.INT2, torch.ones(64)).dequantize()
    better = weighted_error(delta, weighted, energy).sum()
    assert better < 0.8 * weighted_error(delta, flat, energy).sum()


def test_the_error_decreases_with_the_width():
    delta, energy = random_delta(32), random_energy()
    errors = [
        float(weighted_error(delta, quantize(delta, scheme, energy).dequantize(), energy).sum())
        for scheme in BY_WIDTH
    ]
    assert all(wider < narrower for narrower, wider in pairwise(errors))


@pytest.mark.parametrize("scheme", BY_WIDTH)
def test_gaussian_rows_are_distorted_as_by_the_best_uniform_quantizer(scheme):
    delta = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3))
    quantized = quantize(delta, scheme, torch.ones(4096))
    distortion = (delta - quantized.dequantize()).square().mean() / delta.square().mean()
    # Sampling noise of 262,144 draws is below 1 %; int4 spends a level on one side only.
    assert float(distortion) == pytest.approx(GAUSSIAN_DISTORTION[scheme], rel=0.04)


@pytest.mark.parametrize("scheme", Scheme)
def test_codes_stay_below_the_number_of_levels(scheme):
    delta = random_delta(4, 512)
    delta[:, 0] *= 1000
    codes, _ = quantize_rows(delta, scheme, torch.ones(512))
    assert int(codes.max()) < scheme.levels


def test_more_rows_than_a_block_are_quantized_like_each_alone():
    delta, energy = random_delta(300, 16), random_energy(16)
    codes, steps = quantize_rows(delta, Scheme.INT3, energy)
    for row in (0, 127, 128, 299):
        alone_codes, alone_steps = quantize_rows(delta[row : row + 1], Scheme.INT3, energy)
        assert torch.equal(codes[row : row + 1], alone_codes)
        assert torch.equal(steps[row : row + 1], alone_steps)


def test_a_row_that_did_not_change_is_exactly_zero():
    delta = random_delta()
    delta[2] = 0
    assert not quantize(delta, Scheme.SIGN, random_energy()).dequantize()[2].any()


def test_salient_channels_are_those_with_the_largest_error_under_calibration():
    delta, energy = random_delta(16), random_energy()
    delta[:, 5] *= 8
    energy[5] = 1e-6  # the largest error of all, but never read
    delta[:, 9] *= 4
    plain = quantize(delta, Scheme.INT2, energy)
    damage = energy * (delta - plain.dequantize()).square().sum(dim=0)
    expected = damage.argsort(descending=True)[:4].sort().values
    salient = quantize(delta, Scheme.INT2, energy, salient_channels=4).salient_channels_S
    assert torch.equal(salient, expected)
    assert 9 in salient
    assert 5 not in salient


def test_salient_channels_reduce_the_error():
    delta, energy = random_delta(16), random_energy()
    plain = quantize(delta, Scheme.INT2, energy).dequantize()
    kept = quantize(delta, Scheme.INT2, energy, salient_channels=16).dequantize()
    before = weighted_error(delta, plain, energy).sum()
    # The 16 worst of 64 channels carry more than a quarter of the damage.
    assert weighted_error(delta, kept, energy).sum() < 0.75 * before


def test_salient_channels_are_kept_to_sixteen_bits():
    delta = random_delta(16)
    quantized = quantize(delta, Scheme.INT2, random_energy(), salient_channels=4)
    kept = quantized.salient_channels_S
    residual = delta[:, kept] - replace_salient(quantized)[:, kept]
    # bfloat16 has 8 significant bits: half a unit in the last place is 2^-9 of the residual.
    error = (delta - quantized.dequantize())[:, kept].abs()
    assert (error <= residual.abs() * 2**-8).all()


def replace_salient(quantized):
    """What the codes alone give."""
    return QuantizedDelta(
        quantized.scheme, quantized.shape, quantized.codes_RC, quantized.steps_R
    ).dequantize()


def test_no_more_salient_channels_than_there_are():
    quantized = quantize(random_delta(), Scheme.INT2, random_energy(), salient_channels=1000)
    assert len(quantized.salient_channels_S) == 64


def test_channels_without_error_are_not_salient():
    energy = torch.zeros(64)
    energy[:3] = 1.0
    quantized = quantize(random_delta(), Scheme.INT2, energy, salient_channels=8)
    assert quantized.salient_channels_S.tolist() == [0, 1, 2]


@pytest.mark.parametrize("scheme", Scheme)
def test_dead_channels_get_no_codes_and_are_exactly_zero(scheme):
    delta = random_delta(48)
    alive = torch.tensor([3, 17, 40])
    delta[:, [c for c in range(64) if c not in alive]] = 0
    quantized = quantize(delta, scheme, random_energy())
    assert quantized.codes_RC.shape == (48, 3)
    assert torch.equal(quantized.channels_C, alive)
    dead = torch.ones(64, dtype=torch.bool)
    dead[alive] = False
    assert not quantized.dequantize()[:, dead].any()


def test_a_few_dead_channels_keep_their_codes_where_an_index_would_cost_more():
    delta = random_delta(8)
    delta[:, 7] = 0
    quantized = quantize(delta, Scheme.INT2, random_energy())
    assert quantized.channels_C is None
    assert quantized.codes_RC.shape == (8, 64)


def test_embedding_rows_that_did_not_change_get_no_codes_and_are_exactly_zero():
    delta = random_delta(20)
    changed = torch.tensor([1, 2, 11, 19])
    delta[[row for row in range(20) if row not in changed]] = 0
    quantized = quantize_changed_rows(delta, Scheme.SIGN)
    assert torch.equal(quantized.rows_R, changed)
    assert quantized.codes_RC.shape == (4, 64)
    found = quantized.dequantize()
    assert torch.equal(found.any(dim=1).nonzero().squeeze(1), changed)


def test_an_embedding_whose_every_row_changed_has_no_row_index():
    assert quantize_changed_rows(random_delta(20), Scheme.INT4).rows_R is None


def test_coded_rows_share_one_step():
    quantized = quantize_changed_rows(random_delta(1).repeat(20, 1), None)
    assert len(quantized.steps_R.unique()) == 1


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_coded_rows_keep_all_of_the_delta_itself(step):
    delta = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    found = quantize_changed_rows(delta, None, step).dequantize()
    # A step is rounded to the 8 significant bits of bfloat16.
    assert float((found * delta).sum() / delta.square().sum()) == pytest.approx(1, rel=2**-8)


def test_a_wider_step_loses_more():
    delta = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    errors = [
        float((quantize_changed_rows(delta, None, step).dequantize() - delta).square().sum())
        for step in (0.5, 1.0, 2.0)
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_rows_of_new_tokens_are_not_cut_off_among_rows_that_hardly_changed(step):
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(2000, 64, generator=generator) * 1e-4
    delta[[5, 700, 1999]] = torch.randn(3, 64, generator=generator)
    rest = delta - quantize_changed_rows(delta, None, step).dequantize()
    # As much as 16 levels leave of a Gaussian row.
    assert rest.square().sum() < 0.02 * delta.square().sum()


@pytest.mark.parametrize("scale", [1e-36, 1e-22, 1e30])
def test_coded_rows_of_any_size_come_near_the_delta(scale):
    delta = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)) * scale
    found = quantize_changed_rows(delta, None, 0.5).dequantize() / scale
    # Half a step, stretched by some per cent; the outermost level is 3.5 deviations out.
    near = delta.abs() < 3.5 * scale
    assert (found - delta / scale)[near].abs().max() < 0.5 * 0.5 * 1.1


@pytest.mark.parametrize("with_salient", [False, True], ids=["codes", "salient"])
@pytest.mark.parametrize("with_channels", [False, True], ids=["all-channels", "channels"])
@pytest.mark.parametrize("with_rows", [False, True], ids=["all-rows", "rows"])
@pytest.mark.parametrize("scheme", Scheme)
def test_dequantize_agrees_with_a_loop(scheme, with_rows, with_channels, with_salient):
    generator = torch.Generator().manual_seed(7)
    rows = torch.tensor([0, 2, 3]) if with_rows else None
    channels = torch.tensor([1, 4, 5, 8]) if with_channels else None
    coded = (3 if with_rows else 5, 4 if with_channels else 9)
    quantized = QuantizedDelta(
        scheme,
        (5, 9),
        torch.randint(scheme.levels, coded, generator=generator, dtype=torch.uint8),
        torch.rand(coded[0], generator=generator).bfloat16(),
        rows_R=rows,
        channels_C=channels,
        salient_channels_S=torch.tensor([0, 4]) if with_salient else None,
        salient_values_NS=(
            torch.randn(5, 2, generator=generator).bfloat16() if with_salient else None
        ),
    )
    assert torch.equal(quantized.dequantize(), naive_dequantize(quantized))
