"""Which part of a weight a device holds where several share every matrix (tensor parallelism).

A linear [N, K] is split by output rows or by input channels, an embedding by vocabulary (Shoeybi et al. 2019,
arXiv 1909.08053). A delta is split like the weight that it changes: with the parts of all ranks, Σ x Δ̂ over channels
and the rows one after the other are the whole product again. Codes are cut before they are packed, so that a rank's
image is that of a smaller model, and everything behind it need not know of ranks.

Shapes: N output rows, K input channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cut:
    """A part of a weight.

    Attributes:
        rows: Ranges of output rows, ascending; several where one matrix is q, k and v. None: all.
        channels: A range of input channels. None: all.
        bias: Whether a change of the bias belongs to this part; a sum over ranks may hold it once.
    """

    rows: tuple[tuple[int, int], ...] | None = None
    channels: tuple[int, int] | None = None
    bias: bool = True

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> "Cut":
        """What `dataclasses.asdict` made of one, after JSON."""
        rows, channels, bias = content["rows"], content["channels"], content["bias"]
        assert rows is None or isinstance(rows, list)
        assert channels is None or isinstance(channels, list)
        return cls(
            None if rows is None else tuple((begin, end) for begin, end in rows),
            None if channels is None else (channels[0], channels[1]),
            bool(bias),
        )

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part of a matrix."""
        rows, channels = shape
        if self.rows is not None:
            rows = sum(end - begin for begin, end in self.rows)
        if self.channels is not None:
            channels = self.channels[1] - self.channels[0]
        return rows, channels

    def row_index(self, count: int) -> torch.Tensor:
        """The rows of the part among `count`, int64, ascending."""
        ranges = self.rows if self.rows is not None else ((0, count),)
        return torch.cat([torch.arange(begin, end) for begin, end in ranges])

    def channel_slice(self) -> slice:
        """The channels of the part."""
        return slice(None) if self.channels is None else slice(*self.channels)


WHOLE = Cut()
# By the weight's name; what is not there is whole.
Cuts = Mapping[str, Cut]
NO_CUTS: Cuts = {}


def local_shapes(shapes: Mapping[str, tuple[int, ...]], cuts: Cuts) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts, in the same order."""
    return {
        name: cuts[name].shape(shape) if name in cuts else shape for name, shape in shapes.items()
    }


def positions_in(
    index: torch.Tensor, chosen: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of some ascending places are chosen, and where they are among the chosen.

    Args:
        index: Places, int64 [I], ascending.
        chosen: Chosen places, int64 [C], ascending.
        count: Of all places.

    Returns:
        bool [I], and int64 [those that are].
    """
    place = torch.full((count,), -1)
    place[chosen] = torch.arange(len(chosen))
    found = place[index.long()]
    return found >= 0, found[found >= 0]
