"""What `compress` makes of checkpoints and text that are out of the ordinary, end to end."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.architecture import Role
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.recipe import (
    PRESETS,
    AllocationRecipe,
    EmbeddingRecipe,
    LinearRecipe,
    Recipe,
)
from deltamux.compression.streaming.text import Sample, random_samples

TEXT = random_samples(272, count=6, length=32)
HELD_OUT = random_samples(272, count=10, length=32)[6:]
LINEAR = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"
# Records and padding take most of a slot of matrices so small.
WIDE_SLOT = 12.0
RECIPES = {
    "coded": PRESETS["faithful"].model_copy(
        update={"allocation": AllocationRecipe(bits=2.0, slot_bits=WIDE_SLOT)}
    ),
    "fixed": Recipe(linear=LinearRecipe(scheme="int4", salient_channels=4)),
    "nearest": Recipe(
        linear=LinearRecipe(scheme="int2", salient_channels=8, feedback=False),
        embedding=EmbeddingRecipe(scheme="int4"),
    ),
}


def run(base, expert, output, recipe=RECIPES["coded"], text=TEXT):
    pair = open_checkpoint(base), open_checkpoint(expert)
    compress(*pair, output, recipe, calibration=text, held_out=HELD_OUT, progress=False)
    artifact = Artifact(output)
    artifact.check_content()
    return artifact


def edit_weights(root, change):
    path = root / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def edit_config(root, **changes):
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_as(root, directory, dtype):
    """The same checkpoint with its weights in another dtype."""
    shutil.copytree(root, directory)
    edit_weights(
        directory,
        lambda weights: weights.update({n: weight.to(dtype) for n, weight in weights.items()}),
    )
    return directory


@pytest.fixture
def copies(make_pair, tmp_path):
    """A pair that a test may change: [base, expert]."""
    names = ("base", "expert")
    return [
        shutil.copytree(root, tmp_path / name)
        for root, name in zip(make_pair("qwen2"), names, strict=True)
    ]


def refused(pair, tmp_path, match):
    """That compressing is refused and leaves nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        run(*pair, tmp_path / "artifact")
    assert sorted(tmp_path.iterdir()) == before


