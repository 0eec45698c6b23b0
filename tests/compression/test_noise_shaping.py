import pytest
import torch

from deltamux.compression.rounding.gptq import Grid, curvature, round_with_feedback
from deltamux.compression.rounding.noise_shaping import (
    BLOCK,
    ROWS,
    SKETCH_STEP,
    WIDTH,
    _answers,
    shaped,
    sketch_inputs,
)
from deltamux.compression.rounding.quantize import Scheme, requantize, slot_steps

# More channels than a block and more rows than are rounded at once, and no multiples of them.
CHANNELS = 3 * BLOCK + 7
DIRECTIONS = 6
MASSIVE = torch.where(torch.arange(CHANNELS) == 3, 1e4, 1.0)


def moment(causes=DIRECTIONS, channels=CHANNELS, noise=1.0, seed=0):
    """E[x xᵀ] of inputs with some causes in common and unlike energies, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = 2 * torch.randn(channels, causes, generator=generator)
    scale = torch.rand(channels, generator=generator) * 3 + 0.1
    own = noise * torch.eye(channels)
    return scale * (mixing @ mixing.T + own) * scale.unsqueeze(1)


def delta(rows=40, channels=CHANNELS, seed=1):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) * 0.01


def restored(sketch):
    """S (I + VᵀV) S, float64."""
    directions, scale = (part.double() for part in sketch.parts())
    return scale * (torch.eye(len(scale)) + directions.T @ directions) * scale.unsqueeze(1)


def felt(moment_KK, rest_NK):
    """tr(E H Eᵀ), float64."""
    rest = rest_NK.double()
    return float(((rest @ moment_KK.double()) * rest).sum())


def test_a_sketch_of_few_causes_is_the_moment_up_to_its_steps_and_a_factor():
    moment_KK = moment()
    found = restored(sketch_inputs(moment_KK, DIRECTIONS))
    factor = float(found.trace() / moment_KK.double().trace())
    error = (found / factor - moment_KK).norm() / moment_KK.norm()
    # Entries of V are some 2 with an error of a step's root of a twelfth, log2 s is off by half a step.
    assert error < SKETCH_STEP / 2


def test_more_directions_explain_more():
    moment_KK = moment(causes=12)
    errors = []
    for count in (1, 4, 12):
        found = restored(sketch_inputs(moment_KK, count))
        factor = float((found * moment_KK).sum() / found.square().sum())
        errors.append(float((factor * found - moment_KK).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_an_answer_is_what_the_channels_to_come_make_up_best():
    """δ_F = −H_FF⁻¹ H_FB e_B, with the sketch's H in full."""
    directions, scale = sketch_inputs(moment(), DIRECTIONS).parts()
    blocks = [slice(start, start + BLOCK) for start in range(0, CHANNELS, BLOCK)]
    whole = restored(sketch_inputs(moment(), DIRECTIONS))
    lost = torch.randn(BLOCK, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    coming = slice(BLOCK, CHANNELS)
    expected = -torch.linalg.solve(whole[coming, coming], whole[coming, :BLOCK] @ lost)
    answer = _answers(directions, scale, blocks)[1].double()
    carried = directions[:, :BLOCK].double() @ (scale[:BLOCK].double() * lost)
    found = -carried @ answer
    # Float32 keeps seven digits, and the solve loses some.
    torch.testing.assert_close(found, expected[:BLOCK], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40, ROWS + 3])
def test_inputs_with_common_causes_feel_little_of_shaped_rounding(rows):
    moment_KK, delta_NK = moment(), delta(rows)
    shaped_rest = shaped(delta_NK, sketch_inputs(moment_KK, DIRECTIONS)).dequantize() - delta_NK
    nearest_rest = requantize(delta_NK).dequantize() - delta_NK
    assert felt(moment_KK, shaped_rest) < 0.3 * felt(moment_KK, nearest_rest)


def test_it_is_not_far_from_feedback_under_the_moment_itself():
    moment_KK, delta_NK = moment(), delta()
    found = shaped(delta_NK, sketch_inputs(moment_KK, DIRECTIONS))
    grid = Grid(Scheme.INT4, found.steps_R.float())
    ((levels_NK, _),) = round_with_feedback(delta_NK, curvature(moment_KK), [grid])
    best = felt(moment_KK, levels_NK * grid.steps_N.unsqueeze(1) - delta_NK)
    assert felt(moment_KK, found.dequantize() - delta_NK) < 1.5 * best


def test_inputs_without_common_causes_feel_what_wider_steps_cost():
    """Nothing can be made up for: the noise is that of the steps, their square over twelve."""
    moment_KK = moment(causes=0)
    delta_NK = delta()
    shaped_rest = shaped(delta_NK, sketch_inputs(moment_KK, DIRECTIONS)).dequantize() - delta_NK
    noise = (WIDTH * slot_steps(delta_NK)).square().sum() / 12 * moment_KK.trace()
    assert felt(moment_KK, shaped_rest) == pytest.approx(float(noise), rel=0.1)


def test_few_elements_reach_the_ends_of_the_codes():
    """One in 700 of Gaussian rows, where steps of least error put one in 50."""
    delta_NK = delta(rows=400)

    def at_ends(quantized):
        codes_NK = quantized.codes_RC
        return float(((codes_NK == 0) | (codes_NK == Scheme.INT4.levels - 1)).float().mean())

    assert at_ends(shaped(delta_NK, sketch_inputs(moment(causes=0), DIRECTIONS))) < 0.003
    assert at_ends(requantize(delta_NK)) > 0.01


def test_a_sketch_has_no_more_directions_than_channels():
    sketch = sketch_inputs(moment(channels=5), 16)
    assert sketch.count == 5
    assert torch.isfinite(shaped(delta(channels=5), sketch).dequantize()).all()


@pytest.mark.parametrize(
    "moment_KK",
    [
        torch.zeros(CHANNELS, CHANNELS),
        moment() * 1e-30,
        moment(noise=0.0),
        moment() * MASSIVE.outer(MASSIVE),
    ],
    ids=["zero", "tiny", "singular", "massive"],
)
def test_odd_inputs_give_finite_sketches_and_codes_within_four_bits(moment_KK):
    sketch = sketch_inputs(moment_KK, DIRECTIONS)
    directions, scale = sketch.parts()
    assert torch.isfinite(directions).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    found = shaped(delta(), sketch)
    assert int(found.codes_RC.max()) < Scheme.INT4.levels
    nearest = requantize(delta())
    rest, nearest_rest = found.dequantize() - delta(), nearest.dequantize() - delta()
    assert felt(moment_KK, rest) <= felt(moment_KK, nearest_rest)


def test_rows_of_zero_stay_zero():
    delta_NK = delta()
    delta_NK[::2] = 0
    found = shaped(delta_NK, sketch_inputs(moment(), DIRECTIONS)).dequantize()
    assert not found[::2].any()
    assert found[1::2].any(dim=1).all()


def test_energy_that_directions_leave_over_is_damped():
    """A channel that the leading directions explain in full must not answer for all others."""
    _, scale = sketch_inputs(moment(noise=0.0), DIRECTIONS).parts()
    assert scale.eq(1).all()
    _, scale = sketch_inputs(moment(noise=1.0), DIRECTIONS).parts()
    assert len(scale.unique()) > 5
