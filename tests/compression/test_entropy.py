import struct
import tracemalloc
import zlib
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.compression.artifact.code_classes import best_classes
from deltamux.compression.artifact.entropy import deflate, inflate
from deltamux.compression.rounding.quantize import Scheme

schemes = st.sampled_from(list(Scheme))
sizes = st.integers(0, 40)
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=100)


def skewed_codes(scheme, shape, share_of_zero, seed=0):
    """Codes of which a share is zero and the rest falls by e a level; their entropy in bits.

    Args:
        scheme: Their levels.
        shape: Of the matrix.
        share_of_zero: A number, or one for each column or row, as a tensor [1, K] or [N, 1].
        seed: Of the draw.
    """
    distance = (torch.arange(scheme.levels) - int(scheme.zero_point)).abs().double()
    others = (-distance).exp()
    others[int(scheme.zero_point)] = 0
    share = torch.as_tensor(share_of_zero, dtype=torch.float64).expand(shape)
    generator = torch.Generator().manual_seed(seed)
    count = max(share.numel(), 1)
    drawn = torch.multinomial(others, count, replacement=True, generator=generator)
    drawn = drawn[: share.numel()].view(shape)
    zero = torch.rand(shape, generator=generator, dtype=torch.float64) < share
    codes = torch.where(zero, int(scheme.zero_point), drawn).to(torch.uint8)
    odds = others / others.sum()
    of_others = -float((odds * odds.log2()).nan_to_num().sum())
    of_zero = -(share * share.log2() + (1 - share) * (1 - share).log2()).nan_to_num()
    return codes, float((of_zero + (1 - share) * of_others).mean())


def bits_per_code(codes):
    return 8 * len(deflate(codes)) / codes.numel()


def raw_deflate(content):
    encoder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = encoder.compress(content) + encoder.flush()
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def content_of(stream):
    return zlib.decompress(stream.numpy().tobytes(), -zlib.MAX_WBITS)


@examples
@given(schemes, sizes, sizes, st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]), seeds)
def test_codes_of_every_scheme_and_shape_come_back(scheme, rows, columns, share, seed):
    codes, _ = skewed_codes(scheme, (rows, columns), share, seed)
    stream = deflate(codes)
    assert stream.dtype == torch.uint8
    assert stream.dim() == 1
    found = inflate(stream, scheme.levels, rows, columns)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, codes)


@examples
@given(schemes, st.booleans(), st.integers(1, 8), seeds)
def test_lines_of_unlike_codes_come_back(scheme, transposed, kinds, seed):
    share = torch.linspace(0.05, 1, kinds).repeat_interleave(25).unsqueeze(0)
    codes, _ = skewed_codes(scheme, (90, 25 * kinds), share, seed)
    codes = codes.T if transposed else codes
    assert torch.equal(inflate(deflate(codes), scheme.levels, *codes.shape), codes)


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1), (3, 100_000), (100_000, 3)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999])
def test_long_and_single_lines_come_back(shape, share):
    codes, _ = skewed_codes(Scheme.INT4, shape, share)
    assert torch.equal(inflate(deflate(codes), 16, *shape), codes)


@pytest.mark.parametrize("scheme", Scheme)
def test_the_largest_code_everywhere_comes_back(scheme):
    codes = torch.full((7, 13), scheme.levels - 1, dtype=torch.uint8)
    assert torch.equal(inflate(deflate(codes), scheme.levels, 7, 13), codes)


def test_a_view_is_coded_as_its_copy():
    codes, _ = skewed_codes(Scheme.INT4, (8, 12), 0.5)
    assert torch.equal(deflate(codes.T), deflate(codes.T.contiguous()))


# Codes 1 1 1 2 / 0 1 1 1 of one class: three codes and then 2, none and then 0, three that end nothing.
ONE_CLASS = struct.pack("<IIBB BBBI", 2, 4, 1, 1, 0, 1, 2, 2) + bytes([3 * 2 + 1, 0 * 2 + 0])
# Rows of unlike codes: row 1 is 9 throughout; rows 0 and 2 have 4 and 5, and hold 4 5 4 / 5 4 4.
TWO_CLASSES = struct.pack("<IIBB BBBI BBBI", 3, 3, 0, 2, 4, 4, 5, 2, 9, 9, 9, 0) + bytes(
    [0, 1, 0, 1, 1]
)


