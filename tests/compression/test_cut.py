"""Parts of stored weights: what ranks hold adds up to the whole delta, to the last bit."""

import json
from dataclasses import asdict

import pytest
import torch

from deltamux.compression.artifact.matrices import Coded, Factored
from deltamux.compression.artifact.stored import BiasDelta
from deltamux.compression.image.cut import WHOLE, Cut, local_shapes
from deltamux.compression.image.dense import served_delta
from deltamux.compression.image.layout import Field
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme
from tests.compression.test_image import (
    SCHEMES,
    image_of,
    laplace_codes,
    random_codes,
    sparse_codes,
)

ROWS, CHANNELS = 70, 12


def row_cuts(ranks: int, rows: int) -> list[Cut]:
    each = rows // ranks
    return [Cut(rows=((rank * each, (rank + 1) * each),)) for rank in range(ranks)]


def channel_cuts(ranks: int, channels: int) -> list[Cut]:
    each = channels // ranks
    return [Cut(channels=(rank * each, (rank + 1) * each)) for rank in range(ranks)]


def served(stored: Coded | Factored, cut: Cut) -> torch.Tensor:
    shape = cut.shape(stored.delta.shape)
    return served_delta(image_of(stored.record(cut)), 1, *shape)


def whole_codes() -> QuantizedDelta:
    return laplace_codes((ROWS, CHANNELS), 2.0)


CODED = {"whole": whole_codes()} | {f"sparse {each}": sparse_codes(each) for each in SCHEMES}


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("ranks", [1, 2])
def test_codes_are_cut_by_rows_and_by_channels(name: str, ranks: int) -> None:
    stored, whole = Coded(CODED[name]), CODED[name].dequantize()
    by_rows = [served(stored, cut) for cut in row_cuts(ranks, ROWS)]
    by_channels = [served(stored, cut) for cut in channel_cuts(ranks, CHANNELS)]
    assert torch.equal(torch.cat(by_rows), whole)
    assert torch.equal(torch.cat(by_channels, dim=1), whole)


def test_a_wide_matrix_keeps_its_escapes_in_either_part() -> None:
    quantized = laplace_codes((4, 9000), 0.6)
    parts = [served(Coded(quantized), cut) for cut in channel_cuts(2, 9000)]
    assert torch.equal(torch.cat(parts, dim=1), quantized.dequantize())


def test_q_k_and_v_of_one_matrix_are_cut_each() -> None:
    """Heads 2 and 3 of four, and the second of two of k and of v, as Phi-3 stores them in one matrix."""
    quantized = random_codes(Scheme.TERNARY, (64, 16))
    cut = Cut(rows=((16, 32), (40, 48), (56, 64)))
    rows = [*range(16, 32), *range(40, 48), *range(56, 64)]
    assert torch.equal(served(Coded(quantized), cut), quantized.dequantize()[rows])


def test_a_part_without_a_changed_row_adds_nothing() -> None:
    """Of a vocabulary's rows often few change, and all of them on one rank."""
    coded = random_codes(Scheme.INT4, (3, 8))
    rows = torch.tensor([1, 2, 30])
    quantized = QuantizedDelta(Scheme.INT4, (64, 8), coded.codes_RC, coded.steps_R, rows_R=rows)
    first, second = row_cuts(2, 64)
    assert torch.equal(served(Coded(quantized), first), quantized.dequantize()[:32])
    reader = image_of(Coded(quantized).record(second))
    assert not served_delta(reader, 1, 32, 8).any()
    assert reader.number(1, Field.ROWS) == reader.number(1, Field.PLANES) == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_factors_are_cut_the_one_by_rows_and_the_other_by_channels(ranks: int) -> None:
    delta = FactoredDelta(
        random_codes(Scheme.INT8, (64, 5)), random_codes(Scheme.INT8, (5, 32), seed=1)
    )
    by_rows = [served(Factored(delta), cut) for cut in row_cuts(ranks, 64)]
    by_channels = [served(Factored(delta), cut) for cut in channel_cuts(ranks, 32)]
    whole = served(Factored(delta), WHOLE)
    torch.testing.assert_close(torch.cat(by_rows), whole, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(torch.cat(by_channels, dim=1), whole, rtol=1e-5, atol=1e-2)


def test_a_bias_is_cut_like_its_rows_and_summed_once() -> None:
    bias = BiasDelta(torch.arange(8.0))
    part = bias.record(Cut(rows=((4, 8),)))
    found = image_of(part).section(1, Field.VECTOR, torch.float32, 4)
    assert found is not None
    assert found.tolist() == [4, 5, 6, 7]
    assert bias.record(Cut(channels=(4, 8), bias=False)).sections == {}


def test_shapes_of_parts_keep_the_order() -> None:
    shapes = {"a": (8, 6), "b": (4,), "c": (6, 8)}
    cuts = {"c": Cut(channels=(0, 4)), "a": Cut(rows=((0, 2), (4, 6)))}
    found = local_shapes(shapes, cuts)
    assert list(found.items()) == [("a", (4, 6)), ("b", (4,)), ("c", (6, 4))]


def test_a_cut_survives_json() -> None:
    for cut in (WHOLE, Cut(rows=((0, 2), (4, 6))), Cut(channels=(3, 6), bias=False)):
        assert Cut.from_json(json.loads(json.dumps(asdict(cut)))) == cut
