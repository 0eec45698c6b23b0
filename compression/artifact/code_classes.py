"""Classes of rows or of columns whose codes are alike, so that each class gets an entropy code that fits it.

Input channels differ much in how many of their codes are zero, and so do the directions of a low-rank
factor: one code for a whole matrix wastes what they differ by. With n_lv codes of value v in line l (a
row or a column) and k_l the line's class, a class codes its lines at its own distribution p_c, and which
class a line is in costs its share q_c of the lines:

    bits = Σ_l ( −Σ_v n_lv log2 p_{k_l}(v) − log2 q_{k_l} ) + C · (bits of a class's Huffman tables)

The search starts with 16 classes of equally many lines, in the order of their share of the commonest code.
A few times every line moves to the class that codes it in the fewest bits and every class takes the
distribution of its lines (classification EM, Celeux and Govaert 1992). Then those two classes become one
that lose the least by it, for as long as that saves the bits of a table. Of rows and columns, those are
classified that take fewer bits before that.

Shapes: N rows, K columns, L levels, l lines, C classes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Classes to start from, and rounds of moving lines between them; chosen, not measured.
MOST_CLASSES = 16
ITERATIONS = 4
# What a class costs besides its codes: a record, and Huffman tables for about two hundred symbols.
CLASS_BITS = 500
# Keeps the logarithm of a level that a class has not seen finite.
UNSEEN = 0.02
# Up to here, a pass over the codes for each level is faster than one for all.
FEW_LEVELS = 32
# As many ones as a byte can count.
MOST_COUNTED = 255


@dataclass(frozen=True)
class Classes:
    """Which lines are coded together.

    Attributes:
        axis: 0: the lines are rows; 1: columns.
        members: Class of each line, uint8 [l], from 0 to count − 1, none of them empty.
    """

    axis: int
    members: npt.NDArray[np.uint8]

    @property
    def count(self) -> int:
        """C."""
        return int(self.members.max(initial=0)) + 1


def best_classes(codes_NK: npt.NDArray[np.uint8]) -> Classes:
    """The classes of rows or columns that are expected to code a matrix in the fewest bits."""
    if codes_NK.size == 0:
        return Classes(0, np.zeros(len(codes_NK), np.uint8))
    by_axis = [_histogram(codes_NK, axis) for axis in (0, 1)]
    found = [_classified(histogram_lL) for histogram_lL in by_axis]
    axis = 0 if found[0][1] < found[1][1] else 1
    return Classes(axis, _merged(by_axis[axis], found[axis][0]))


def _histogram(codes_NK: npt.NDArray[np.uint8], axis: int) -> npt.NDArray[np.float64]:
    """How often each line has each of the codes that occur, [l, L]."""
    lines = codes_NK.shape[axis]
    lowest, highest = int(codes_NK.min()), int(codes_NK.max())
    levels = highest + 1 - lowest
    if levels > FEW_LEVELS:
        place_l = np.arange(lines) * levels - lowest
        cells_NK = codes_NK + (place_l[:, None] if axis == 0 else place_l)
        counts = np.bincount(cells_NK.reshape(-1), minlength=lines * levels)
        found_lL = counts.reshape(lines, levels).astype(np.float64)
        return found_lL[:, found_lL.any(axis=0)]
    found_lL = np.empty((lines, levels), np.float64)
    for level in range(levels):
        found_lL[:, level] = _count((codes_NK == lowest + level).view(np.uint8), 1 - axis)
    return found_lL


def _count(found_NK: npt.NDArray[np.uint8], axis: int) -> npt.NDArray[np.float64]:
    """Ones along an axis; sums of bytes are several times as fast as wider ones."""
    count_l = np.zeros(found_NK.shape[1 - axis], np.float64)
    for part in np.split(found_NK, range(MOST_COUNTED, found_NK.shape[axis], MOST_COUNTED), axis):
        count_l += part.sum(axis=axis, dtype=np.uint8)
    return count_l


def _classified(histogram_lL: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], float]:
    """The class of each line, and the bits of all codes without those of the tables."""
    lines = len(histogram_lL)
    share_l = histogram_lL[:, histogram_lL.sum(axis=0).argmax()] / histogram_lL.sum(axis=1)
    members_l = np.empty(lines, np.int64)
    members_l[share_l.argsort()] = np.arange(lines) * MOST_CLASSES // lines
    for _ in range(ITERATIONS):
        total_CL, lines_C = _totals(histogram_lL, members_l)
        smooth_CL = total_CL + UNSEEN
        bits_CL = -np.log2(smooth_CL / smooth_CL.sum(axis=1, keepdims=True))
        bits_lC = histogram_lL @ bits_CL.T - np.log2(lines_C / lines)
        members_l = bits_lC.argmin(axis=1)
    return members_l, float(bits_lC.min(axis=1).sum())


def _totals(
    histogram_lL: npt.NDArray[np.float64], members_l: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Codes [C, L] and lines [C] of the classes that are not empty."""
    member_Cl = (np.unique(members_l)[:, None] == members_l).astype(np.float64)
    return member_Cl @ histogram_lL, member_Cl.sum(axis=1)


def _merged(
    histogram_lL: npt.NDArray[np.float64], members_l: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """The class of each line after merging while that saves bits, numbered from 0."""
    members_l = np.unique(members_l, return_inverse=True)[1]
    counts_CL, lines_C = _totals(histogram_lL, members_l)
    growth_CC = np.stack([_growth(counts_CL, lines_C, one) for one in range(len(lines_C))])
    while len(lines_C) > 1:
        kept, gone = sorted(divmod(int(growth_CC.argmin()), len(lines_C)))
        if growth_CC[kept, gone] > CLASS_BITS:
            break
        counts_CL[kept] += counts_CL[gone]
        lines_C[kept] += lines_C[gone]
        counts_CL, lines_C = np.delete(counts_CL, gone, axis=0), np.delete(lines_C, gone)
        growth_CC = np.delete(np.delete(growth_CC, gone, axis=0), gone, axis=1)
        growth_CC[kept] = growth_CC[:, kept] = _growth(counts_CL, lines_C, kept)
        members_l[members_l == gone] = kept
        members_l[members_l > gone] -= 1
    return members_l.astype(np.uint8)


def _growth(
    counts_CL: npt.NDArray[np.float64], lines_C: npt.NDArray[np.float64], one: int
) -> npt.NDArray[np.float64]:
    """What each class's codes and lines cost more when one class joins it; itself: infinity."""
    bits_C = _bits(counts_CL, lines_C)
    together_C = _bits(counts_CL + counts_CL[one], lines_C + lines_C[one])
    growth_C = np.asarray(together_C - bits_C - bits_C[one])
    growth_C[one] = np.inf
    return growth_C


def _bits(
    counts_CL: npt.NDArray[np.float64], lines_C: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Bits of each class's codes at their own distribution and, but for a constant, of its lines."""
    codes_C = _xlogx(counts_CL.sum(axis=1)) - _xlogx(counts_CL).sum(axis=1)
    return np.asarray(codes_C - _xlogx(lines_C))


def _xlogx(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The product x log2 x of counts x; 0 for 0."""
    return np.asarray(counts * np.log2(np.maximum(counts, 1)))
