"""LoRA adapters as slot images: the numbers that PEFT's merge adds, and what is refused."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltamux.compression.image.adapter import Adapter
from deltamux.compression.image.build import adapter_image
from deltamux.compression.image.dense import served_delta
from deltamux.compression.image.layout import ImageReader
from deltamux.compression.image.source import open_source

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.self_attn.q_proj.weight": (16, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 40),
}
MODULES = {"model.layers.0.self_attn.q_proj": (16, 24), "model.layers.0.mlp.down_proj": (24, 40)}
RANK = 4


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def run(
        settings: dict[str, Any] | None = None,
        *,
        rank: int = RANK,
        dtype: torch.dtype = torch.bfloat16,
        extra: dict[str, torch.Tensor] | None = None,
        drop: str = "",
    ) -> Path:
        torch.manual_seed(0)
        tensors = {}
        for module, (rows, columns) in MODULES.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items() if name != drop}
        save_file(tensors | (extra or {}), tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | (settings or {})))
        return tmp_path

    return run


def merged(folder: Path, module: str, scale: float) -> torch.Tensor:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    left = tensors[f"base_model.model.{module}.lora_B.weight"].float()
    right = tensors[f"base_model.model.{module}.lora_A.weight"].float()
    return scale * left @ right


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 6}, 1.5),
        ({"use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"alpha_pattern": {"q_proj": 16}}, 4.0),
    ],
    ids=["plain", "odd scale", "rsLoRA", "pattern"],
)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"]
)
def test_the_image_holds_what_a_merge_adds(
    save: Callable[..., Path], settings: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    folder = save(settings, dtype=dtype)
    reader = ImageReader(adapter_image(Adapter(folder, RANK), SHAPES))
    delta = served_delta(reader, 1, 16, 24)
    expected = merged(folder, "model.layers.0.self_attn.q_proj", scale)
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_a_source_like_any_other(save: Callable[..., Path]) -> None:
    source = open_source(save(), RANK)
    assert source.rank == RANK
    assert source.image_bytes(SHAPES) == source.image(SHAPES).numel()
    assert len(source.content) == 16
    assert source.norms == frozenset()


def test_another_content_is_another_identity(save: Callable[..., Path]) -> None:
    first = Adapter(save(), RANK).content
    assert Adapter(save({"lora_alpha": 9}), RANK).content != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, "no LoRA adapter's configuration"),
        ({"lora_alpha": float("nan")}, "no LoRA adapter's configuration"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_is_more_than_plain_lora_is_refused_by_name(
    save: Callable[..., Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter(save(settings), RANK)


def test_a_rank_above_the_setting_names_the_setting(save: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"has rank 4, slots take up to 2: raise slot\.rank"):
        Adapter(save(), 2)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", "changes 'lm_head'"),
        ("base_model.model.model.norm.weight", "no factor of a linear"),
        ("other", "no factor of a linear"),
    ],
)
def test_modules_that_slots_do_not_hold_are_refused(
    save: Callable[..., Path], key: str, message: str
) -> None:
    folder = save(extra={key: torch.zeros(RANK, 24)})
    with pytest.raises(ValueError, match=message):
        Adapter(folder, RANK)


def test_a_factor_without_its_other_half_is_refused(save: Callable[..., Path]) -> None:
    dropped = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    with pytest.raises(ValueError, match=r"lacks lora_B of 'model\.layers\.0\.mlp\.down_proj'"):
        Adapter(save(drop=dropped), RANK)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(
    save: Callable[..., Path],
) -> None:
    adapter = Adapter(save(), RANK)
    other = SHAPES | {"model.layers.0.mlp.down_proj.weight": (24, 48)}
    with pytest.raises(ValueError, match=r"24 by 40 there, 24 by 48 here"):
        adapter_image(adapter, other)
    fewer = {name: shape for name, shape in SHAPES.items() if "down" not in name}
    with pytest.raises(ValueError, match="which this base does not have outside"):
        adapter_image(adapter, fewer)


def test_numbers_that_are_not_finite_never_reach_an_image(save: Callable[..., Path]) -> None:
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    folder = save(drop=name, extra={name: torch.full((RANK, 40), torch.nan).bfloat16()})
    with pytest.raises(ValueError, match="is not finite"):
        adapter_image(Adapter(folder, RANK), SHAPES)


def test_a_truncated_weights_file_is_refused(save: Callable[..., Path]) -> None:
    folder = save()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or damaged"):
        Adapter(folder, RANK)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(save: Callable[..., Path], name: str) -> None:
    folder = save()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="is no regular file"):
        open_source(folder, RANK)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(.*)*x", "a*b*c*d*e*f", "[", "a**"])
def test_a_pattern_that_may_take_for_ever_is_refused(
    save: Callable[..., Path], pattern: str
) -> None:
    with pytest.raises(ValueError, match="alpha_pattern: the pattern"):
        Adapter(save({"alpha_pattern": {pattern: 4}}), RANK)


@pytest.mark.parametrize(
    "pattern", ["down_proj", r"model\.layers\.\d+\.mlp\.down_proj", ".*down_proj"]
)
def test_a_pattern_scales_the_modules_that_it_names(
    save: Callable[..., Path], pattern: str
) -> None:
    config = Adapter(save({"alpha_pattern": {pattern: 4}}), RANK).config
    assert config.scale("model.layers.0.mlp.down_proj", RANK) == 1.0
    assert config.scale("model.layers.0.self_attn.q_proj", RANK) == 2.0


def test_a_scale_that_overflows_never_reaches_an_image(save: Callable[..., Path]) -> None:
    adapter = Adapter(save({"lora_alpha": 1e40}, dtype=torch.float32), RANK)
    with pytest.raises(ValueError, match="is not finite"):
        adapter_image(adapter, SHAPES)


@pytest.mark.parametrize("shape", [(0, 40), (40,), (RANK, 40, 1)])
def test_factors_of_no_rank_or_of_other_dimensions_are_refused(
    save: Callable[..., Path], shape: tuple[int, ...]
) -> None:
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    folder = save(drop=name, extra={name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="which do not fit"):
        Adapter(folder, RANK)
