"""One version of one expert, as the API process reads it from its artifact."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltamux.compression.checkpoint.settings import read_side_settings
from deltamux.compression.image.source import open_source
from deltamux.serve import compat
from deltamux.serve.hub import local_directory
from deltamux.serve.names import versioned_name, versioned_path

Origin = Literal["configured", "added", "watched"]


class ExpertError(Exception):
    """An expert cannot answer; the message says why, for the client."""


@dataclass(frozen=True)
class Limits:
    """How an expert is served.

    Attributes:
        priority: Whose requests go first; smaller numbers do.
        concurrency: Requests that may be in the engine at once; None: any number.
        ttl: Seconds after its last request until it leaves memory; None: never.
    """

    priority: int = 0
    concurrency: int | None = None
    ttl: float | None = None


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
        sampling: Its own sampling defaults, by their names in `generation_config.json`.
        stop_ids: End-of-sequence ids of its own.
        chat_template: Its own template, None where it has none.
        variants: vLLM's handlers speaking for this expert, by method name.
        pinned: Whether it is to keep a slot.
        last_used: Unix time of its last request, None before the first.
        holds: Requests from their arrival to the end of their response.
        entered: Those of them that the gate let into the engine.
        running: Generations in the engine.
        limits: What is configured for it.
        source: The path as it was given: a directory, or a hub id.
        origin: Who named it: the configuration, a client, or the watched folder.
        rests_since: When its last request ended, on the monotonic clock.
    """

    name: str
    path: Path
    content: str = ""
    request: Any = None
    error: str | None = None
    num_bytes: int = 0
    bits_per_weight: float = 0.0
    slot_bits_per_weight: float | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)
    chat_template: str | None = None
    variants: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False
    last_used: float | None = None
    holds: int = 0
    entered: int = 0
    running: int = 0
    limits: Limits = Limits()
    source: Path = Path()
    origin: Origin = "configured"
    rests_since: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    on_end: Callable[[], None] = lambda: None

    @property
    def busy(self) -> bool:
        """Whether the engine may be working on one of its requests."""
        return bool(self.entered or self.running)

    def hold(self) -> Callable[[], None]:
        """A request has come; returns what to call when its response has ended."""
        self.holds += 1

        def release() -> None:
            self.holds -= 1
            self.changed.set()

        return release

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A generation runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self.changed.set()
            self.on_end()

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
        self.sampling, self.stop_ids = read.sampling, read.stop_ids
        self.chat_template = read.chat_template
        self.variants.clear()


@dataclass(frozen=True)
class Served:
    """What of the served model decides on the experts that it takes.

    Attributes:
        max_rank: The largest rank of an adapter.
        vocabulary: Its number of tokens.
        token_id: Its tokenizer's id of a token, None where it has no such token.
    """

    max_rank: int
    vocabulary: int
    token_id: Callable[[str], int | None]


def read_expert(name: str, path: Path, served: Served) -> Expert:
    """Read an expert's sizes, template and generation settings; all of them are checked.

    Args:
        name: What clients call it.
        path: An artifact, or a LoRA adapter; a directory or a hub id.
        served: What it is to be served beside.

    Raises:
        ValueError: It is neither, damaged, newer than this version, or says of itself what no request could be
            answered with.
    """
    given, path = path, local_directory(path)
    source = open_source(path, served.max_rank)
    settings = read_side_settings(path, served.vocabulary, served.token_id)
    source.check_content()
    return Expert(
        name=name,
        path=path,
        source=given,
        content=source.content,
        num_bytes=source.num_bytes,
        bits_per_weight=source.bits_per_weight,
        slot_bits_per_weight=source.slot_bits_per_weight,
        sampling=settings.sampling,
        stop_ids=settings.stop_ids,
        chat_template=settings.template,
    )


def lora_request(expert: Expert, models: Any) -> Any:
    """How vLLM is asked for one version of an expert.

    Args:
        expert: The version.
        models: vLLM's `openai_serving_models`, which counts the ids.
    """
    lora_id = models.lora_id_counter.inc(1)
    return compat.symbol(*compat.LORA_REQUEST)(
        lora_name=versioned_name(expert.name, expert.content, lora_id),
        lora_int_id=lora_id,
        lora_path=versioned_path(expert.path.absolute(), expert.content),
        base_model_name=models.base_model_paths[0].name,
    )
