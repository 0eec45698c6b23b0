"""Moves of experts on a real GPU: `pytest -m gpu tests/serve/test_residency_gpu.py`."""

import os
from pathlib import Path

import pytest
import torch

from deltamux.compression.image.layout import assemble
from deltamux.serve.worker.capacity import Capacity
from deltamux.serve.worker.decoder import Decoder, Task, shared
from deltamux.serve.worker.loader import Loader, _mapped
from deltamux.serve.worker.slots import Slots

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "compression" / "golden" / "format_1"


def large_image(num_bytes: int) -> torch.Tensor:
    """An image of nothing, with bytes behind it that a copy has to bring along."""
    image = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8)
    head = assemble({}, 1)
    image[: head.numel()] = head
    return image


def test_an_image_of_the_decoders_process_is_pinned_and_arrives_whole() -> None:
    room = Capacity(2**24, 64, frozenset({"model.norm.weight"}))
    task = Task(str(GOLDEN / "base"), None, room, 64, image_cache=0)
    loader = Loader(task, pin=True)
    image = loader.image(str(GOLDEN / "artifact"))
    loader.stop()
    assert image.is_pinned()
    names = list(Decoder(task)._shapes)
    slots = Slots(2, image.numel(), names, torch.device("cuda"))
    slots.load_aside(1, image, None)
    assert torch.equal(slots.buffer[1, : image.numel()].cpu(), image)


def test_a_copy_waits_for_the_step_that_read_the_slot_and_not_for_later_ones() -> None:
    image = _mapped(shared(large_image(2**26)), 2**26, pin=True)
    slots = Slots(2, image.numel(), ["w"], torch.device("cuda"))
    weights = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seen = torch.zeros(4, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        weights = (weights @ weights).clamp(-1, 1)
    seen.copy_(slots.buffer[0, -4:])  # the step's last reading of the slot
    done = torch.cuda.Event()
    done.record()
    slots.load_aside(0, image, done)
    assert done.query()
    assert seen.tolist() == [0] * 4
    assert torch.equal(slots.buffer[0, : image.numel()].cpu(), image)


def test_memory_is_given_back_and_can_be_pinned_again() -> None:
    free = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(8):
        image = _mapped(shared(large_image(2**24)), 2**24, pin=True)
        assert image.is_pinned()
        del image
    assert len(os.listdir("/proc/self/fd")) == free  # noqa: PTH208
