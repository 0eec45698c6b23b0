import tracemalloc
import zlib
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.compression.pack import deflate, digits_per_byte, inflate
from deltamux.compression.quantize import Scheme

schemes = st.sampled_from(list(Scheme))
# A code of 256 levels takes a bit at least: only factors have them, whose codes are mostly wide.
SHARED_BYTES = [scheme for scheme in Scheme if digits_per_byte(scheme.levels) > 1]
# Around every number of codes that bytes hold.
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=100)


def skewed_codes(scheme, shape, share_of_zero, seed=0):
    """Codes of which a share is zero and the rest falls by e a level; their entropy in bits."""
    distance = (torch.arange(scheme.levels) - int(scheme.zero_point)).abs().float()
    odds = (-distance).exp()
    odds[int(scheme.zero_point)] = 0
    odds *= (1 - share_of_zero) / odds.sum()
    odds[int(scheme.zero_point)] = share_of_zero
    generator = torch.Generator().manual_seed(seed)
    codes = torch.multinomial(odds, shape[0] * shape[1], replacement=True, generator=generator)
    entropy = -(odds * odds.log2()).nan_to_num().sum()
    return codes.view(shape).to(torch.uint8), float(entropy)


def stream_of(scheme, codes):
    return deflate(codes, scheme.levels, int(scheme.zero_point))


def raw_deflate(content):
    encoder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = encoder.compress(content) + encoder.flush()
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


@examples
@given(schemes, sizes, sizes, st.sampled_from([0.0, 0.3, 0.9, 1.0]), seeds)
def test_codes_of_every_scheme_and_shape_come_back(scheme, rows, columns, share, seed):
    codes, _ = skewed_codes(scheme, (rows, columns), share, seed)
    stream = stream_of(scheme, codes)
    assert stream.dtype == torch.uint8
    assert stream.dim() == 1
    found = inflate(stream, scheme.levels, rows, columns)
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)


@pytest.mark.parametrize("scheme", Scheme)
def test_the_largest_code_everywhere_comes_back(scheme):
    codes = torch.full((7, 13), scheme.levels - 1, dtype=torch.uint8)
    assert torch.equal(inflate(stream_of(scheme, codes), scheme.levels, 7, 13), codes)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_byte_holds_as_many_digits_as_fit(scheme):
    digits = digits_per_byte(scheme.levels)
    assert scheme.levels**digits <= 256 < scheme.levels ** (digits + 1)


def test_a_view_is_coded_as_its_copy():
    codes, _ = skewed_codes(Scheme.INT4, (8, 12), 0.5)
    assert torch.equal(
        stream_of(Scheme.INT4, codes.T), stream_of(Scheme.INT4, codes.T.contiguous())
    )


def test_bytes_are_base_l_digits_from_the_lowest_on_filled_up_with_zeros_code():
    codes = torch.tensor([[2, 0, 1, 2], [1, 1, 0, 2]], dtype=torch.uint8)
    content = zlib.decompress(stream_of(Scheme.TERNARY, codes).numpy().tobytes(), -zlib.MAX_WBITS)
    # 2 + 0·3 + 1·9 + 2·27 + 1·81 = 146, then 1 + 0·3 + 2·9 and two codes that stand for zero.
    assert list(content) == [146, 1 + 0 * 3 + 2 * 9 + 1 * 27 + 1 * 81]


def test_a_stream_of_another_encoder_is_read():
    found = inflate(raw_deflate(bytes([146, 127])), 3, 2, 4)
    assert found.tolist() == [[2, 0, 1, 2], [1, 1, 0, 2]]


def test_a_stream_that_was_written_once_reads_the_same_for_ever():
    stream = torch.tensor(list(bytes.fromhex("9b540f00")), dtype=torch.uint8)
    assert inflate(stream, 3, 2, 4).tolist() == [[2, 0, 1, 2], [1, 1, 0, 2]]


@pytest.mark.parametrize(
    ("share", "overhead"),
    # Huffman codes give every symbol whole bits: what that costs grows with the share of zeros.
    [(0.2, 0.03), (0.5, 0.03), (0.7, 0.06), (0.8, 0.10)],
)
@pytest.mark.parametrize("scheme", SHARED_BYTES)
def test_a_large_stream_is_near_the_entropy_of_its_codes(scheme, share, overhead):
    codes, entropy = skewed_codes(scheme, (512, 512), share)
    bits = 8 * len(stream_of(scheme, codes)) / codes.numel()
    assert bits < entropy * (1 + overhead)


@pytest.mark.parametrize("scheme", SHARED_BYTES)
def test_nearly_empty_matrices_take_at_most_half_more_than_their_entropy(scheme):
    codes, entropy = skewed_codes(scheme, (1024, 512), 0.98)
    bits = 8 * len(stream_of(scheme, codes)) / codes.numel()
    assert bits < 1.55 * entropy


def test_a_matrix_of_zeros_takes_next_to_nothing():
    codes = torch.full((1024, 1024), 8, dtype=torch.uint8)
    assert len(stream_of(Scheme.INT4, codes)) < codes.numel() / 1000


@pytest.fixture(scope="module")
def stored():
    """A stream of 3 levels for 30 by 50 codes."""
    return stream_of(Scheme.TERNARY, skewed_codes(Scheme.TERNARY, (30, 50), 0.6)[0])


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


@pytest.mark.parametrize("shape", [(31, 50), (30, 45), (30, 55), (1, 1), (300, 500)])
def test_a_stream_of_another_number_of_codes_is_refused(stored, shape):
    with pytest.raises(ValueError, match=r"does not end with the \d+ bytes .* copy the file again"):
        inflate(stored, 3, *shape)


def test_bytes_behind_the_stream_are_refused(stored):
    longer = torch.cat([stored, torch.zeros(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="copy the file again"):
        inflate(longer, 3, 30, 50)


@pytest.mark.parametrize(("levels", "value"), [(3, 243), (5, 125), (5, 255)])
def test_a_byte_beyond_the_digits_is_refused(levels, value):
    digits = digits_per_byte(levels)
    with pytest.raises(ValueError, match=f"exceeds {levels} levels: copy the file again"):
        inflate(raw_deflate(bytes([0, value])), levels, 2, digits)


def test_a_stream_that_would_expand_enormously_is_refused_without_its_memory():
    bomb = raw_deflate(bytes(50_000_000))
    assert len(bomb) < 60_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="copy the file again"):
        inflate(bomb, 3, 30, 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
