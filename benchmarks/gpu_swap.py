"""On a GPU: an expert's way from the decoder's memory into a slot, and what steps beside it notice.

    python -m benchmarks.gpu_swap

An image of the size that Mistral-7B's shapes take is mapped and pinned as the worker does it. Its copy into a slot is
compared with a plain copy of pinned memory; steps of 32 products of one row (4096 x 14336, bfloat16) are timed alone
and while copies follow each other.
"""

import statistics
import threading
import time
from collections.abc import Callable

import torch

from benchmarks.record import record
from deltamux.compression.image.layout import assemble
from deltamux.serve.worker.decoder import shared
from deltamux.serve.worker.loader import _mapped
from deltamux.serve.worker.slots import Slots

IMAGE_BYTES = int(1.8 * 2**30)
ROUNDS, STEPS = 20, 400


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[int(len(ordered) * 0.99)]
    return {"median": statistics.median(ordered), "p99": p99, "longest": ordered[-1]}


def copies(plain: torch.Tensor, image: torch.Tensor, slots: Slots) -> dict[str, float]:
    """A copy into a slot, and a plain one of pinned memory, in turn."""
    pinned, target = plain.pin_memory(), torch.empty_like(plain, device="cuda")
    ours, plains = [], []

    def copy() -> None:
        target.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    for _ in range(ROUNDS):
        plains.append(seconds(copy))
        ours.append(seconds(lambda: slots.load_aside(0, image, None)))
    slot, reference = statistics.median(ours), statistics.median(plains)
    return {"slot_seconds": slot, "copy_seconds": reference, "ratio": slot / reference}


def beside(image: torch.Tensor, slots: Slots) -> dict[str, object]:
    """Steps alone, and while experts are copied."""
    weights = [torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16) for _ in range(32)]
    row = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    over = threading.Event()

    def step() -> None:
        for weight in weights:
            row @ weight
        torch.cuda.current_stream().synchronize()

    def move() -> None:
        while not over.is_set():
            slots.load_aside(1, image, None)

    for _ in range(20):
        step()
    quiet = [seconds(step) for _ in range(STEPS)]
    mover = threading.Thread(target=move)
    mover.start()
    loud = [seconds(step) for _ in range(STEPS)]
    over.set()
    mover.join()
    return {"step_seconds": spread(quiet), "step_seconds_beside_copies": spread(loud)}


def main() -> None:
    plain = torch.randint(0, 255, (IMAGE_BYTES,), dtype=torch.uint8)
    head = assemble({}, 1)
    plain[: head.numel()] = head
    memory: list[int] = []
    handed_over = seconds(lambda: memory.append(shared(plain)))
    images: list[torch.Tensor] = []
    mapped = seconds(lambda: images.append(_mapped(memory[0], IMAGE_BYTES, pin=True)))
    slots = Slots(2, IMAGE_BYTES, ["w"], torch.device("cuda"))
    result = {
        "image_bytes": IMAGE_BYTES,
        "written_by_decoder_seconds": handed_over,
        "mapped_and_pinned_seconds": mapped,
        "copy": copies(plain, images[0], slots),
        "beside": beside(images[0], slots),
    }
    record("gpu-swap", result)


if __name__ == "__main__":
    main()
