"""Runs of the commonest code as symbols of one byte, for a Huffman code to shorten.

A Huffman code spends at least a bit on a symbol. Codes of which most are zero are far below that, so a
symbol stands for a run of them (Golomb 1966) together with the code that ends it. For codes from `lowest`
to `highest`, of which `commonest` is c₀, with n = highest − lowest and m = ⌊255 / n⌋:

    symbol r n + v, 0 ≤ r < m    r times c₀, then the code c of lowest … highest but c₀ with
                                 v = c − lowest − (1 if c > c₀ else 0)
    symbol m n                   m times c₀, and nothing behind them

Codes behind the last symbol are c₀. Codes that are all the same, n = 0, have no symbols.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
# Codes, or symbols, that are worked on at once: few enough for the cache of one core.
CHUNK = 2**18


class Alphabet(NamedTuple):
    """The symbols of a sequence of codes, and how many of them there are."""

    lowest: int
    commonest: int
    highest: int
    length: int

    @property
    def others(self) -> int:
        """n: how many codes end a run."""
        return self.highest - self.lowest

    @property
    def longest(self) -> int:
        """m: the run that ends in no code."""
        return 255 // self.others

    @property
    def escape(self) -> int:
        """The symbol of that run, the last one."""
        return self.longest * self.others


def to_symbols(codes: Bytes) -> tuple[Alphabet, list[Bytes]]:
    """The alphabet of a sequence of codes, uint8 [codes], and its symbols in parts."""
    if len(codes) == 0:
        return Alphabet(0, 0, 0, 0), []
    lowest, highest = int(codes.min()), int(codes.max())
    counts = [np.count_nonzero(codes == code) for code in range(lowest, highest + 1)]
    alphabet = Alphabet(lowest, lowest + int(np.argmax(counts)), highest, 0)
    if alphabet.others == 0:
        return alphabet, []
    parts = []
    last = -1
    for start in range(0, len(codes), CHUNK):
        chunk = codes[start : start + CHUNK]
        ends = np.flatnonzero(chunk != alphabet.commonest)
        runs = ends.copy()
        runs[1:] -= ends[:-1]
        runs[:1] -= last
        runs -= 1
        last = (int(ends[-1]) if len(ends) else last) - len(chunk)
        parts.append(_part(runs, chunk[ends], alphabet))
    return alphabet._replace(length=sum(map(len, parts))), parts


def _part(runs: npt.NDArray[np.int64], codes: Bytes, alphabet: Alphabet) -> Bytes:
    """Symbols of runs, which are overwritten, and of the codes that end them."""
    long = np.flatnonzero(runs >= alphabet.longest)
    escapes = runs[long] // alphabet.longest
    runs[long] %= alphabet.longest
    ranks = codes - np.uint8(alphabet.lowest) - (codes > alphabet.commonest)
    symbols: Bytes = runs.astype(np.uint8) * np.uint8(alphabet.others) + ranks
    if len(long) == 0:
        return symbols
    ahead = np.zeros(len(runs), np.int64)
    ahead[long] = escapes
    places = ahead.cumsum() + np.arange(len(runs))
    escaped = np.full(int(places[-1]) + 1, alphabet.escape, np.uint8)
    escaped[places] = symbols
    return escaped


def from_symbols(symbols: Bytes, alphabet: Alphabet, size: int) -> Bytes:
    """The inverse of `to_symbols`: uint8 [size].

    Raises:
        ValueError: They are not the symbols of so many codes.
    """
    codes = np.full(size, alphabet.commonest, np.uint8)
    if len(symbols) == 0:
        return codes
    if alphabet.others == 0:
        raise ValueError(f"{len(symbols)} symbols for codes that are all the same")
    if int(symbols.max()) > alphabet.escape:
        raise ValueError(f"symbol {symbols.max()} of {alphabet.escape + 1}")
    widths = np.arange(256) // alphabet.others + 1
    widths[alphabet.escape] = alphabet.longest
    others = np.arange(alphabet.lowest, alphabet.highest + 1, dtype=np.uint8)
    # By symbol: those that end in the same code are n apart.
    values = np.resize(others[others != alphabet.commonest], 256)
    last = -1
    for start in range(0, len(symbols), CHUNK):
        chunk = symbols[start : start + CHUNK]
        ends = widths[chunk].cumsum() + last
        last = int(ends[-1])
        if last >= size:
            raise ValueError(f"symbols for more than {size} codes")
        coded = chunk != alphabet.escape
        codes[ends[coded]] = values[chunk[coded]]
    return codes
