"""The process that turns artifacts into slot images, so that the engine never waits for one.

Reading, hashing and decoding run Python between their compiled parts. In a thread of the worker they would take
the interpreter from the engine's step a few hundred times (a step of a 135M model took three times as long while
an expert was decoded beside it); in a process of their own, of lower priority, they take spare processor time.
It also keeps an artifact that changes while it is read from ending the engine.

    worker → decoder    one line of JSON: {"path": …}, with "check": true to look and not to decode
    decoder → worker    one line of JSON: {"bytes": …} with the image's memory, or {"error": …}

The image is passed as a file descriptor of anonymous memory: both processes map the same pages.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from deltamux.compression.checkpoint.architecture import tensor_specs
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.image.build import Shapes
from deltamux.compression.image.cut import Cut, Cuts
from deltamux.compression.image.source import Source
from deltamux.serve.errors import one_line
from deltamux.serve.worker.capacity import Capacity
from deltamux.serve.worker.host_cache import BaseHashes, open_expert
from deltamux.serve.worker.image_cache import ImageCache


@dataclass(frozen=True)
class Task:
    """What a decoder decodes for.

    Attributes:
        base: Directory or hub id of the served base.
        revision: Of a hub id.
        capacity: What every slot has room for.
        largest_rank: That an adapter may be opened with.
        image_cache: Bytes of slot images that are kept on disk.
        cuts: Of weights that the worker's device holds a part of.
        quantization: How vLLM quantizes the base while it loads it; None: not at all.
    """

    base: str
    revision: str | None
    capacity: Capacity
    largest_rank: int
    image_cache: int
    cuts: Cuts = field(default_factory=dict)
    quantization: str | None = None

    def to_json(self) -> str:
        """For the command line of the process."""
        room = self.capacity
        fields = {"num_bytes": room.num_bytes, "rank": room.rank, "norms": sorted(room.norms)}
        cuts = {name: asdict(cut) for name, cut in self.cuts.items()}
        return json.dumps(vars(self) | {"capacity": fields, "cuts": cuts})

    @staticmethod
    def from_json(text: str) -> "Task":
        """What `to_json` wrote."""
        content: dict[str, Any] = json.loads(text)
        room = content.pop("capacity")
        capacity = Capacity(room["num_bytes"], room["rank"], frozenset(room["norms"]))
        cuts = {name: Cut.from_json(cut) for name, cut in content.pop("cuts").items()}
        return Task(**content, capacity=capacity, cuts=cuts)


class Decoder:
    """Decodes experts of one base."""

    def __init__(self, task: Task) -> None:
        self._task = task
        base = open_checkpoint(task.base, task.revision)
        specs = [spec for spec in tensor_specs(base.config, set(base.files)) if spec.served]
        self._shapes: Shapes = {spec.name: base.shape(spec.name) for spec in specs}
        self._hashes = BaseHashes(base)
        self._images = ImageCache(task.image_cache, self._shapes, cuts=task.cuts)

    def check(self, versioned: str) -> Source:
        """Open an expert, and look whether it fits base and slots.

        Raises:
            ValueError: The artifact is refused; the message says why.
            OSError: A file of it cannot be read.
        """
        source = open_expert(versioned, self._hashes, self._task.largest_rank)
        wanted = source.base_quantization
        if wanted not in (None, self._task.quantization):
            raise ValueError(
                f"{str(source.root)!r} was compressed for a base that is served quantized by {wanted!r}, this "
                f"one is by {self._task.quantization!r}: set engine.quantization to {wanted}, or compress "
                "the expert without --base-as-served"
            )
        # Of a part the manifest does not say how large it is: its image does.
        size = 0 if self._task.cuts else source.image_bytes(self._shapes)
        self._task.capacity.check(source, size)
        return source

    def image(self, versioned: str) -> torch.Tensor:
        """The slot image of an expert, every part checked; raises as `check`."""
        source = self.check(versioned)
        cuts = self._task.cuts
        image = self._images.image(source.content, lambda: source.image(self._shapes, cuts))
        self._task.capacity.check(source, image.numel())
        return image


def shared(image: torch.Tensor) -> int:
    """A file descriptor of anonymous memory that holds an image."""
    memory = os.memfd_create("deltamux-image")
    with os.fdopen(os.dup(memory), "wb", buffering=0) as file:
        view = memoryview(image.numpy().data)
        while view:
            view = view[file.write(view) :]
    return memory


def answer(decoder: Decoder, channel: socket.socket, question: dict[str, Any]) -> None:
    """Decode one expert and send it, or what is wrong with it."""
    try:
        if question.get("check"):
            decoder.check(question["path"])
            channel.sendall(json.dumps({"bytes": 0}).encode() + b"\n")
            return
        memory = shared(decoder.image(question["path"]))
    except Exception as error:
        reason = one_line(error) or f"{type(error).__name__}: {error}"
        channel.sendall(json.dumps({"error": reason}).encode() + b"\n")
        return
    try:
        size = os.fstat(memory).st_size
        message = json.dumps({"bytes": size}).encode() + b"\n"
        socket.send_fds(channel, [message], [memory])
    finally:
        os.close(memory)


def use_spare_time(cores: list[int], niceness: int) -> None:
    """Lower the process's priority, and let it run on these cores."""
    os.nice(niceness)
    os.sched_setaffinity(0, cores)


def main() -> None:
    """Decode what is asked for until the worker has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_spare_time(*json.loads(sys.argv[3]))
    torch.set_num_threads(1)
    channel = socket.socket(fileno=int(sys.argv[1]))
    decoder = Decoder(Task.from_json(sys.argv[2]))
    with channel.makefile("r") as lines:
        for line in lines:
            answer(decoder, channel, json.loads(line))


if __name__ == "__main__":
    main()
