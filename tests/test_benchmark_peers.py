"""The published compressors that deltamux is compared with: their bytes, values and feedback."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = 64, 96
NAMES = [
    "bitdelta",
    "me-switch",
    "deltazip-2",
    "deltazip-4",
    "delta-come",
    "dare-4",
    "low-rank",
    "rtn-2",
    "rtn-3",
    "rtn-4",
]


def _load(name: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    yield from _load("benchmarks.peers.methods")


@pytest.fixture(scope="module")
def feedback() -> Iterator[ModuleType]:
    yield from _load("benchmarks.peers.feedback")


def random_matrix(peers, rows=ROWS, columns=COLUMNS, seed=0):
    """A dense delta and correlated inputs of uneven energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing *= torch.logspace(0, -1, columns).unsqueeze(1)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    delta = torch.randn(rows, columns, generator=generator) * 1e-3
    return peers.Matrix(delta, inputs.T @ inputs / len(inputs))


def output_error(matrix, rebuilt):
    residual = matrix.delta_NK - rebuilt
    return float(((residual @ matrix.moment_KK) * residual).sum())


def most_levels(delta):
    """The largest number of distinct values of any row."""
    return max(len(row.unique()) for row in delta)


def test_every_peer_is_listed(peers):
    assert list(peers.PEERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_rebuilds_float32_of_the_same_shape(peers, name):
    compressed = peers.PEERS[name](random_matrix(peers))
    assert compressed.delta_NK.shape == (ROWS, COLUMNS)
    assert compressed.delta_NK.dtype == torch.float32
    assert isinstance(compressed.num_bytes, int)


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_is_deterministic_whatever_the_global_seed(peers, name):
    matrix = random_matrix(peers)
    torch.manual_seed(1)
    first = peers.PEERS[name](matrix)
    torch.manual_seed(2)
    second = peers.PEERS[name](matrix)
    assert torch.equal(first.delta_NK, second.delta_NK)
    assert first.num_bytes == second.num_bytes


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_leaves_its_input_as_it_is(peers, name):
    matrix = random_matrix(peers)
    delta, moment = matrix.delta_NK.clone(), matrix.moment_KK.clone()
    peers.PEERS[name](matrix)
    assert torch.equal(matrix.delta_NK, delta)
    assert torch.equal(matrix.moment_KK, moment)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_delta_is_rebuilt_as_zero(peers, name):
    matrix = peers.Matrix(torch.zeros(ROWS, COLUMNS), torch.zeros(COLUMNS, COLUMNS))
    assert not peers.PEERS[name](matrix).delta_NK.any()


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("bitdelta", 64 * 96 // 8 + 4),
        # 88 channels in 2 bits; 64 steps; 8 fp16 channels and their indices; the zero point.
        ("me-switch", 64 * 88 // 4 + 64 * 2 + 64 * 8 * 2 + 8 * 2 + 1),
        # Two of every four weights, each with a 2-bit position; 64 steps.
        ("deltazip-2", 64 * 24 * 2 * (2 + 2) // 8 + 64 * 2),
        ("deltazip-4", 64 * 24 * 2 * (4 + 2) // 8 + 64 * 2),
        # 768 bytes hold four vectors. V: 2 x 96 8-bit and 2 x 96 3-bit codes, in one group a
        # vector. U: 64 rows of two fp16 numbers, and of two 3-bit codes with step and zero point.
        # Last, singular values. 5910 bits.
        (
            "delta-come",
            (2 * (96 * 8 + 24) + 2 * (96 * 3 + 19) + 64 * 32 + 64 * (6 + 19) + 4 * 16 + 2) // 8,
        ),
        # 768 bytes hold two vectors of 2 x (64 + 96) bytes.
        ("low-rank", 2 * 2 * (64 + 96)),
        ("rtn-2", 64 * 96 // 4 + 64 * 2),
        ("rtn-3", 64 * 96 * 3 // 8 + 64 * 2),
        ("rtn-4", 64 * 96 // 2 + 64 * 2),
    ],
)
def test_bytes_are_those_of_the_hand_formula(peers, name, num_bytes):
    assert peers.PEERS[name](random_matrix(peers)).num_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("bitdelta", 2 + 4),  # 15 bits
        ("deltazip-2", 6 + 6),  # 3 rows of two groups of 8 bits
        ("deltazip-4", 9 + 6),
        ("rtn-3", 6 + 6),  # 45 bits
    ],
)
def test_odd_shapes_round_up_to_a_byte(peers, name, num_bytes):
    assert peers.PEERS[name](random_matrix(peers, 3, 5)).num_bytes == num_bytes


def test_bitdelta_holds_two_values(peers):
    matrix = random_matrix(peers)
    rebuilt = peers.bitdelta(matrix).delta_NK
    scale = matrix.delta_NK.abs().mean()
    assert torch.equal(rebuilt.unique(), torch.stack([-scale, scale]))


def test_bitdelta_parts_make_up_its_delta(peers):
    matrix = random_matrix(peers)
    sign, scale = peers.bitdelta_parts(matrix)
    assert torch.equal(sign, matrix.delta_NK.sign())
    assert torch.equal(peers.bitdelta(matrix).delta_NK, sign * scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_round_to_nearest_holds_a_level_a_code(peers, bits):
    matrix = random_matrix(peers)
    rebuilt = peers.rtn(bits)(matrix).delta_NK
    steps = (2 * matrix.delta_NK.abs().amax(dim=1) / (2**bits - 1)).half().float()
    levels = rebuilt / steps.unsqueeze(1)
    # Quotients of float32 products are whole to one rounding.
    torch.testing.assert_close(levels, levels.round(), rtol=1e-6, atol=0)
    assert levels.round().amin() >= -(2 ** (bits - 1))
    assert levels.round().amax() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 4])
def test_deltazip_holds_two_nonzeros_in_four_and_a_level_a_code(peers, bits):
    rebuilt = peers.deltazip(bits)(random_matrix(peers)).delta_NK
    assert rebuilt.view(ROWS, -1, 4).count_nonzero(dim=2).max() == 2
    assert most_levels(rebuilt) <= 2**bits


def test_deltazip_takes_a_last_group_of_less_than_four(peers):
    rebuilt = peers.deltazip(4)(random_matrix(peers, 16, 70)).delta_NK
    assert rebuilt[:, 68:].any()


def test_me_switch_holds_four_values_beside_its_salient_channels(peers):
    matrix = random_matrix(peers)
    levels, steps, salient = peers.me_switch_parts(matrix, 8)
    kept = salient.any(dim=0)
    assert int(kept.sum()) == 8
    assert not levels[:, kept].any()
    assert set(levels[:, ~kept].unique().tolist()) == {-1.5, -0.5, 0.5, 1.5}
    assert torch.equal(steps, steps.half().float())
    assert torch.equal(salient[:, kept], matrix.delta_NK[:, kept].half().float())
    rebuilt = peers.me_switch(8)(matrix).delta_NK
    assert torch.equal(rebuilt, levels * steps.unsqueeze(1) + salient)


def test_me_switch_has_a_level_of_zero_for_a_delta_of_many_zeros(peers):
    matrix = random_matrix(peers)
    matrix.delta_NK[torch.rand(ROWS, COLUMNS, generator=torch.manual_seed(0)) < 0.8] = 0
    levels, _, _ = peers.me_switch_parts(matrix)
    assert set(levels.unique().tolist()) == {-2, -1, 0, 1}


def test_me_switch_keeps_the_channels_that_cost_the_output_most(peers):
    matrix = random_matrix(peers)
    moment = matrix.moment_KK.clone()
    moment.diagonal()[[5, 50]] *= 1000
    _, _, salient = peers.me_switch_parts(peers.Matrix(matrix.delta_NK, moment), 2)
    assert salient.any(dim=0).nonzero().flatten().tolist() == [5, 50]


@pytest.mark.parametrize("zero", [1.5, 2.0])
def test_me_switch_steps_are_near_the_least_squares_step(peers, zero):
    delta = random_matrix(peers, 4, 512).delta_NK
    _, error = peers._two_bit_steps(delta, zero)
    fine = torch.linspace(0.3, 3, 1000) * 1e-3
    errors = [
        (delta - peers._two_bit_levels(delta, step.expand(4), zero) * step).square().sum(dim=1)
        for step in fine
    ]
    # A grid of 7 % steps is off by at most 3.5 %, which costs well under 1 % at a minimum.
    assert error <= 1.01 * float(torch.stack(errors).amin(dim=0).sum())


def test_me_switch_may_keep_every_channel(peers):
    matrix = random_matrix(peers)
    compressed = peers.me_switch(1000)(matrix)
    assert torch.equal(compressed.delta_NK, matrix.delta_NK.half().float())
    assert compressed.num_bytes == ROWS * 2 + COLUMNS * ROWS * 2 + COLUMNS * 2 + 1


@pytest.mark.parametrize("bits_per_weight", [0.7, 1.0, 2.0, 3.0, 20.0])
def test_delta_come_stays_within_its_budget(peers, bits_per_weight):
    compressed = peers.delta_come(bits_per_weight)(random_matrix(peers))
    assert compressed.num_bytes <= bits_per_weight * ROWS * COLUMNS / 8


def test_delta_come_has_the_rank_that_its_bytes_are_for(peers):
    rebuilt = peers.delta_come(1.0)(random_matrix(peers)).delta_NK
    assert torch.linalg.matrix_rank(rebuilt, rtol=1e-4) == 4


def test_delta_come_is_nearly_exact_for_a_delta_of_two_vectors(peers):
    matrix = random_matrix(peers)
    left, sizes, right = torch.linalg.svd(matrix.delta_NK)
    delta = left[:, :2] * sizes[:2] @ right[:2]
    matrix = peers.Matrix(delta, matrix.moment_KK)
    rebuilt = peers.delta_come(1.0)(matrix).delta_NK
    # The two take 8 bits and fp16; an 8-bit min-max grid loses about 1e-4 of the energy.
    assert output_error(matrix, rebuilt) < 1e-3 * output_error(matrix, torch.zeros_like(delta))


@pytest.mark.parametrize(("drop", "bitmap"), [(0.9, True), (0.99, False)])
def test_dare_stores_the_smaller_of_bitmap_and_columns(peers, drop, bitmap):
    # 16-bit codes: no survivor is rounded to zero, so nonzeros are the survivors.
    compressed = peers.dare(drop, 16)(random_matrix(peers))
    survivors = int(compressed.delta_NK.count_nonzero())
    positions = ROWS * COLUMNS // 8 if bitmap else 2 * (survivors + ROWS)
    assert compressed.num_bytes == 2 * survivors + positions + 2 * ROWS


def test_dare_rescales_what_it_keeps(peers):
    matrix = random_matrix(peers)
    rebuilt = peers.dare(0.9, 8)(matrix).delta_NK
    kept = rebuilt != 0
    assert 0.08 < float(kept.float().mean()) < 0.12
    largest = rebuilt.abs().amax(dim=1, keepdim=True)
    # Of a row's largest, half a step is 1/255, and fp16 moves the ends of a grid by 1/2048.
    off = (rebuilt - matrix.delta_NK * 10).abs()[kept]
    assert bool((off <= (largest / 200).expand_as(kept)[kept]).all())


def test_dare_holds_a_level_a_code(peers):
    assert most_levels(peers.dare(0.5, 3)(random_matrix(peers)).delta_NK) <= 8


def test_dare_drops_matrices_of_one_shape_independently(peers):
    masks = [
        peers.dare(0.5, 16, seed)(random_matrix(peers, seed=content)).delta_NK != 0
        for seed, content in [(0, 0), (1, 0), (0, 1)]
    ]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("bits_per_weight", "rank"), [(0.1, 1), (1.0, 2), (4.0, 9), (99.0, 64)])
def test_low_rank_has_the_rank_of_its_budget(peers, bits_per_weight, rank):
    compressed = peers.low_rank(bits_per_weight)(random_matrix(peers))
    assert torch.linalg.matrix_rank(compressed.delta_NK) == rank
    assert compressed.num_bytes == rank * 2 * (ROWS + COLUMNS)


def test_low_rank_loses_only_the_vectors_that_it_leaves_out(peers):
    delta = random_matrix(peers).delta_NK
    rebuilt = peers.low_rank(4.0)(random_matrix(peers)).delta_NK
    lost = torch.linalg.svdvals(delta)[9:].square().sum()
    # The fp16 of the factors adds a millionth of the energy.
    torch.testing.assert_close((delta - rebuilt).square().sum(), lost, rtol=1e-4, atol=0)


@pytest.mark.parametrize("by_energy", [False, True])
def test_feedback_lowers_the_output_error_of_the_same_grid(peers, feedback, by_energy):
    matrix = random_matrix(peers)
    grid = feedback.symmetric_rows(matrix.delta_NK, 3)
    inputs = feedback.curvature(matrix.moment_KK, by_energy)
    rounded = feedback.feedback(matrix.delta_NK, grid, inputs)
    plain = output_error(matrix, grid.round(matrix.delta_NK))
    assert torch.equal(grid.round(rounded), rounded)
    assert output_error(matrix, rounded) < 0.5 * plain


def test_deltazip_loses_less_than_pruning_by_magnitude_on_the_same_grid(peers, feedback):
    matrix = random_matrix(peers)
    grouped = matrix.delta_NK.view(ROWS, -1, 4)
    smallest = grouped.abs().topk(2, dim=2, largest=False).indices
    pruned = grouped.scatter(2, smallest, 0).view(ROWS, COLUMNS)
    plain = feedback.symmetric_rows(matrix.delta_NK, 4).round(pruned)
    rebuilt = peers.deltazip(4)(matrix).delta_NK
    assert output_error(matrix, rebuilt) < 0.5 * output_error(matrix, plain)


def test_feedback_is_that_of_the_inverse_of_the_columns_to_come(peers, feedback):
    matrix = random_matrix(peers, 5, 70)
    moment = matrix.moment_KK.double()
    moment += 0.01 * moment.diagonal().mean() * torch.eye(70, dtype=torch.float64)
    grid = feedback.symmetric_rows(matrix.delta_NK, 8)
    todo = matrix.delta_NK.double()
    expected = torch.zeros_like(todo)
    for j in range(70):
        inverse = torch.linalg.inv(moment[j:, j:])
        expected[:, j] = grid.round(todo.float())[:, j]
        error = (todo[:, j] - expected[:, j]) / inverse[0, 0]
        todo[:, j:] -= error.unsqueeze(1) * inverse[0]
    rounded = feedback.feedback(matrix.delta_NK, grid, feedback.curvature(matrix.moment_KK))
    # One in many codes may flip where float32 and float64 fall on two sides of a boundary.
    assert (rounded == expected.float()).float().mean() > 0.98


def test_groups_have_a_whole_zero_point_and_reach_both_ends(feedback):
    values = torch.linspace(-1, 3, 40).repeat(2, 1)
    grid = feedback.asymmetric_groups(values, 3, 16)
    assert torch.equal(grid.zeros_NK, grid.zeros_NK.round())
    assert grid.zeros_NK.amin() >= 0
    assert grid.zeros_NK.amax() <= 7
    assert [len(grid.steps_NK[0, i : i + 16].unique()) for i in (0, 16, 32)] == [1, 1, 1]
    # A value is off by half a step, and by another half where the zero point was rounded.
    assert bool(((grid.round(values) - values).abs() <= 1.001 * grid.steps_NK).all())
