"""From disk to host memory, by the decoder's process (`decoder.py`): its other end, in the engine's worker."""

import ctypes
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from deltamux.serve.names import artifact_path
from deltamux.serve.worker.decoder import Task

logger = logging.getLogger("vllm.deltamux")

# Linux 5.14 and later; where it is not known, pages are mapped one by one by the first copy.
MADV_POPULATE_READ = 22
LONGEST_MESSAGE = 2**16
# Where the server may run: the plugin is imported before vLLM's CPU build binds its worker's threads to cores of
# their own, which a child would inherit.
CORES = sorted(os.sched_getaffinity(0))
# Niceness of the decoder, on cores that others use now and then and on those of threads that compute. Measured on two
# cores, of which vLLM's engine process waits on the second in a loop (135M model, 16 experts in 4 slots, half of them on
# disk): at 15, 5 and 0 the server reaches 40, 48 and 49 tokens a second of 60, and gaps of running requests are 0.8,
# 1.1 and 2.1 times at p99 what they are without loads. At 15 beside a busy thread it gets a thirtieth of a core.
SPARE_NICENESS, SHARED_NICENESS = 5, 15


def spare_cores() -> tuple[list[int], int]:
    """Where the decoder runs: cores to which no thread of this process is bound, and its niceness there.

    vLLM's CPU build binds the threads of its worker, which compute all the time: on their cores a decoder would
    either wait for long or make every step wait. Where they have all cores it must not be in their way.
    """
    bound: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            cores = os.sched_getaffinity(int(thread.name))
            if len(cores) < len(CORES):
                bound |= cores
    spare = sorted(set(CORES) - bound)
    return (spare, SPARE_NICENESS) if spare else (CORES, SHARED_NICENESS)


class Loader:
    """Loads experts one after the other; any thread may ask.

    Args:
        task: The base and what slots have room for.
        pin: Lock images in memory, so that copies to a GPU run beside other work.
    """

    def __init__(self, task: Task, pin: bool) -> None:
        self._task = task
        self._pin = pin
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> None:
        """Start the process now: it takes a second or two, beside the loading of the base."""
        with self._lock:
            self._connect()

    def stop(self) -> None:
        """End the process."""
        with self._lock:
            if self._channel is not None and self._process is not None:
                self._channel.close()
                self._channel = None
                self._process.wait()

    def image(self, versioned: str) -> torch.Tensor:
        """An expert's slot image, uint8 [bytes].

        Args:
            versioned: Its path, with or without the hash of its content.

        Raises:
            ValueError: The artifact is refused, or the process ended while it read it.
        """
        size, memory = self._ask({"path": versioned})
        assert memory is not None
        return _mapped(memory, size, self._pin)

    def check(self, versioned: str) -> None:
        """Look whether an expert could be loaded; raises as `image`."""
        self._ask({"path": versioned, "check": True})

    def _ask(self, question: dict[str, object]) -> tuple[int, int | None]:
        """The bytes of the reply's memory, and its file descriptor."""
        with self._lock:
            channel = self._connect()
            try:
                channel.sendall(json.dumps(question).encode() + b"\n")
                content, memories, _, _ = socket.recv_fds(channel, LONGEST_MESSAGE, 1)
                while content and not content.endswith(b"\n"):
                    content += channel.recv(LONGEST_MESSAGE)
            except OSError:
                content, memories = b"", []
            if not content:
                raise ValueError(self._ended(artifact_path(str(question["path"]))))
        reply = json.loads(content)
        if "error" in reply:
            raise ValueError(reply["error"])
        return int(reply["bytes"]), memories[0] if memories else None

    def _connect(self) -> socket.socket:
        if self._channel is not None and self._process and self._process.poll() is None:
            return self._channel
        mine, theirs = socket.socketpair()
        command = [sys.executable, "-m", "deltamux.serve.worker.decoder", str(theirs.fileno())]
        # Decoding has threads of its own; a pool of OpenMP's in each would only disturb the engine.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.pop("LD_PRELOAD", None)
        command += [self._task.to_json(), json.dumps(spare_cores())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._channel = mine
        return mine

    def _ended(self, path: Path) -> str:
        assert self._process is not None
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        status = self._process.wait()
        return (
            f"{str(path)!r} could not be read: the decoder ended with status {status}, as it does when "
            "files change while they are read or memory runs out; the next request tries again"
        )


def _mapped(memory: int, size: int, pin: bool) -> torch.Tensor:
    """The pages behind a file descriptor, which is closed; unmapped when the tensor is gone."""
    try:
        pages = mmap.mmap(memory, size)
    finally:
        os.close(memory)
    image = torch.frombuffer(pages, dtype=torch.uint8)
    # Now, in the thread that loads, and not in the first copy.
    madvise = ctypes.CDLL(None).madvise
    madvise(ctypes.c_void_p(image.data_ptr()), ctypes.c_size_t(size), MADV_POPULATE_READ)
    if pin:
        address, runtime = image.data_ptr(), torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(address, size, 0))
        if failed:
            logger.warning("deltamux: %d bytes could not be pinned (CUDA error %d)", size, failed)
        else:
            weakref.finalize(image, runtime.cudaHostUnregister, address)
    return image
