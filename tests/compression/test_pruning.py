import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.compression.pruning.scores import Pattern, Score, keep_mask

BLOCK_ROWS = 32
sparsities = st.floats(0, 1, exclude_max=True)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=60)


def random_case(rows, columns, seed):
    """Whole numbers with many ties and zeros, weighted by powers of 4: scores are exact."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randint(-4, 5, (rows, columns), generator=generator).float()
    energy, innovation = 4.0 ** torch.randint(-2, 3, (2, columns), generator=generator)
    return delta, energy, innovation


def plain_scores(delta, energy, innovation, score):
    """By the papers' formulas, an element that did not change below all others."""
    formula = {
        Score.MAGNITUDE: delta.abs(),
        Score.WANDA: delta.abs() * energy.sqrt(),
        Score.SPARSEGPT: delta.square() * innovation,
    }[score]
    return torch.where(delta == 0, -1.0, formula)


def best(scores, count):
    """Mask of the `count` best of a vector; of equals, the first."""
    order = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def greedy_lines(energy, percent):
    """The greedy rule with every mean computed afresh and the stop in whole numbers."""
    rows, columns = (list(range(size)) for size in energy.shape)
    while 100 * len(rows) * len(columns) > (100 - percent) * energy.numel():
        kept = energy[rows][:, columns]
        row, column = int(kept.mean(dim=1).argmin()), int(kept.mean(dim=0).argmin())
        if kept[row].mean() < kept[:, column].mean():
            del rows[row]
        else:
            del columns[column]
    mask = torch.zeros(energy.shape, dtype=torch.bool)
    for row in rows:
        mask[row, columns] = True
    return mask


@examples
@given(sizes, sizes, seeds, sparsities, st.sampled_from([Score.MAGNITUDE, Score.SPARSEGPT]))
def test_unstructured_keeps_the_best_of_the_matrix(rows, columns, seed, sparsity, score):
    case = random_case(rows, columns, seed)
    mask = keep_mask(*case, score=score, pattern=Pattern.UNSTRUCTURED, sparsity=sparsity)
    count = round((1 - sparsity) * rows * columns)
    expected = best(plain_scores(*case, score).flatten(), count).view(rows, columns)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)


@examples
@given(sizes, sizes, seeds, sparsities)
def test_wanda_keeps_the_best_of_each_row(rows, columns, seed, sparsity):
    case = random_case(rows, columns, seed)
    mask = keep_mask(*case, score=Score.WANDA, pattern=Pattern.UNSTRUCTURED, sparsity=sparsity)
    count = round((1 - sparsity) * columns)
    expected = torch.stack([best(row, count) for row in plain_scores(*case, Score.WANDA)])
    assert torch.equal(mask, expected)


@examples
@given(sizes, sizes, seeds, st.sampled_from(Score))
def test_two_of_every_four_channels_are_kept(rows, columns, seed, score):
    case = random_case(rows, columns, seed)
    mask = keep_mask(*case, score=score, pattern=Pattern.N_M, sparsity=0.5)
    groups = plain_scores(*case, score).split(4, dim=1)
    expected = torch.cat([torch.stack([best(row, 2) for row in group]) for group in groups], dim=1)
    assert torch.equal(mask, expected)