def test_a_stream_holds_the_bytes_of_its_specification():
    codes = torch.tensor([[1, 1, 1, 2], [0, 1, 1, 1]], dtype=torch.uint8)
    assert content_of(deflate(codes))[10:] == ONE_CLASS[10:]
    assert inflate(raw_deflate(ONE_CLASS), 3, 2, 4).tolist() == codes.tolist()


def test_classes_of_rows_and_of_columns_are_read():
    rows = [[4, 5, 4], [9, 9, 9], [5, 4, 4]]
    assert inflate(raw_deflate(TWO_CLASSES), 16, 3, 3).tolist() == rows
    # As columns, the codes of both are still taken row after row.
    by_column = TWO_CLASSES[:8] + b"\x01" + TWO_CLASSES[9:]
    assert inflate(raw_deflate(by_column), 16, 3, 3).tolist() == [[4, 9, 5], [4, 9, 5], [4, 9, 4]]


def test_long_runs_are_told_by_symbols_of_their_own():
    codes = torch.zeros(1, 300, dtype=torch.uint8)
    codes[0, 290] = 1
    # One other code: symbols 0 to 254 end runs, 255 is a run of 255.
    assert content_of(deflate(codes))[-2:] == bytes([255, 290 - 255])


def test_a_stream_that_was_written_once_reads_the_same_for_ever():
    stream = torch.tensor(
        list(bytes.fromhex("62626060606100024606462626060606c0d81900")), dtype=torch.uint8
    )
    assert inflate(stream, 3, 2, 4).tolist() == [[1, 1, 1, 2], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("share", "overhead"), [(0.2, 0.03), (0.5, 0.03), (0.8, 0.02), (0.9, 0.02), (0.95, 0.02)]
)
@pytest.mark.parametrize("scheme", Scheme)
def test_a_large_stream_is_near_the_entropy_of_its_codes(scheme, share, overhead):
    codes, entropy = skewed_codes(scheme, (1024, 512), share)
    assert bits_per_code(codes) < entropy * (1 + overhead)


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("scheme", Scheme)
def test_lines_of_unlike_density_cost_what_each_costs_alone(scheme, transposed):
    share = 1 - torch.logspace(-3, -0.3, 512).unsqueeze(0)
    codes, entropy = skewed_codes(scheme, (1024, 512), share)
    mixed = skewed_codes(scheme, (1024, 512), float(share.mean()))[1]
    # The rest is spent on the classes, and on lines that share one but are not alike.
    found = bits_per_code(codes.T if transposed else codes)
    assert found < 1.08 * entropy
    assert found < 0.9 * mixed


def test_a_matrix_of_zeros_takes_next_to_nothing():
    assert len(deflate(torch.full((1024, 1024), 8, dtype=torch.uint8))) < 30


@pytest.mark.parametrize("transposed", [False, True], ids=["columns", "rows"])
def test_lines_are_classified_by_what_they_hold(transposed):
    share = torch.tensor([0.1, 0.9]).repeat(100).unsqueeze(0)
    codes = skewed_codes(Scheme.TERNARY, (400, 200), share)[0].numpy()
    classes = best_classes(codes.T.copy() if transposed else codes)
    assert classes.axis == (0 if transposed else 1)
    assert classes.count == 2
    assert len(set(classes.members[::2])) == len(set(classes.members[1::2])) == 1


def test_lines_that_are_alike_are_one_class():
    codes = skewed_codes(Scheme.TERNARY, (400, 200), 0.5)[0].numpy()
    assert best_classes(codes).count == 1


