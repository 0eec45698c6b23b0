import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamux.compression.artifact.pack import (
    pack_bitmap,
    pack_bits,
    pack_trits,
    unpack_bitmap,
    unpack_bits,
    unpack_trits,
    words_per_row,
)

WIDTHS = (1, 2, 3, 4, 8)
# Around every multiple of a word and of a byte of trits.
columns = st.integers(1, 70)
rows = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)


def random_codes(num_rows, num_columns, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (num_rows, num_columns), generator=generator, dtype=torch.uint8)


@given(rows, columns, st.sampled_from(WIDTHS), seeds)
def test_codes_of_every_width_and_shape_come_back(num_rows, num_columns, num_bits, seed):
    codes = random_codes(num_rows, num_columns, 2**num_bits, seed)
    words = pack_bits(codes, num_bits)
    assert words.dtype == torch.int32
    assert words.shape == (num_rows, words_per_row(num_columns, num_bits))
    assert torch.equal(unpack_bits(words, num_bits, num_columns), codes)


@given(rows, columns, seeds)
def test_trits_of_every_shape_come_back(num_rows, num_columns, seed):
    codes = random_codes(num_rows, num_columns, 3, seed)
    packed = pack_trits(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_rows, -(-num_columns // 5))
    assert torch.equal(unpack_trits(packed, num_columns), codes)


@given(columns, seeds)
def test_bitmaps_of_every_length_come_back(length, seed):
    mask = random_codes(1, length, 2, seed)[0].bool()
    packed = pack_bitmap(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-length // 8),)
    assert torch.equal(unpack_bitmap(packed, length), mask)


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_the_largest_code_everywhere_comes_back(num_bits):
    codes = torch.full((2, 33), 2**num_bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, num_bits), num_bits, 33), codes)


@pytest.mark.parametrize("num_columns", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_words_are_those_of_compressed_tensors(num_bits, num_columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(5, num_columns, 2**num_bits, seed=num_columns)
    # Theirs takes signed values and adds this offset.
    signed = (codes.to(torch.int16) - 2 ** (num_bits - 1)).to(torch.int8)
    assert torch.equal(pack_bits(codes, num_bits), helpers.pack_to_int32(signed, num_bits))


def test_the_first_code_is_in_the_lowest_bits():
    assert pack_bits(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x321]]


def test_a_set_top_bit_makes_a_negative_word():
    assert pack_bits(torch.tensor([[0, 0, 0, 128]]), 8).tolist() == [[-(2**31)]]


def test_three_bits_are_a_plane_of_low_bits_and_a_plane_of_high_bits():
    # 5, 2, 7 = 1|01, 0|10, 1|11: low pairs 01 10 11, high bits 1 0 1, each from the lowest bit on.
    assert pack_bits(torch.tensor([[5, 2, 7]]), 3).tolist() == [[0b11_10_01, 0b1_0_1]]


def test_three_bits_start_the_high_plane_at_a_whole_word():
    codes = torch.zeros(1, 17, dtype=torch.uint8)
    codes[0, 16] = 7
    assert pack_bits(codes, 3).tolist() == [[0, 3, 1 << 16]]


def test_trits_are_base_three_digits_from_the_lowest_on():
    # 2 + 1·3 + 0·9 + 2·27 + 1·81 = 140, then a byte with the sixth code alone.
    assert pack_trits(torch.tensor([[2, 1, 0, 2, 1, 1]])).tolist() == [[140, 1]]


def test_five_largest_trits_fit_a_byte():
    assert pack_trits(torch.full((1, 5), 2)).tolist() == [[242]]


def test_bitmaps_start_at_the_lowest_bit():
    mask = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    assert pack_bitmap(mask).tolist() == [0b101, 1]
