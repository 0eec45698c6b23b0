import json
import os
import shutil
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.manifest import (
    content_hash,
    manifest_sha256,
    read_manifest,
)
from deltamux.compression.artifact.matrices import Coded, Factored, FactoredEntry
from deltamux.compression.artifact.merge import check_base, reconstructed
from deltamux.compression.artifact.stored import BiasDelta, Encoded, Replacement
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.files import MOST_SETTINGS_BYTES
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme

METADATA = {"format": "deltamux", "format_version": "1"}
LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copied(make_artifact, tmp_path):
    """An artifact that a test may damage."""
    return shutil.copytree(make_artifact("qwen2"), tmp_path / "artifact")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(root, change, metadata=METADATA):
    path = root / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata=metadata)


def write_weight(root, stored, name=LINEAR, role=Role.LINEAR):
    """An artifact of one weight, in the frame of another artifact."""
    encoded = Encoded.of(TensorSpec(name, role, layer=0), stored)
    save_file(encoded.named_tensors(), root / "model.safetensors", metadata=METADATA)
    edit_json(root / "delta_config.json", tensors=[encoded.entry.model_dump(mode="json")])


SCHEMES = [scheme for scheme in Scheme if scheme is not Scheme.INT8]


def random_matrix(scheme=Scheme.INT4, everything=False):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 7) if everything else (10, 33)
    return QuantizedDelta(
        scheme,
        (10, 33),
        torch.randint(scheme.levels, shape, generator=generator, dtype=torch.uint8),
        torch.rand(shape[0], generator=generator).bfloat16(),
        rows_R=torch.tensor([0, 4, 9]) if everything else None,
        channels_C=torch.tensor([0, 1, 5, 8, 30, 31, 32]) if everything else None,
        salient_channels_S=torch.tensor([2, 31]) if everything else None,
        salient_values_NS=(
            torch.randn(10, 2, generator=generator).bfloat16() if everything else None
        ),
    )


@pytest.mark.parametrize("everything", [False, True], ids=["codes", "all-parts"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_is_read_back_as_it_was_written(copied, scheme, everything):
    quantized = random_matrix(scheme, everything)
    write_weight(copied, Coded(quantized))
    found = Artifact(copied).stored(LINEAR).delta
    for field, value in vars(quantized).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, field), value), field
            assert getattr(found, field).dtype == value.dtype, field
        else:
            assert getattr(found, field) == value, field


def random_factor(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    steps = torch.rand(rows, generator=generator).bfloat16()
    return QuantizedDelta(Scheme.INT8, (rows, columns), codes, steps)


def random_product():
    return FactoredDelta(random_factor(10, 3, 0), random_factor(3, 33, 1))


def test_a_product_of_factors_is_read_back_as_it_was_written(copied):
    product = random_product()
    write_weight(copied, Factored(product))
    found = Artifact(copied).stored(LINEAR).delta
    assert (found.shape, found.rank) == ((10, 33), 3)
    assert torch.equal(found.dequantize(), product.dequantize())


@pytest.mark.parametrize("suffix", ["left.codes", "left.steps", "right.codes", "right.steps"])
def test_a_missing_factor_is_named(copied, suffix):
    write_weight(copied, Factored(random_product()))
    edit_weights(copied, lambda weights: weights.pop(f"{LINEAR}.{suffix}"))
    with pytest.raises(ValueError, match=rf"{LINEAR!r} but holds no {suffix} for it"):
        Artifact(copied)


def damaged(root, match):
    """That a weight is refused when it is read."""
    with pytest.raises(ValueError, match=match):
        Artifact(root).stored(LINEAR)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize(
    ("stored", "suffix"),
    [
        (Coded(random_matrix()), "steps"),
        (Coded(random_matrix(everything=True)), "salient_values"),
        (Factored(random_product()), "left.steps"),
        (Factored(random_product()), "right.steps"),
    ],
    ids=["steps", "salient", "left", "right"],
)
def test_what_would_not_be_finite_is_refused(copied, stored, suffix, value):
    if suffix == "salient_values" and value == 3e38:
        pytest.skip("finite on its own")
    write_weight(copied, stored)
    edit_weights(copied, lambda weights: weights[f"{LINEAR}.{suffix}"].view(-1)[1].fill_(value))
    damaged(copied, f"{LINEAR!r} holds NaN or infinity: copy or compress")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stored", "role", "suffix"),
    [
        (Replacement(torch.ones(5)), Role.NORM, "replacement"),
        (BiasDelta(torch.ones(5)), Role.BIAS, "difference"),
    ],
)
def test_vectors_that_are_not_finite_are_refused(copied, stored, role, suffix, value):
    write_weight(copied, stored, role=role)
    edit_weights(copied, lambda weights: weights[f"{LINEAR}.{suffix}"][3].fill_(value))
    damaged(copied, f"{LINEAR!r} holds NaN or infinity")


