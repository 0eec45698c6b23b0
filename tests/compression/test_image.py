"""The slot image against the stored delta: equal to the last bit."""

import numpy as np
import pytest
import torch

from deltamux.compression.image.dense import served_delta
from deltamux.compression.image.layout import (
    Field,
    ImageReader,
    assemble,
    check_image,
    head_bytes,
)
from deltamux.compression.image.planes import row_stride, smallest_form
from deltamux.compression.image.weights import (
    adapter_record,
    coded_bytes,
    coded_record,
    factored_bytes,
    factored_record,
    vector_record,
)
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme

SHAPES = [(3, 5), (7, 64), (16, 65), (5, 576), (4, 5000)]


def random_codes(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedDelta:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, scheme.levels, shape, generator=generator, dtype=torch.uint8)
    steps = torch.rand(shape[0], generator=generator).to(torch.bfloat16)
    return QuantizedDelta(scheme, shape, codes, steps)


def laplace_codes(shape: tuple[int, int], width: float, seed: int = 0) -> QuantizedDelta:
    rng = np.random.default_rng(seed)
    levels = np.round(rng.laplace(0, width, shape)).clip(-8, 7)
    codes = torch.from_numpy((levels + 8).astype(np.uint8))
    return QuantizedDelta(Scheme.INT4, shape, codes, torch.full((shape[0],), 0.125).bfloat16())


def image_of(record: object) -> ImageReader:
    image = assemble({1: record}, 3)  # type: ignore[dict-item]
    check_image(image, 3)
    return ImageReader(image)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", [s for s in Scheme if s is not Scheme.INT8], ids=str)
def test_codes_of_every_scheme_are_exact(scheme: Scheme, shape: tuple[int, int]) -> None:
    quantized = random_codes(scheme, shape)
    assert torch.equal(
        served_delta(image_of(coded_record(quantized)), 1, *shape), quantized.dequantize()
    )


@pytest.mark.parametrize("width", [0.05, 0.3, 0.6, 2.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_skewed_codes_are_exact(width: float, shape: tuple[int, int]) -> None:
    quantized = laplace_codes(shape, width)
    assert torch.equal(
        served_delta(image_of(coded_record(quantized)), 1, *shape), quantized.dequantize()
    )


def test_the_form_follows_what_is_smallest() -> None:
    shape = 64, 1024
    planes = {
        width: image_of(coded_record(laplace_codes(shape, width))).number(1, Field.PLANES)
        for width in (0.02, 0.4, 4.0)
    }
    assert planes == {0.02: 0, 0.4: 1, 4.0: 2}


def test_a_form_costs_what_its_sections_take() -> None:
    for width in (0.02, 0.4, 0.7, 4.0):
        quantized = laplace_codes((64, 1000), width)
        counts = np.bincount(quantized.codes_RC.reshape(-1).numpy(), minlength=16)
        record = coded_record(quantized)
        assert record.num_bytes == smallest_form(counts, 64, 1000, 8.0).num_bytes


def sparse_codes(scheme: Scheme) -> QuantizedDelta:
    """Codes of some rows and channels, and some channels in 16 bit."""
    rows, channels = torch.tensor([1, 4, 37, 69]), torch.tensor([0, 3, 4, 9, 11])
    coded = random_codes(scheme, (4, 5))
    return QuantizedDelta(
        scheme,
        (70, 12),
        coded.codes_RC,
        coded.steps_R,
        rows_R=rows,
        channels_C=channels,
        salient_channels_S=torch.tensor([2, 7]),
        salient_values_NS=torch.randn(70, 2).bfloat16(),
    )


SCHEMES = [scheme for scheme in Scheme if scheme is not Scheme.INT8]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_and_channels_left_out_are_the_bases(scheme: Scheme) -> None:
    quantized = sparse_codes(scheme)
    found = served_delta(image_of(coded_record(quantized)), 1, 70, 12)
    assert torch.equal(found, quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes_of_a_record_are_known_without_making_it(scheme: Scheme) -> None:
    found = [sparse_codes(scheme), *(random_codes(scheme, shape) for shape in SHAPES)]
    found += [laplace_codes(shape, width) for shape in SHAPES for width in (0.05, 0.6, 5.0)]
    for quantized in found:
        assert coded_bytes(quantized) == coded_record(quantized).num_bytes
    factors = FactoredDelta(random_codes(Scheme.INT8, (11, 3)), random_codes(Scheme.INT8, (3, 170)))
    assert factored_bytes(factors) == factored_record(factors).num_bytes


def test_sixteen_bit_channels_are_added() -> None:
    coded = random_codes(Scheme.INT2, (9, 20))
    quantized = QuantizedDelta(
        coded.scheme,
        coded.shape,
        coded.codes_RC,
        coded.steps_R,
        salient_channels_S=torch.tensor([2, 19]),
        salient_values_NS=torch.randn(9, 2).bfloat16(),
    )
    assert torch.equal(
        served_delta(image_of(coded_record(quantized)), 1, 9, 20), quantized.dequantize()
    )


def test_factors_are_served_as_they_are() -> None:
    left, right = random_codes(Scheme.INT8, (11, 3)), random_codes(Scheme.INT8, (3, 17), 1)
    reader = image_of(factored_record(FactoredDelta(left, right)))
    expected = left.dequantize() @ right.dequantize()
    torch.testing.assert_close(served_delta(reader, 1, 11, 17), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_keep_their_numbers(dtype: torch.dtype) -> None:
    right, left = torch.randn(4, 30).to(dtype), torch.randn(7, 4).to(dtype)
    reader = image_of(adapter_record(right, left))
    expected = left.float() @ right.float()
    torch.testing.assert_close(served_delta(reader, 1, 7, 30), expected, rtol=1e-6, atol=1e-6)


def test_a_bias_stands_beside_the_weight() -> None:
    quantized, bias = random_codes(Scheme.INT4, (6, 8)), torch.randn(6)
    record = coded_record(quantized)
    record.sections.update(vector_record(bias).sections)
    reader = image_of(record)
    found = reader.section(1, Field.VECTOR, torch.float32, 6)
    assert found is not None
    assert torch.equal(found, bias)
    assert torch.equal(served_delta(reader, 1, 6, 8), quantized.dequantize())


def test_a_norm_is_a_vector_alone() -> None:
    weight = torch.randn(32)
    found = image_of(vector_record(weight)).section(1, Field.VECTOR, torch.float32, 32)
    assert found is not None
    assert torch.equal(found, weight)


def test_an_absent_record_changes_nothing() -> None:
    assert not served_delta(image_of(vector_record(torch.ones(4))), 0, 5, 6).any()


def test_sections_begin_at_whole_units_behind_the_table() -> None:
    reader = image_of(coded_record(laplace_codes((16, 256), 0.6)))
    offset = reader.number(1, Field.PLANE0) * 64
    assert offset == head_bytes(3)
    assert reader.image.numel() % 64 == 0


def test_rows_of_planes_are_padded_to_sixteen_bytes() -> None:
    assert [row_stride(columns) for columns in (1, 64, 65, 576)] == [16, 16, 32, 144]


def test_a_damaged_image_is_refused() -> None:
    image = image_of(vector_record(torch.ones(4))).image
    with pytest.raises(ValueError, match="no slot image"):
        check_image(image[:100], 3)
    with pytest.raises(ValueError, match="another base"):
        check_image(image, 2)
    other = image.clone()
    other[4] = 9
    with pytest.raises(ValueError, match="version 9"):
        check_image(other, 3)
