"""Slot images kept on disk."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltamux.compression.image.layout import Field, Record, assemble
from deltamux.serve.worker.image_cache import SUFFIX, ImageCache

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (4, 8), "b.weight": (8,)}
CAPACITY = 10_000


def expert(seed: int) -> torch.Tensor:
    vector = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    return assemble({1: Record({}, {Field.VECTOR: vector.numpy()})}, len(SHAPES))


@pytest.fixture
def made() -> list[int]:
    """Experts that were decoded, in this order."""
    return []


@pytest.fixture
def make(made: list[int]) -> Callable[[int], Callable[[], torch.Tensor]]:
    def decoded(seed: int) -> torch.Tensor:
        made.append(seed)
        return expert(seed)

    return lambda seed: lambda: decoded(seed)


def only_file(folder: Path) -> Path:
    (found,) = folder.glob(f"*{SUFFIX}")
    return found


def test_an_image_is_decoded_once(tmp_path: Path, make, made) -> None:
    for _ in range(2):
        image = ImageCache(CAPACITY, SHAPES, tmp_path).image("content", make(1))
        assert torch.equal(image, expert(1))
    assert made == [1]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-40], id="truncated"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-50] + bytes(50), id="altered"),
        pytest.param(lambda content: content[:4] + b"\2" + content[5:], id="another version"),
        pytest.param(lambda content: b"x" * len(content), id="no image"),
    ],
)
def test_a_damaged_image_is_made_anew_with_one_warning(
    tmp_path: Path, make, made, damage, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ImageCache(CAPACITY, SHAPES, tmp_path)
    cache.image("content", make(1))
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "vllm.deltamux"):
        assert torch.equal(cache.image("content", make(1)), expert(1))
        assert torch.equal(cache.image("content", make(1)), expert(1))
    assert made == [1, 1]
    (line,) = [record for record in caplog.records if record.name == "vllm.deltamux"]
    assert "made anew" in line.getMessage()
    assert "\n" not in line.getMessage()


def test_another_expert_or_base_has_an_image_of_its_own(tmp_path: Path, make, made) -> None:
    ImageCache(CAPACITY, SHAPES, tmp_path).image("content", make(1))
    ImageCache(CAPACITY, SHAPES, tmp_path).image("other", make(2))
    ImageCache(CAPACITY, SHAPES | {"b.weight": (9,)}, tmp_path).image("content", make(3))
    assert made == [1, 2, 3]


def test_the_least_recently_read_leaves(tmp_path: Path, make, made) -> None:
    room = 2 * (expert(1).numel() + 32)
    cache = ImageCache(room, SHAPES, tmp_path)
    cache.image("first", make(1))
    os.utime(only_file(tmp_path), (1, 1))
    cache.image("second", make(2))
    cache.image("third", make(3))
    assert len(list(tmp_path.iterdir())) == 2
    cache.image("second", make(2))
    cache.image("first", make(1))
    assert made == [1, 2, 3, 1]


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path, make, made) -> None:
    for capacity in (0, 100):
        ImageCache(capacity, SHAPES, tmp_path).image("content", make(1))
    assert made == [1, 1]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, make, made, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    with caplog.at_level(logging.WARNING, "vllm.deltamux"):
        image = ImageCache(CAPACITY, SHAPES, place).image("content", make(1))
    assert torch.equal(image, expert(1))
    assert "is not kept" in caplog.text
