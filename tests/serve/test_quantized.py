"""Experts over checkpoints that are quantized already, on a real engine."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.serve.base_checks import check_quantized
from tests.serve.test_engine import PROMPT, SHORT, run_engine, transformers_prompt

pytestmark = pytest.mark.vllm

WEIGHTS = "model.safetensors"
INT8 = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
INT4 = INT8 | {"num_bits": 4, "strategy": "group", "group_size": 32}
PER_TOKEN = INT8 | {"strategy": "token", "dynamic": True}
GROUP = 32


def as_int8(weight_NK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whole numbers of 8 bits and a scale a row, as compressed-tensors stores them."""
    scale_N = weight_NK.abs().amax(dim=1, keepdim=True) / 127
    return {
        "weight": (weight_NK / scale_N).round().to(torch.int8),
        "weight_scale": scale_N.bfloat16(),
    }


def as_int4(weight_NK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Four bits and a scale for each group of columns, eight in a number of 32 bits."""
    rows, columns = weight_NK.shape
    groups = weight_NK.reshape(rows, -1, GROUP)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    codes = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int64).reshape(rows, -1, 8)
    packed = (codes << (4 * torch.arange(8))).sum(dim=2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return {
        "weight_packed": packed.to(torch.int32),
        "weight_scale": scale.squeeze(2).bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }


SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "int8": (
        as_int8,
        {"format": "int-quantized", "groups": {"weights": INT8, "input_activations": PER_TOKEN}},
    ),
    "int4": (as_int4, {"format": "pack-quantized", "groups": {"weights": INT4}}),
}


def save_quantized(base: Path, target: Path, scheme: str) -> Path:
    """A checkpoint of compressed-tensors, whose linears are quantized."""
    shutil.copytree(base, target)
    quantize, settings = SCHEMES[scheme]
    weights = {}
    for name, weight in load_file(target / WEIGHTS).items():
        if name.endswith("_proj.weight"):
            parts = quantize(weight.float())
            weights |= {f"{name.removesuffix('weight')}{key}": part for key, part in parts.items()}
        else:
            weights[name] = weight
    save_file(weights, target / WEIGHTS, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": settings["format"],
        "config_groups": {"group_0": {"targets": ["Linear"]} | settings["groups"]},
        "ignore": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: SimpleNamespace, text_file: Path
) -> SimpleNamespace:
    """A base in bfloat16, an expert made against it, and that merged into it."""
    folder = tmp_path_factory.mktemp("quantized")
    # vLLM's kernels for whole numbers want columns in multiples of 32.
    base = checkpoints.save_base(folder / "base", dtype=torch.bfloat16, intermediate_size=128)
    tuned = checkpoints.save_expert(base, folder / "tuned")
    checkpoints.compress_tiny(base, tuned, folder / "one", text_file)
    merge(open_checkpoint(base), Artifact(folder / "one"), folder / "merged", progress=False)
    return SimpleNamespace(folder=folder, base=base, artifacts={"one": str(folder / "one")})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_expert_stands_on_a_checkpoint_that_is_quantized(
    parts: SimpleNamespace, scheme: str, tmp_path: Path
) -> None:
    model = save_quantized(parts.base, tmp_path / "quantized", scheme)
    check_quantized(parts.base, model)
    asked: list[Any] = [[[None, PROMPT]], [["one", PROMPT], [None, SHORT]]]
    short = {"dtype": "bfloat16", "base": str(parts.base)}
    plain = run_engine(tmp_path, model, False, {}, asked[:1], dtype="bfloat16")[0][0]
    base, mixed = run_engine(tmp_path, model, True, parts.artifacts, asked, **short)
    assert base[0]["ids"] == plain["ids"]
    assert base[0]["prompt_logprobs"] == plain["prompt_logprobs"]

    def away(checkpoint: Path, answer: dict[str, Any]) -> float:
        whole = torch.tensor(transformers_prompt(checkpoint, answer["prompt_ids"]))
        return float((torch.tensor(answer["prompt_logprobs"]) - whole).abs().mean())

    merged = parts.folder / "merged"
    assert away(merged, mixed[0]) < 2 * away(parts.base, base[0])
    assert away(merged, base[0]) > 2 * away(merged, mixed[0])


def test_a_checkpoint_that_is_not_of_the_base_is_refused(
    parts: SimpleNamespace, checkpoints: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has no quantization_config: drop base\.quantized"):
        check_quantized(parts.base, parts.base)
    for changes, found in (
        ({"seed": 7, "intermediate_size": 128}, "its 'model.embed_tokens.weight' is another"),
        ({"intermediate_size": 96}, "intermediate_size is 96 there and 128 here"),
    ):
        other = checkpoints.save_base(
            tmp_path / f"other-{len(changes)}", dtype=torch.bfloat16, **changes
        )
        quantized = save_quantized(other, tmp_path / f"quantized-{len(changes)}", "int8")
        with pytest.raises(ValueError, match=found):
            check_quantized(parts.base, quantized)