def kept_most(artifact, share):
    """That of the base's divergence little is left."""
    found = artifact.manifest.verification
    assert all(math.isfinite(value) for value in found.values())
    assert found["kl"] < share * found["kl_base"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["base", "expert"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
        LINEAR,
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_name_and_place(
    copies, tmp_path, name, side, value
):
    edit_weights(copies[side], lambda weights: weights[name].view(-1)[7].fill_(value))
    refused(copies, tmp_path, f"{name!r} of '.*{copies[side].name}' holds NaN or infinity")


@pytest.mark.parametrize("side", [0, 1], ids=["base", "expert"])
def test_a_norm_that_is_not_finite_is_refused_by_name(copies, tmp_path, side):
    edit_weights(copies[side], lambda weights: weights[NORM][7].fill_(math.nan))
    refused(copies, tmp_path, f"{NORM!r}.* holds NaN or infinity")


def test_a_weight_that_is_infinite_in_both_is_refused(copies, tmp_path):
    for root in copies:
        edit_weights(root, lambda weights: weights[LINEAR][0, 0].fill_(math.inf))
    refused(copies, tmp_path, f"{LINEAR!r} of .* holds NaN or infinity")


def test_an_expert_that_overflows_is_refused_by_the_linear_it_first_happens_at(copies, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(copies[1], lambda weights: weights[name].mul_(1e30))
    with pytest.raises(ValueError, match=r"input of 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        run(*copies, tmp_path / "artifact")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_an_expert_equal_to_its_base_gives_a_tiny_artifact_that_lost_nothing(
    make_pair, tmp_path, recipe
):
    base = make_pair()[0]
    artifact = run(base, base, tmp_path / "artifact", recipe)
    assert artifact.entries == {}
    assert artifact.manifest.totals.weights_file_bytes < 200
    assert artifact.manifest.verification["gain_kept"] == 1
    assert artifact.manifest.verification["kl"] == 0


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_delta_larger_than_the_base_is_compressed(make_pair, checkpoints, tmp_path, recipe):
    base = make_pair()[0]
    expert = checkpoints.save_expert(base, tmp_path / "expert", scale=3.0)
    artifact = run(base, expert, tmp_path / "artifact", recipe)
    found = artifact.manifest.verification
    assert all(math.isfinite(value) for value in found.values())
    # Random weights of such a size amplify every error, but of the deltas no more than usual is lost.
    errors = [entry.error for entry in artifact.entries.values() if entry.role is Role.LINEAR]
    assert len(errors) == 14
    assert max(errors) < 0.3


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_fewer_tokens_than_channels_are_enough_to_compress(make_pair, tmp_path, recipe):
    text = random_samples(272, count=2, length=10)
    kept_most(run(*make_pair(), tmp_path / "artifact", recipe, text), 0.5)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_single_row_is_enough_to_compress(make_pair, tmp_path, recipe):
    kept_most(run(*make_pair(), tmp_path / "artifact", recipe, TEXT[:1]), 0.7)


def test_a_row_of_one_token_is_enough_to_compress(make_pair, tmp_path):
    artifact = run(*make_pair(), tmp_path / "artifact", text=[Sample(torch.tensor([5]), 0)])
    assert artifact.manifest.verification["kl"] < artifact.manifest.verification["kl_base"]


def test_no_text_is_refused(make_pair, tmp_path):
    with pytest.raises(ValueError, match="need at least one conversation: give calibration text"):
        run(*make_pair(), tmp_path / "artifact", text=[])


def test_a_delta_of_a_single_weight_is_compressed(make_pair, tmp_path):
    base = make_pair()[0]
    expert = shutil.copytree(base, tmp_path / "expert")
    edit_weights(expert, lambda weights: weights[LINEAR][3, 5].add_(2.0))
    artifact = run(base, expert, tmp_path / "artifact")
    (entry,) = artifact.entries.values()
    assert entry.name == LINEAR
    delta = artifact.stored(LINEAR).delta.dequantize()
    assert delta.any(dim=1).nonzero().tolist() == [[3]]
    assert delta[3].abs().argmax() == 5
    kept_most(artifact, 0.3)


@pytest.mark.parametrize("scale", [1e-12, 1e-30])
def test_a_delta_next_to_nothing_is_compressed_or_left_out(make_pair, tmp_path, scale):
    base = make_pair()[0]
    expert = shutil.copytree(base, tmp_path / "expert")
    # Beside zeros of the base, or float32 would round them away.
    for root in (base := shutil.copytree(base, tmp_path / "base"), expert):
        edit_weights(root, lambda weights: weights[LINEAR].zero_())
    edit_weights(expert, lambda weights: weights[LINEAR].normal_().mul_(scale))
    artifact = run(base, expert, tmp_path / "artifact")
    assert set(artifact.entries) <= {LINEAR}
    assert abs(artifact.manifest.verification["kl"]) < 1e-6


@pytest.mark.parametrize("side", [0, 1], ids=["base", "expert"])
@pytest.mark.parametrize(
    "name", [NORM, "model.layers.0.input_layernorm.weight", "model.norm.weight"]
)
def test_a_missing_norm_is_refused_by_name(copies, tmp_path, name, side):
    edit_weights(copies[side], lambda weights: weights.pop(name))
    refused(copies, tmp_path, f"{name!r} is missing from the checkpoint; save it whole")


def test_a_query_norm_that_only_the_base_has_is_refused_by_name(make_pair, tmp_path):
    base, expert = make_pair("qwen3")
    expert = shutil.copytree(expert, tmp_path / "expert")
    name = "model.layers.0.self_attn.q_norm.weight"
    edit_weights(expert, lambda weights: weights.pop(name))
    refused((base, expert), tmp_path, f"{name!r} is missing")


def test_an_untied_expert_of_a_tied_base_is_refused(make_pair, tmp_path):
    pair = make_pair(tied=True)[0], make_pair(tied=False)[1]
    refused(pair, tmp_path, "is tied to .* but not in .* save the base untied, with its")


def test_a_tied_expert_of_an_untied_base_is_compressed_and_merged_untied(make_pair, tmp_path):
    pair = make_pair(tied=False)[0], make_pair(tied=True)[1]
    artifact = run(*pair, tmp_path / "artifact")
    kept_most(artifact, 0.5)
    merge(open_checkpoint(pair[0]), artifact, tmp_path / "merged", progress=False)
    assert open_checkpoint(tmp_path / "merged").config["tie_word_embeddings"] is False
    assert "lm_head.weight" in open_checkpoint(tmp_path / "merged")


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=lambda pair: "-".join(str(dtype).removeprefix("torch.") for dtype in pair),
)
def test_every_mix_of_float_dtypes_is_compressed(make_pair, tmp_path, dtypes):
    names = ("base", "expert")
    pair = [
        save_as(root, tmp_path / name, dtype)
        for root, name, dtype in zip(make_pair("qwen2"), names, dtypes, strict=True)
    ]
    artifact = run(*pair, tmp_path / "artifact")
    kept_most(artifact, 0.5)
    norm = artifact.stored("model.norm.weight").weight_N
    assert torch.equal(norm, open_checkpoint(pair[1]).load("model.norm.weight").float())


def quantize_like_bitsandbytes(root):
    """int8 linears with a scale a row, as bitsandbytes' LLM.int8() saves them."""

    def change(weights):
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            scale = weights[name].abs().amax(dim=1)
            weights[name] = (weights[name] / scale.unsqueeze(1) * 127).round().to(torch.int8)
            weights[f"{name.removesuffix('weight')}SCB"] = scale
            weights[f"{name.removesuffix('weight')}weight_format"] = torch.tensor(0).to(torch.uint8)

    edit_weights(root, change)


@pytest.mark.parametrize("side", [0, 1], ids=["base", "expert"])
def test_an_eight_bit_checkpoint_is_refused_by_its_method(copies, tmp_path, side):
    quantize_like_bitsandbytes(copies[side])
    edit_config(
        copies[side], quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    )
    refused(
        copies,
        tmp_path,
        f"{copies[side].name}' is quantized by 'bitsandbytes' .* save it dequantized first and take "
        "the delta from that",
    )


def test_eight_bit_weights_without_a_method_are_refused_by_name(copies, tmp_path):
    quantize_like_bitsandbytes(copies[0])
    refused(
        copies,
        tmp_path,
        r"mlp\.down_proj\.weight' of .* is int8, no full-width float: save the checkpoint "
        "dequantized",
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused_by_name(copies, tmp_path, dtype):
    edit_weights(copies[0], lambda weights: weights.update({LINEAR: weights[LINEAR].to(dtype)}))
    name = str(dtype).removeprefix("torch.")
    refused(copies, tmp_path, f"{LINEAR!r} of .* is {name}, no full-width float: save")


def test_a_compressed_expert_is_refused_with_the_command_that_helps(make_pair, tmp_path):
    base, expert = make_pair()
    run(base, expert, tmp_path / "first")
    refused((base, tmp_path / "first"), tmp_path, "quantized by 'deltamux' .*: `deltamux merge` it")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_one_channel_a_thousand_times_the_rest_is_compressed(make_pair, tmp_path, recipe):
    base = make_pair()[0]
    expert = shutil.copytree(base, tmp_path / "expert")

    def tune(weights):
        for name, weight in weights.items():
            if name.endswith("_proj.weight"):
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
                noise[:, 7] *= 1000
                weight.add_(noise * 3e-4)

    edit_weights(expert, tune)
    artifact = run(base, expert, tmp_path / "artifact", recipe)
    assert {entry.role for entry in artifact.manifest.tensors} == {Role.LINEAR}
    kept_most(artifact, 0.35)


def test_a_merged_adapter_is_kept_as_factors_at_any_rate(make_pair, tmp_path):
    base, _ = make_pair()
    expert = shutil.copytree(base, tmp_path / "expert")
    generator = torch.Generator().manual_seed(0)

    def merge_adapter(weights):
        for name, weight in weights.items():
            if "_proj" in name:
                rows, columns = weight.shape
                left = torch.randn(rows, 1, generator=generator)
                adapter = 0.05 * left @ torch.randn(1, columns, generator=generator)
                weights[name] = (weight.float() + adapter).to(weight.dtype)

    edit_weights(expert, merge_adapter)
    for bits in (1.0, 4.0):
        recipe = Recipe(allocation=AllocationRecipe(bits=bits, slot_bits=WIDE_SLOT))
        artifact = run(base, expert, tmp_path / f"{bits}", recipe)
        factored = [entry for entry in artifact.entries.values() if entry.kind == "factored"]
        assert len(factored) > len(artifact.entries) / 2
        checked = artifact.manifest.verification
        assert checked["kl"] < 0.05 * checked["kl_base"]