@pytest.mark.parametrize(
    ("suffix", "indices"),
    [
        ("channels", [0, 1, 5, 8, 30, 31, 33]),
        ("channels", [-1, 1, 5, 8, 30, 31, 32]),
        ("channels", [0, 1, 1, 8, 30, 31, 32]),
        ("salient_channels", [31, 2]),
        ("salient_channels", [2, 33]),
    ],
)
def test_indices_outside_of_the_matrix_or_out_of_order_are_refused(copied, suffix, indices):
    write_weight(copied, Coded(random_matrix(everything=True)))
    changed = torch.tensor(indices, dtype=torch.int32)
    edit_weights(copied, lambda weights: weights[f"{LINEAR}.{suffix}"].copy_(changed))
    damaged(copied, f"{LINEAR!r} has indices that do not ascend from 0 to 32")


@pytest.mark.parametrize("bitmap", [[0b11, 0], [0xFF, 0xFF], [0b11, 0b1000]])
def test_a_bitmap_of_other_rows_than_have_codes_is_refused(copied, bitmap):
    write_weight(copied, Coded(random_matrix(everything=True)))
    changed = torch.tensor(bitmap, dtype=torch.uint8)
    edit_weights(copied, lambda weights: weights[f"{LINEAR}.rows"].copy_(changed))
    damaged(copied, f"{LINEAR!r} (marks|has indices)")


def edit_entry(root, **changes):
    path = root / "delta_config.json"
    manifest = json.loads(path.read_text())
    next(entry for entry in manifest["tensors"] if entry["name"] == LINEAR).update(changes)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 9},
        {"channels": 32},
        {"salient": 1},
        {"shape": [11, 33], "rows": 11},
        {"bytes": 0},
        {"bytes": 10**12},
    ],
    ids=str,
)
def test_an_entry_that_does_not_fit_its_tensors_is_refused_from_headers_alone(copied, changes):
    write_weight(copied, Coded(random_matrix()))
    edit_entry(copied, **changes)
    with pytest.raises(ValueError, match="copy or compress the expert again"):
        Artifact(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [0, 33]},
        {"shape": [-10, 33]},
        {"shape": [10]},
        {"rows": 11},
        {"channels": 34},
        {"scheme": "int8"},
        {"error": float("nan")},
        {"kind": "other"},
        {"kind": "factored"},
        {"rank": 2},
        {"name": 3},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_no_manifest(copied, changes):
    write_weight(copied, Coded(random_matrix()))
    edit_entry(copied, **changes)
    with pytest.raises(ValueError, match="is not a manifest"):
        Artifact(copied)


def test_a_shape_far_larger_than_the_stream_allocates_nothing(copied):
    write_weight(copied, Coded(random_matrix()))
    edit_entry(copied, shape=[10, 10**9], channels=10**9)
    damaged(copied, "a stream of codes is damaged")


