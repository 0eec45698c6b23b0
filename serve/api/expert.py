"""One version of one expert, as the API process reads it from its artifact."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamux.compression.image.source import open_source
from deltamux.compression.streaming.served import own_template, read_settings


class ExpertError(Exception):
    """An expert cannot answer; the message says why, for the client."""


@dataclass
class Expert:
    """One version of one expert.

    Attributes:
        name: What clients call it.
        path: The artifact.
        content: Hash of the artifact's content.
        request: Its LoRA request, None if it was refused.
        error: Why it was refused, else None.
        num_bytes: Size of the artifact's weights file.
        bits_per_weight: Of the decoder's linears, on disk.
        slot_bits_per_weight: The same in a slot; None where nothing says it.
        generation_config: Its own, sampling defaults among it.
        stop_ids: End-of-sequence ids of its own.
        chat_template: Its own template, None where it has none.
        variants: vLLM's handlers speaking for this expert, by method name.
        pinned: Whether it is to keep a slot.
        last_used: Unix time of its last request, None before the first.
        holds: Requests between admission and the engine.
        running: Generations in the engine.
    """

    name: str
    path: Path
    content: str = ""
    request: Any = None
    error: str | None = None
    num_bytes: int = 0
    bits_per_weight: float = 0.0
    slot_bits_per_weight: float | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)
    chat_template: str | None = None
    variants: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False
    last_used: float | None = None
    holds: int = 0
    running: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A request is on its way to the engine."""
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1
            self.changed.set()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A generation runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self.changed.set()

    async def drained(self) -> None:
        """Wait until no request needs this version any more."""
        while self.holds or self.running:
            self.changed.clear()
            await self.changed.wait()

    def same_weights(self, other: "Expert") -> bool:
        """Whether another reading found the same weights in the same place."""
        mine, theirs = self.path.absolute(), other.path.absolute()
        return (mine, self.content) == (theirs, other.content)

    def take_over(self, read: "Expert") -> None:
        """Take template and generation settings that changed beside the same weights."""
        self.generation_config, self.stop_ids = read.generation_config, read.stop_ids
        self.chat_template = read.chat_template
        self.variants.clear()


def read_expert(name: str, path: Path, max_rank: int) -> Expert:
    """Read an expert's sizes, template and generation settings; checks its content.

    Args:
        name: What clients call it.
        path: An artifact, or a LoRA adapter.
        max_rank: The largest rank of an adapter.

    Raises:
        ValueError: It is neither, damaged, or newer than this version.
    """
    source = open_source(path, max_rank)
    source.check_content()
    config = read_settings(path / "generation_config.json")
    stop = config.get("eos_token_id")
    return Expert(
        name=name,
        path=path,
        content=source.content,
        num_bytes=source.num_bytes,
        bits_per_weight=source.bits_per_weight,
        slot_bits_per_weight=source.slot_bits_per_weight,
        generation_config=config,
        stop_ids=[] if stop is None else list(stop) if isinstance(stop, list) else [stop],
        chat_template=own_template(path),
    )
