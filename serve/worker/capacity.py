"""What a slot has room for, from the experts that are configured.

    slot = the largest configured expert's image, or `slot.bytes`

Where no expert is configured, a slot holds two planes for every weight: whatever the format can hold. What a part of
an expert takes (tensor parallelism) stands in no manifest: it is decoded once for its size.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.image.build import Shapes
from deltamux.compression.image.cut import NO_CUTS, Cuts, local_shapes
from deltamux.compression.image.layout import head_bytes, section_bytes
from deltamux.compression.image.planes import row_stride
from deltamux.compression.image.source import Source, open_source
from deltamux.serve.hub import local_directory
from deltamux.serve.settings import PluginSettings
from deltamux.serve.worker.image_cache import ImageCache

logger = logging.getLogger("vllm.deltamux")


@dataclass(frozen=True)
class Capacity:
    """What every slot has room for.

    Attributes:
        num_bytes: Its size.
        rank: The largest rank of factors.
        norms: The base's norm weights that an expert may replace.
    """

    num_bytes: int
    rank: int
    norms: frozenset[str]

    def check(self, source: Source, num_bytes: int) -> None:
        """Refuse an expert that needs more.

        Args:
            source: The expert.
            num_bytes: What its image takes.

        Raises:
            ValueError: The message has both figures and the way out.
        """
        if num_bytes > self.num_bytes:
            raise ValueError(
                f"{str(source.root)!r} takes {num_bytes:,} bytes in a slot, slots have "
                f"{self.num_bytes:,}: compress it with fewer --slot-bits, or name it under `experts` or "
                f"set slot.bytes to {num_bytes} or more, and restart"
            )
        if source.rank > self.rank:
            raise ValueError(
                f"{str(source.root)!r} has factors of rank {source.rank}, slots take up to "
                f"{self.rank}: name it under `experts` or raise slot.rank, and restart"
            )
        other = sorted(source.norms - self.norms)
        if other:
            raise ValueError(
                f"{str(source.root)!r} replaces {other[0]!r}, which no configured expert does: name "
                "it under `experts` and restart"
            )


def capacity(
    settings: PluginSettings,
    shapes: Shapes,
    specs: Sequence[TensorSpec],
    on_cpu: bool,
    cuts: Cuts = NO_CUTS,
) -> Capacity:
    """The capacity that the settings ask for.

    Args:
        settings: Slot settings and configured experts; one that cannot be read is refused when it is loaded.
        shapes: Of the base's tensors, whole.
        specs: What they are.
        on_cpu: Whether the slots are in host memory.
        cuts: Of weights that the device holds a part of.
    """
    sources = list(_readable(settings))
    # A change of the others is folded into linears, but for those of them that cannot be divided by.
    read = {spec.norm for spec in specs}
    norms = {spec.name for spec in specs if spec.role is Role.NORM and spec.name not in read}
    norms |= {name for source in sources for name in source.norms}
    if settings.slot.bytes == "auto":
        sizes = _sizes(sources, shapes, cuts, settings.image_cache)
        size = max(sizes, default=largest_image(local_shapes(shapes, cuts)))
    else:
        size = int(settings.slot.bytes)
    rank = settings.slot.largest_rank
    if settings.slot.rank == "auto" and not on_cpu:
        rank = max((source.rank for source in sources), default=0)
    return Capacity(size, rank, frozenset(norms))


def largest_image(shapes: Shapes) -> int:
    """Bytes of an image with two planes and a step a row for every matrix."""
    sizes = [
        2 * section_bytes(shape[0] * row_stride(shape[1])) + section_bytes(2 * shape[0])
        for shape in shapes.values()
        if len(shape) == 2
    ]
    vectors = [section_bytes(4 * prod(shape)) for shape in shapes.values() if len(shape) == 1]
    return head_bytes(len(shapes)) + sum(sizes) + sum(vectors)


def _sizes(
    sources: Sequence[Source], shapes: Shapes, cuts: Cuts, image_cache: int
) -> Iterator[int]:
    images = ImageCache(image_cache, shapes, cuts=cuts)
    for source in sources:
        if not cuts:
            yield source.image_bytes(shapes)
            continue
        try:
            source.check_content()
            yield images.image(source.content, partial(source.image, shapes, cuts)).numel()
        except (ValueError, OSError) as error:
            logger.debug("deltamux: %s does not count for slots: %s", source.root, error)


def _readable(settings: PluginSettings) -> list[Source]:
    found = []
    paths = [expert.path for expert in settings.experts]
    if settings.experts_dir is not None and settings.experts_dir.is_dir():
        paths += sorted(each for each in settings.experts_dir.iterdir() if each.is_dir())
    for path in paths:
        try:
            found.append(open_source(local_directory(path), settings.slot.largest_rank))
        except (ValueError, OSError) as error:
            logger.debug("deltamux: %s does not count for slots: %s", path, error)
    return found