def test_a_tensor_that_no_weight_claims_is_refused(copied):
    edit_weights(copied, lambda weights: weights.update({"left.over": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"holds 'left\.over', which its manifest does not list"):
        Artifact(copied)


def test_a_weight_that_the_manifest_lists_twice_is_refused(copied):
    path = copied / "delta_config.json"
    manifest = json.loads(path.read_text())
    edit_json(path, tensors=[*manifest["tensors"], manifest["tensors"][0]])
    with pytest.raises(ValueError, match="lists a weight twice"):
        Artifact(copied)


@pytest.mark.parametrize("key", ["expert", "deltamux_version"])
def test_an_altered_manifest_is_found(copied, key):
    edit_json(copied / "delta_config.json", **{key: "other"})
    with pytest.raises(ValueError, match=r"delta_config\.json' was altered"):
        Artifact(copied).check_content()


def test_the_manifest_s_hash_is_of_all_the_rest(copied):
    content = json.loads((copied / "delta_config.json").read_text())
    assert (
        content["sha256"] == manifest_sha256(content) == manifest_sha256(content | {"sha256": ""})
    )


def test_a_manifest_too_large_to_be_one_is_not_read(copied):
    with (copied / "delta_config.json").open("a") as file:
        file.write(" " * MOST_SETTINGS_BYTES)
    with pytest.raises(ValueError, match=r"is not a manifest: .* has [\d,]+ bytes"):
        Artifact(copied)


def test_a_pipe_in_place_of_the_weights_is_refused_at_once(copied):
    (copied / "model.safetensors").unlink()
    os.mkfifo(copied / "model.safetensors")
    with pytest.raises(ValueError, match="is no regular file"):
        Artifact(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "delta_config.json"])
def test_a_device_or_a_directory_in_place_of_a_file_is_refused(copied, name):
    (copied / name).unlink()
    (copied / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is no regular file"):
        Artifact(copied)
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(ValueError, match="is no regular file"):
        Artifact(copied)


def test_weights_of_another_size_than_the_manifest_says_are_not_hashed(copied):
    content = json.loads((copied / "delta_config.json").read_text())
    content["totals"]["weights_file_bytes"] += 8
    content["sha256"] = manifest_sha256(content)
    edit_json(copied / "delta_config.json", **content)
    with pytest.raises(ValueError, match=r"bytes of weights, its manifest says"):
        Artifact(copied).check_content()


def test_what_is_no_directory_says_how_a_hub_s_expert_is_fetched():
    with pytest.raises(ValueError, match=r"'org/math-delta' is no directory: .*hf download"):
        Artifact("org/math-delta")


def test_every_kind_rebuilds_its_weight(make_pair, make_artifact):
    base = open_checkpoint(make_pair("qwen2")[0])
    artifact = Artifact(make_artifact("qwen2"))
    load = reconstructed(artifact, base)
    for name, entry in artifact.entries.items():
        stored, before = artifact.stored(name), base.load(name)
        assert load(name).shape == entry.shape
        if entry.kind == "coded":
            assert torch.equal(load(name), before + stored.delta.dequantize())


def test_norms_are_stored_as_the_expert_s_own_and_biases_as_differences(make_pair, make_artifact):
    base, expert = (open_checkpoint(root) for root in make_pair("qwen2"))
    artifact = Artifact(make_artifact("qwen2"))
    norm = "model.norm.weight"
    bias = "model.layers.1.self_attn.k_proj.bias"
    assert torch.equal(artifact.stored(norm).weight_N, expert.load(norm))
    difference = artifact.stored(bias).difference_N
    assert torch.equal(difference, expert.load(bias) - base.load(bias))


@pytest.mark.parametrize("version", [2, 10])
def test_a_newer_manifest_is_refused_with_the_command_that_helps(copied, version):
    edit_json(copied / "delta_config.json", format_version=version, of_the_future=True)
    with pytest.raises(ValueError, match=f"format_version {version}, .* pip install --upgrade"):
        Artifact(copied)


def test_a_newer_weights_file_is_refused_with_the_command_that_helps(copied):
    edit_weights(copied, lambda weights: None, METADATA | {"format_version": "2"})
    with pytest.raises(ValueError, match=r"safetensors' has format_version 2, .* pip install"):
        Artifact(copied)


def test_truncated_weights_are_refused(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors' is truncated or damaged"):
        Artifact(copied)


def test_missing_weights_are_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors' is missing"):
        Artifact(copied)


def test_another_safetensors_file_is_refused(copied):
    edit_weights(copied, lambda weights: None, {"format": "pt"})
    with pytest.raises(ValueError, match="is not a deltamux artifact"):
        Artifact(copied)


def test_an_altered_byte_is_found(copied):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"has SHA-256 .* its manifest says"):
        Artifact(copied).check_content()


def test_untouched_content_passes(copied):
    Artifact(copied).check_content()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (LINEAR, "codes"),
        (LINEAR, "steps"),
        (LINEAR, "salient_channels"),
        (LINEAR, "salient_values"),
        ("model.norm.weight", "replacement"),
        ("model.layers.0.self_attn.q_proj.bias", "difference"),
    ],
)
def test_a_missing_tensor_is_named(copied, name, suffix):
    edit_weights(copied, lambda weights: weights.pop(f"{name}.{suffix}"))
    with pytest.raises(ValueError, match=f"lists {name!r} but holds no {suffix} for it"):
        Artifact(copied)


@pytest.mark.parametrize(
    ("suffix", "changes"), [("rows", {"rows": 3}), ("channels", {"channels": 1})]
)
def test_a_missing_index_is_named(copied, suffix, changes):
    edit_entry(copied, **changes)
    with pytest.raises(ValueError, match=f"holds no {suffix} for it|is not what its manifest says"):
        Artifact(copied)


def test_a_directory_without_manifest_is_no_artifact(make_pair):
    with pytest.raises(ValueError, match=r"has no delta_config\.json"):
        Artifact(make_pair()[0])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "other"}'])
def test_what_is_not_a_manifest_is_refused(copied, content):
    (copied / "delta_config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a manifest"):
        Artifact(copied)


def test_an_unknown_key_of_the_manifest_is_refused(copied):
    edit_json(copied / "delta_config.json", surprise=1)
    with pytest.raises(ValueError, match="surprise"):
        read_manifest(copied)


def test_the_own_base_is_accepted(make_pair, make_artifact):
    check_base(Artifact(make_artifact("qwen2")), open_checkpoint(make_pair("qwen2")[0]))