@pytest.fixture(scope="module")
def stored():
    """A stream of 3 levels for 30 by 50 codes, which has several classes."""
    share = torch.tensor([0.2, 0.99]).repeat(25).unsqueeze(0)
    stream = deflate(skewed_codes(Scheme.TERNARY, (30, 50), share)[0])
    assert content_of(stream)[9] == 2
    return stream


@pytest.mark.parametrize("length", [0, 1, 40, -3, -1])
def test_a_truncated_stream_is_refused(stored, length):
    with pytest.raises(ValueError, match="copy the file again"):
        inflate(stored[:length], 3, 30, 50)


@examples
@given(st.data())
def test_a_damaged_stream_is_refused_or_keeps_scheme_and_shape(stored, data):
    damaged = stored.clone()
    damaged[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):
        found = inflate(damaged, 3, 30, 50)
        assert found.shape == (30, 50)
        assert int(found.max()) < 3


@examples
@given(st.data())
def test_damaged_content_is_refused_or_keeps_scheme_and_shape(stored, data):
    content = bytearray(content_of(stored))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):
        found = inflate(raw_deflate(content), 3, 30, 50)
        assert found.shape == (30, 50)
        assert int(found.max()) < 3


@pytest.mark.parametrize("shape", [(31, 50), (30, 45), (50, 30), (300, 500)])
def test_a_stream_of_another_shape_is_refused(stored, shape):
    with pytest.raises(ValueError, match=rf"30 by 50 codes, not {shape[0]} by .* copy the file"):
        inflate(stored, 3, *shape)


def test_a_stream_of_many_more_codes_is_refused_before_it_is_inflated(stored):
    with pytest.raises(ValueError, match=r"does not end with the 19 bytes .* copy the file again"):
        inflate(stored, 3, 1, 1)


def test_bytes_behind_the_stream_are_refused(stored):
    longer = torch.cat([stored, torch.zeros(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="copy the file again"):
        inflate(longer, 3, 30, 50)


@pytest.mark.parametrize(
    ("place", "byte", "finding"),
    [
        (8, 2, "2 classes along axis 2"),
        (9, 0, "0 classes along axis 0"),
        (9, 3, "no header of 3 classes"),
        (10, 5, "code 4 is outside of its class"),
        (11, 6, "code 6 is outside of its class"),
        (12, 3, "code 4 is outside of its class"),
        (19, 16, "code 16 exceeds 16 levels"),
        (13, 3, "2 symbols, not 3"),
        (20, 1, "2 symbols, not 3"),
        (24, 2, "a line is in class 2 of 2"),
        (24, 1, "class 0 has symbols for more than 3 codes"),
        (27, 255, "class 0 has symbols for more than 6 codes"),
    ],
)
def test_content_that_breaks_a_rule_is_refused(place, byte, finding):
    content = bytearray(TWO_CLASSES)
    content[place] = byte
    with pytest.raises(ValueError, match=rf"{finding}\): copy the file again"):
        inflate(raw_deflate(content), 16, 3, 3)


def test_a_symbol_beyond_the_alphabet_is_refused():
    # Two other codes: 127 runs of each, and 254 for a run of 127.
    with pytest.raises(ValueError, match=r"symbol 255 of 255.* copy the file again"):
        inflate(raw_deflate(ONE_CLASS[:-1] + b"\xff"), 3, 2, 4)


def test_symbols_of_a_single_code_are_refused():
    content = struct.pack("<IIBB BBBI", 1, 4, 0, 1, 7, 7, 7, 1) + b"\x00"
    with pytest.raises(ValueError, match=r"1 symbols for codes that are all the same.* copy the"):
        inflate(raw_deflate(content), 16, 1, 4)


def test_content_without_a_whole_header_is_refused():
    with pytest.raises(ValueError, match=r"9 bytes are no header.* copy the file again"):
        inflate(raw_deflate(ONE_CLASS[:9]), 3, 2, 4)


def test_a_stream_that_would_expand_enormously_is_refused_without_its_memory():
    bomb = raw_deflate(bytes(50_000_000))
    assert len(bomb) < 60_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"does not end with the .* copy the file again"):
        inflate(bomb, 3, 30, 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
