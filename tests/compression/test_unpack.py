"""The compiled unpacking of codes does what numpy does, and no more, whatever the stream."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch

from deltamux.compression.artifact import entropy
from deltamux.compression.artifact.run_lengths import Alphabet, from_symbols, to_symbols
from deltamux.compression.image import planes, unpack
from deltamux.compression.image.layout import Field

SHAPES = [(1, 1), (3, 5), (16, 64), (40, 130), (130, 40), (2, 4099), (300, 7)]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if unpack.library() is None:
        pytest.skip("the compiled library was not built")


@pytest.fixture
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(unpack, "LIBRARY", "_no_such_library")
        unpack.library.cache_clear()
        yield
    unpack.library.cache_clear()


def sparse_codes(rows: int, columns: int, levels: int, seed: int) -> np.ndarray:
    """Codes of which most are one in the middle, more or fewer from column to column."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, levels, (rows, columns), np.uint8)
    share = random.uniform(0.2, 1.0, columns)
    codes[random.random((rows, columns)) < share] = levels // 2
    return codes


@pytest.mark.parametrize("levels", [2, 3, 5, 16, 256])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_streams_give_back_their_codes(rows: int, columns: int, levels: int) -> None:
    codes = sparse_codes(rows, columns, levels, rows + columns + levels)
    stream = entropy.deflate(torch.from_numpy(codes))
    assert np.array_equal(entropy.inflate(stream, levels, rows, columns).numpy(), codes)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("levels", [2, 3, 16, 129, 256])
def test_the_lines_of_a_class_are_those_of_numpy(axis: int, levels: int) -> None:
    random = np.random.default_rng(levels)
    for _ in range(30):
        shape = tuple(random.integers(1, 60, 2))
        lines = random.random(shape[axis]) < 0.4
        count = int(lines.sum()) * shape[1 - axis]
        line = sparse_codes(1, count, levels, count)[0]
        alphabet, parts = to_symbols(line)
        symbols = np.concatenate([np.zeros(0, np.uint8), *parts])
        found = np.full(shape, alphabet.commonest, np.uint8)
        found[~lines if axis == 0 else (slice(None), ~lines)] = 77
        wanted = found.copy()
        places = np.flatnonzero(lines)
        part = from_symbols(symbols, alphabet, count)
        if axis == 0:
            wanted[places] = part.reshape(len(places), shape[1])
        else:
            wanted[:, places] = part.reshape(shape[0], len(places))
        assert unpack.expand(symbols, alphabet, lines, axis, found)
        assert np.array_equal(found, wanted)


def test_symbols_that_do_not_fit_are_refused() -> None:
    alphabet = Alphabet(0, 1, 2, 0)
    lines, codes = np.ones(4, bool), np.ones((4, 4), np.uint8)
    with pytest.raises(ValueError, match="symbol 255 of 255"):
        unpack.expand(np.array([255], np.uint8), alphabet, lines, 0, codes)
    with pytest.raises(ValueError, match="symbols for more than 16 codes"):
        unpack.expand(np.zeros(17, np.uint8), alphabet, lines, 1, codes)
    with pytest.raises(ValueError, match="symbols for more than 0 codes"):
        unpack.expand(np.zeros(1, np.uint8), alphabet, ~lines, 0, codes)
    with pytest.raises(ValueError, match="1 symbols for codes that are all the same"):
        unpack.expand(np.zeros(1, np.uint8), Alphabet(1, 1, 1, 0), lines, 0, codes)


@pytest.mark.parametrize("axis", [0, 1])
def test_no_symbols_write_outside_of_the_matrix(axis: int) -> None:
    random = np.random.default_rng(axis)
    for _ in range(300):
        rows, columns = random.integers(1, 30, 2)
        room = np.full(rows * columns + 2000, 99, np.uint8)
        codes = room[1000 : 1000 + rows * columns].reshape(rows, columns)
        lowest = int(random.integers(0, 200))
        highest = int(random.integers(lowest + 1, 256))
        alphabet = Alphabet(lowest, int(random.integers(lowest, highest + 1)), highest, 0)
        symbols = random.integers(0, 256, random.integers(0, 300), np.uint8)
        lines = random.random((rows, columns)[axis]) < 0.5
        outside = ~lines if axis == 0 else (slice(None), ~lines)
        with suppress(ValueError):
            unpack.expand(symbols, alphabet, lines, axis, codes)
        assert (room[:1000] == 99).all()
        assert (room[1000 + rows * columns :] == 99).all()
        assert (codes[outside] == 99).all()


def test_damaged_streams_are_refused_or_read_as_numpy_reads_them(by_numpy: None) -> None:
    random = np.random.default_rng(5)
    codes = sparse_codes(30, 90, 5, 1)
    content = bytearray(zlib.decompress(bytes(entropy.deflate(torch.from_numpy(codes))), -15))
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        raw = packer.compress(bytes(damaged)) + packer.flush()
        stream = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        results = []
        for name in ("_no_such_library", "_unpack"):
            unpack.LIBRARY = name
            unpack.library.cache_clear()
            try:
                results.append(entropy.inflate(stream, 5, 30, 90).tolist())
            except ValueError as error:
                results.append(str(error))
        assert results[0] == results[1]


@pytest.mark.parametrize("levels", [3, 4, 5, 9, 16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_planes_and_escapes_are_numpys(rows: int, columns: int, levels: int) -> None:
    codes = sparse_codes(rows, columns, levels, rows * columns * levels)
    counts = planes.code_counts(codes, planes.MOST_CODES)
    assert counts.tolist() == np.bincount(codes.reshape(-1), minlength=16).tolist()
    for form in planes._forms(counts, rows, columns, float(levels // 2)):
        found = planes._packed(codes, form)
        wanted = planes._packed_by_numpy(codes, form)
        assert [plane.tolist() for plane in found[0]] == [plane.tolist() for plane in wanted[0]]
        assert found[1].tolist() == wanted[1].tolist()
        assert found[2].tolist() == wanted[2].tolist()


def test_more_codes_than_a_counter_holds_at_once_are_counted() -> None:
    codes = np.zeros((3, 7), np.uint8)
    codes[2, 6] = 255
    counts = unpack.count_codes(codes)
    assert counts is not None
    assert (counts[0], counts[255], counts.sum()) == (20, 1, 21)


def test_without_the_library_records_are_the_same(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    codes = sparse_codes(20, 300, 5, 3)
    compiled = planes.code_record(codes, 2.0)
    request.getfixturevalue("by_numpy")
    with caplog.at_level(logging.WARNING):
        found = planes.code_record(codes, 2.0)
    (line,) = caplog.records
    assert "was not built" in line.getMessage()
    assert found.numbers == compiled.numbers
    assert set(found.sections) == set(compiled.sections)
    for name in found.sections:
        assert np.array_equal(found.sections[name], compiled.sections[name])
    assert Field.PLANE0 in found.sections