@examples
@given(st.integers(1, 80), st.integers(1, 12), seeds, sparsities, st.sampled_from(Score))
def test_blocks_are_kept_by_their_squared_scores(rows, columns, seed, sparsity, score):
    delta, energy, innovation = random_case(rows, columns, seed)
    # Blocks that did not change at all, to be dropped first.
    delta[:BLOCK_ROWS, ::2] = 0
    mask = keep_mask(
        delta, energy, innovation, score=score, pattern=Pattern.BLOCKS, sparsity=sparsity
    )
    weights = {Score.MAGNITUDE: 1.0, Score.WANDA: energy, Score.SPARSEGPT: innovation}[score]
    sums = torch.stack([part.square().sum(dim=0) for part in delta.split(BLOCK_ROWS)]) * weights
    kept = best(sums.flatten(), round((1 - sparsity) * sums.numel())).view_as(sums)
    assert torch.equal(mask, kept[torch.arange(rows) // BLOCK_ROWS])


@examples
@given(sizes, sizes, seeds, st.integers(0, 99), st.sampled_from(Score))
def test_structured_drops_channels_and_rows_greedily(rows, columns, seed, percent, score):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, columns, generator=generator)
    energy, innovation = torch.rand(2, columns, generator=generator) + 0.01
    mask = keep_mask(
        delta, energy, innovation, score=score, pattern=Pattern.STRUCTURED, sparsity=percent / 100
    )
    weights = {Score.MAGNITUDE: 1.0, Score.WANDA: energy, Score.SPARSEGPT: innovation}[score]
    expected = greedy_lines((delta.square() * weights).double(), percent)
    assert torch.equal(mask, expected)


def test_structured_stops_as_soon_as_enough_is_gone():
    delta = torch.arange(1.0, 21.0).expand(5, 20)
    flat = torch.ones(20)
    # (1 - 0.8) * 100 is a little less than 20: the sixteenth channel is enough all the same.
    mask = keep_mask(
        delta, flat, flat, score=Score.MAGNITUDE, pattern=Pattern.STRUCTURED, sparsity=0.8
    )
    assert mask.any(dim=0).tolist() == [False] * 16 + [True] * 4
    assert mask.any(dim=1).all()


def test_structured_drops_lines_that_did_not_change_first():
    delta = torch.ones(4, 4)
    delta[1] = 0
    # The first channel has no energy, but it did change.
    energy = torch.tensor([0.0, 1.0, 1.0, 1.0])
    mask = keep_mask(
        delta, energy, energy, score=Score.WANDA, pattern=Pattern.STRUCTURED, sparsity=0.25
    )
    assert torch.equal(mask, delta != 0)


@pytest.mark.parametrize("pattern", [Pattern.UNSTRUCTURED, Pattern.N_M])
@pytest.mark.parametrize("score", Score)
def test_changed_elements_go_before_unchanged_ones_even_in_dead_channels(score, pattern):
    delta = torch.tensor([[0.0, 1e-30, 0.0, -1e-30]])
    dead = torch.tensor([1.0, 0.0, 1.0, 1e-30])
    mask = keep_mask(delta, dead, dead, score=score, pattern=pattern, sparsity=0.5)
    assert mask.tolist() == [[False, True, False, True]]


def test_changed_blocks_go_before_unchanged_ones_even_in_dead_channels():
    delta = torch.zeros(BLOCK_ROWS, 4)
    delta[5, 1] = delta[6, 3] = 1e-30
    dead = torch.tensor([1.0, 0.0, 1.0, 1e-30])
    mask = keep_mask(delta, dead, dead, score=Score.WANDA, pattern=Pattern.BLOCKS, sparsity=0.5)
    assert torch.equal(mask, delta.any(dim=0).expand(BLOCK_ROWS, 4))


@pytest.mark.parametrize(
    ("score", "pattern"),
    [pair for pair in itertools.product(Score, Pattern) if pair[1] is not Pattern.N_M],
)
def test_a_sparsity_of_zero_keeps_everything(score, pattern):
    case = random_case(33, 7, seed=1)
    assert keep_mask(*case, score=score, pattern=pattern, sparsity=0.0).all()


@pytest.mark.parametrize("pattern", Pattern)
def test_the_delta_is_not_modified(pattern):
    delta, energy, innovation = random_case(8, 8, seed=2)
    before = delta.clone()
    keep_mask(delta, energy, innovation, score=Score.WANDA, pattern=pattern, sparsity=0.5)
    assert torch.equal(delta, before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("pattern", Pattern)
def test_a_sparsity_outside_zero_to_one_is_refused(pattern, sparsity):
    case = random_case(4, 4, seed=3)
    with pytest.raises(ValueError, match=r"at least 0 and below 1, got .*: give the share"):
        keep_mask(*case, score=Score.MAGNITUDE, pattern=pattern, sparsity=sparsity)


def test_two_of_four_at_another_sparsity_is_refused():
    case = random_case(4, 4, seed=4)
    with pytest.raises(ValueError, match=r"'2:4' always drops half, got sparsity 0\.6: set it"):
        keep_mask(*case, score=Score.MAGNITUDE, pattern=Pattern.N_M, sparsity=0.6)