def test_a_base_with_one_other_value_is_refused_by_the_tensor_s_name(
    make_pair, make_artifact, tmp_path
):
    root = shutil.copytree(make_pair("qwen2")[0], tmp_path / "base")
    weights = load_file(root / "model.safetensors")
    weights[LINEAR][0, 0] += 1
    save_file(weights, root / "model.safetensors")
    with pytest.raises(ValueError, match=f"{LINEAR!r} of .* differs: use that base"):
        check_base(Artifact(make_artifact("qwen2")), open_checkpoint(root))


def test_a_manifest_without_all_of_the_base_s_hashes_is_refused(copied, make_pair):
    path = copied / "delta_config.json"
    identity = json.loads(path.read_text())["base"]
    for sha256 in ({}, {name: each for name, each in identity["sha256"].items() if name != LINEAR}):
        edit_json(path, base=identity | {"sha256": sha256})
        with pytest.raises(ValueError, match="differs: use that base"):
            check_base(Artifact(copied), open_checkpoint(make_pair("qwen2")[0]))


def test_a_base_of_another_architecture_is_refused(make_pair, make_artifact):
    with pytest.raises(ValueError, match="differs: use that base"):
        check_base(Artifact(make_artifact("qwen2")), open_checkpoint(make_pair("llama")[0]))


def test_the_base_s_hashes_may_come_from_the_caller(make_pair, make_artifact):
    asked = []

    def sha256(name):
        asked.append(name)
        return artifact.manifest.base.sha256[name]

    artifact = Artifact(make_artifact("qwen2"))
    base = open_checkpoint(make_pair("qwen2")[0])
    check_base(artifact, base, sha256)
    assert set(asked) == set(base.files)


def test_the_configuration_names_the_quantization_method(make_artifact):
    config = json.loads((make_artifact() / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "deltamux", "format_version": 1}


def test_the_weights_file_names_format_and_version(make_artifact):
    with safe_open(make_artifact() / "model.safetensors", framework="pt") as file:
        assert file.metadata() == METADATA


def test_files_are_safetensors_text_and_json_only(make_artifact):
    files = sorted(path.name for path in make_artifact().iterdir())
    assert files == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "delta_config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    # What torch.save writes is a zip archive with a pickle inside.
    assert not any(zipfile.is_zipfile(path) for path in make_artifact().iterdir())


def test_total_bytes_are_the_sizes_on_disk(make_artifact):
    artifact = Artifact(make_artifact())
    sizes = {path.name: path.stat().st_size for path in artifact.root.iterdir()}
    assert artifact.total_bytes() == sum(sizes.values())
    assert artifact.manifest.totals.weights_file_bytes == sizes["model.safetensors"]


@pytest.mark.parametrize("scheme", ["sign", "ternary", "int2", "int3", "int4"])
def test_bits_per_weight_count_every_stored_byte_of_the_linears(make_pair, make_artifact, scheme):
    root = make_artifact("qwen2", scheme=scheme)
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes(make_pair("qwen2")[0]).items()
        if name.endswith("_proj.weight")
    }
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in load_file(root / "model.safetensors").items()
        if name.split(".weight.")[0] in linears and ".weight." in name
    )
    weights = sum(rows * columns for rows, columns in linears.values())
    totals = Artifact(root).manifest.totals
    assert totals.linear_weights == weights
    assert totals.linear_bytes == stored
    assert totals.bits_per_weight == stored * 8 / weights


def shapes(root):
    return {name: tensor.shape for name, tensor in load_file(root / "model.safetensors").items()}


def test_bytes_of_all_weights_add_up_to_the_stored_tensors(make_artifact):
    manifest = Artifact(make_artifact("qwen2")).manifest
    tensors = load_file(make_artifact("qwen2") / "model.safetensors").values()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    totals = manifest.totals
    assert sum(entry.bytes for entry in manifest.tensors) == stored
    assert totals.linear_bytes + totals.embedding_bytes + totals.other_bytes == stored


def test_the_content_hash_is_stable_and_follows_the_weights(copied, make_artifact):
    before = content_hash(copied)
    assert before == content_hash(make_artifact("qwen2"))
    assert len(before) == 16
    edit_json(copied / "delta_config.json", weights_sha256="0" * 64)
    assert content_hash(copied) != before


def test_a_rank_larger_than_the_matrix_is_refused_before_anything_is_unpacked():
    entry = {"name": LINEAR, "role": "linear", "shape": (96, 128), "bytes": 1}
    assert FactoredEntry.model_validate(entry | {"rank": 96}).rank == 96
    with pytest.raises(ValueError, match="rank 97, more than the matrix itself"):
        FactoredEntry.model_validate(entry | {"rank": 97})
