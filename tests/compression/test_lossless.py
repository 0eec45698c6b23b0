import contextlib
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.compression.artifact import lossless
from deltamux.compression.artifact.lossless import decode_exact, encode_exact

BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
# Zeros of both signs, infinities, the ends of the number line, subnormals, NaNs with payloads.
SPECIAL_16 = [0, -0x8000, 0x7C00, -0x400, 0x7F80, -0x80, 0x7FFF, -1, 1, -0x7FFF, 0x7FC1, -0x3]
SPECIAL_32 = [0, -0x80000000, 0x7F800000, -0x800000, 0x7FFFFFFF, -1, 1, 0x7FC00001, -0x7FFFFFFF]
dtypes = st.sampled_from(list(BITS))
shapes = st.lists(st.integers(0, 9), max_size=3)
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=100)


def from_bits(bits, dtype):
    return torch.tensor(bits, dtype=BITS[dtype]).view(dtype)


def random_bits(shape, dtype, seed):
    """Any bit patterns at all."""
    limits = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        limits.min, limits.max + 1, shape, generator=generator, dtype=BITS[dtype]
    ).view(dtype)


def fine_tune(dtype, share, elements=200_000):
    """A base, and an expert in which a share of the weights moved by a step of training."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(elements, generator=generator) * 0.02).to(dtype)
    moved = torch.rand(elements, generator=generator) < share
    step = torch.randn(elements, generator=generator) * 1e-4
    return torch.where(moved, base.float() + step, base.float()).to(dtype), base


def same_bits(left, right):
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    integers = BITS[left.dtype]
    return torch.equal(left.reshape(-1).view(integers), right.reshape(-1).view(integers))


def coded_pair(dtype=torch.bfloat16):
    tuned, base = fine_tune(dtype, 0.1, elements=500)
    return encode_exact(tuned, base), base


@examples
@given(shapes, dtypes, seeds, st.sampled_from([1, 7, 1000]))
def test_any_bits_of_any_shape_come_back(shape, dtype, seed, chunk):
    base, tuned = random_bits(shape, dtype, seed), random_bits(shape, dtype, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless, "CHUNK_ELEMENTS", chunk)
        coded = encode_exact(tuned, base)
        assert coded.dtype == torch.uint8
        assert same_bits(decode_exact(coded, base), tuned)


@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        (torch.bfloat16, SPECIAL_16),
        (torch.float16, SPECIAL_16),
        (torch.float32, SPECIAL_32),
    ],
)
def test_special_values_come_back_from_special_values(dtype, special):
    values = from_bits(special, dtype)
    base, tuned = values.repeat(len(special)), values.repeat_interleave(len(special))
    assert same_bits(decode_exact(encode_exact(tuned, base), base), tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_16_bits_comes_back(dtype):
    tuned = torch.arange(-0x8000, 0x8000).to(torch.int16).view(dtype)
    base = random_bits([2**16], dtype, seed=0)
    assert same_bits(decode_exact(encode_exact(tuned, base), base), tuned)


@pytest.mark.parametrize("dtype", BITS)
def test_tensors_that_are_not_contiguous_come_back(dtype):
    base, tuned = random_bits([6, 5], dtype, 0).T, random_bits([5, 12], dtype, 1)[:, ::2]
    assert same_bits(decode_exact(encode_exact(tuned, base), base), tuned)


def test_coded_bytes_need_not_be_contiguous():
    coded, base = coded_pair()
    spread = torch.stack([coded, coded], dim=1)[:, 0]
    assert same_bits(decode_exact(spread, base), decode_exact(coded, base))


def test_a_change_in_the_first_of_several_chunks_comes_back(monkeypatch):
    monkeypatch.setattr(lossless, "CHUNK_ELEMENTS", 4)
    base = torch.ones(10, dtype=torch.bfloat16)
    tuned = base.clone()
    tuned[0] = -3.0
    assert same_bits(decode_exact(encode_exact(tuned, base), base), tuned)


def test_neighbouring_values_differ_by_one_across_zero():
    # −tiny, −0.0, 0.0, tiny: each a step of 1, coded 2, from the one before.
    line = from_bits([-0x7FFF, -0x8000, 0, 1], torch.bfloat16)
    coded = encode_exact(line[1:], line[:-1]).numpy().tobytes()
    low, high = struct.unpack("<2Q", coded[:16])
    assert zlib.decompress(coded[16 : 16 + low], wbits=-15) == bytes([2, 2, 2])
    assert high == 0


def test_streams_are_the_planes_from_the_lowest_byte_on():
    # Steps of +0x010203 and −1 are coded 0x020406 and 1.
    base = from_bits([0x3F800000, 0x3F800000], torch.float32)
    tuned = from_bits([0x3F810203, 0x3F7FFFFF], torch.float32)
    coded = encode_exact(tuned, base).numpy().tobytes()
    lengths, streams = struct.unpack("<4Q", coded[:32]), coded[32:]
    planes = []
    for length in lengths[:3]:
        planes.append(zlib.decompress(streams[:length], wbits=-15))
        streams = streams[length:]
    assert planes == [b"\x06\x01", b"\x04\x00", b"\x02\x00"]
    assert (lengths[3], streams) == (0, b"")


@pytest.mark.parametrize("dtype", BITS)
def test_an_unchanged_tensor_takes_only_the_lengths(dtype):
    _, base = fine_tune(dtype, 0.0)
    coded = encode_exact(base.clone(), base)
    assert len(coded) == 8 * base.element_size()
    assert same_bits(decode_exact(coded, base), base)


# Entropy of which weights moved: 0.08 bits; the rest is how far. float32 keeps the noise of the step
# in three planes, bfloat16 rounds most of it away.
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 0.15), (torch.float16, 0.25), (torch.float32, 0.65)]
)
def test_one_percent_of_changed_weights_takes_a_fraction_of_a_bit_each(dtype, most):
    tuned, base = fine_tune(dtype, 0.01)
    assert len(encode_exact(tuned, base)) * 8 / base.numel() < most


def test_a_full_fine_tune_takes_a_quarter_of_its_size():
    tuned, base = fine_tune(torch.bfloat16, 1.0)
    assert len(encode_exact(tuned, base)) < 0.25 * base.numel() * base.element_size()


def test_noise_takes_hardly_more_than_its_own_size():
    tuned, base = (random_bits([400_000], torch.bfloat16, seed) for seed in (0, 1))
    # Runs alone would add 0.12 %.
    assert len(encode_exact(tuned, base)) < 1.0005 * base.numel() * base.element_size()


@pytest.mark.parametrize("dtype", BITS)
def test_every_truncation_is_refused(dtype):
    coded, base = coded_pair(dtype)
    for length in range(len(coded)):
        with pytest.raises(ValueError, match=r"damaged .*: copy or compress it again"):
            decode_exact(coded[:length], base)


def test_bytes_behind_the_streams_are_refused():
    coded, base = coded_pair()
    with pytest.raises(ValueError, match="damaged"):
        decode_exact(torch.cat([coded, coded[:1]]), base)


@pytest.mark.parametrize("elements", [499, 501])
def test_a_base_of_another_size_is_refused(elements):
    coded, _ = coded_pair()
    with pytest.raises(ValueError, match=f"does not hold {elements} bytes"):
        decode_exact(coded, torch.zeros(elements, dtype=torch.bfloat16))


def test_bytes_of_another_dtype_are_refused():
    coded, base = coded_pair()
    with pytest.raises(ValueError, match="holds no lengths of 2 planes"):
        decode_exact(coded.to(torch.int32), base)


def test_a_stream_that_ends_before_its_length_is_refused():
    base = torch.ones(3, dtype=torch.bfloat16)
    stream = zlib.compress(b"\x02\x00\x00", wbits=-15) + b"\x00"
    with pytest.raises(ValueError, match="does not hold 3 bytes"):
        decode_exact(packed([stream, b""]), base)


def test_a_stream_without_its_end_mark_is_refused():
    base = torch.ones(3, dtype=torch.bfloat16)
    deflater = zlib.compressobj(wbits=-15)
    stream = deflater.compress(b"\x02\x00\x00") + deflater.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(ValueError, match="does not hold 3 bytes"):
        decode_exact(packed([stream, b""]), base)


def test_a_stream_that_is_no_deflate_is_refused():
    base = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"of another tensor \(Error"):
        decode_exact(packed([b"\xff" * 5, b""]), base)


@pytest.mark.parametrize("elements", [0, 3])
def test_a_stream_that_inflates_without_end_is_refused_before_it_does(elements):
    base = torch.ones(elements, dtype=torch.bfloat16)
    coded = packed([zlib.compress(bytes(2**26), wbits=-15), b""])
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"does not hold {elements} bytes"):
        decode_exact(coded, base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@examples
@given(st.data(), dtypes)
def test_damage_is_refused_or_keeps_the_shape(data, dtype):
    coded, base = coded_pair(dtype)
    position = data.draw(st.integers(0, len(coded) - 1))
    coded[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ValueError):
        decoded = decode_exact(coded, base)
        assert (decoded.dtype, decoded.shape) == (base.dtype, base.shape)


@pytest.mark.parametrize(
    "tuned", [torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2, dtype=torch.bfloat16)]
)
def test_a_pair_of_two_kinds_is_refused(tuned):
    with pytest.raises(ValueError, match=r"one dtype and shape, got .*: save both alike"):
        encode_exact(tuned, torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.uint8])
def test_other_dtypes_are_refused(dtype):
    base = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=r"takes bfloat16, float16, float32, got torch\."):
        encode_exact(base, base)
    with pytest.raises(ValueError, match=r"takes bfloat16, float16, float32, got torch\."):
        decode_exact(torch.zeros(64, dtype=torch.uint8), base)


def packed(streams):
    header = struct.pack(f"<{len(streams)}Q", *map(len, streams))
    return torch.frombuffer(bytearray(b"".join([header, *streams])), dtype=torch.uint8)
