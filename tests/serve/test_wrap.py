"""Payloads for a model's layers, with stand-ins for vLLM's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.recipe import LinearRecipe, Recipe
from deltamux.compression.streaming.text import encode_rows, read_rows
from deltamux.serve.worker.slots import SlotPlan

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def artifact(
    tmp_path_factory: pytest.TempPathFactory,
    make_pair: Callable[..., tuple[Path, Path]],
    text_file: Path,
) -> Artifact:
    base, expert = make_pair()
    samples = encode_rows(read_rows(text_file), expert, 64)
    output = tmp_path_factory.mktemp("wrap") / "expert"
    recipe = Recipe(linear=LinearRecipe(scheme="int2", salient_channels=5))
    compress(
        open_checkpoint(base),
        open_checkpoint(expert),
        output,
        recipe,
        calibration=samples,
        held_out=[],
        progress=False,
    )
    return Artifact(output)


def plan(salient: int) -> SlotPlan:
    return SlotPlan(2, salient, torch.float32, torch.device("cpu"))


def test_an_expert_that_needs_more_room_than_a_slot_names_the_setting(artifact: Artifact) -> None:
    from deltamux.serve.worker.wrap import _check_fits

    quantized = artifact.quantized("model.layers.0.mlp.down_proj.weight")
    _check_fits(quantized, "down_proj", (64, 96), room=5)
    with pytest.raises(ValueError, match=r"keeps 5 channels .* room for 4: .*salient_channels"):
        _check_fits(quantized, "down_proj", (64, 96), room=4)
    for shape in ((65, 96), (64, 95)):
        with pytest.raises(ValueError, match=r"has shape \(64, 96\), the served model"):
            _check_fits(quantized, "down_proj", shape, room=5)


def test_a_weight_that_the_model_lacks_is_named(artifact: Artifact) -> None:
    from deltamux.serve.worker.wrap import expert_payloads

    with pytest.raises(ValueError, match=r"changes 'lm_head.weight', which this model does not"):
        expert_payloads(artifact, {}, {}, plan(5))
