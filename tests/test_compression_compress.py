import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression import compress as compress_module
from deltamux.compression.architecture import Role
from deltamux.compression.artifact import Artifact
from deltamux.compression.checkpoint import open_checkpoint
from deltamux.compression.diff import compare
from deltamux.compression.reconstruct import merge

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]

# Compresses with flat input energies, so that it needs no model, and dies when it verifies.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from deltamux.compression import compress as module
from deltamux.compression.checkpoint import open_checkpoint
from deltamux.compression.recipe import Recipe

base, expert, output = sys.argv[1:]
pair = open_checkpoint(base), open_checkpoint(expert)
module.input_energy = lambda *_: {n: torch.ones(pair[0].shape(n)[-1]) for n in pair[0].files}
module._verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
module.compress(*pair, Path(output), Recipe(), calibration=[], held_out=[None], progress=False)
"""


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_artifact_lists_every_weight_that_needs_one(make_pair, make_artifact, model_type, tied):
    artifact = Artifact(make_artifact(model_type, tied))
    artifact.check_content()
    difference = compare(*(open_checkpoint(root) for root in make_pair(model_type, tied)))
    # Every weight of the expert differs; folded norms live on in the linears behind them.
    expected = {spec.name for spec in difference.specs} - difference.folded
    assert set(artifact.entries) == expected
    assert artifact.manifest.tied_embeddings is tied


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stored_errors_are_those_of_the_stored_deltas(make_pair, make_artifact, model_type):
    artifact = Artifact(make_artifact(model_type))
    difference = compare(*(open_checkpoint(root) for root in make_pair(model_type)))
    flat = {Role.EMBEDDING, Role.LM_HEAD}  # the linears' errors are weighted by their inputs
    for spec in difference.specs:
        if spec.role in flat:
            delta = difference.delta(spec)
            lost = (delta - artifact.quantized(spec.name).dequantize()).square().sum()
            found = artifact.entries[spec.name].error
            assert found == pytest.approx(float(lost / delta.square().sum()), rel=1e-4)
        elif spec.role is Role.LINEAR:
            assert 0 < artifact.entries[spec.name].error < 0.12


def test_folded_norms_are_named_by_the_linears_that_carry_them(make_artifact):
    entries = Artifact(make_artifact()).entries
    folded = {name.split(".layers.1.")[-1]: e.folded_norm for name, e in entries.items()}
    assert folded["self_attn.k_proj.weight"] == "model.layers.1.input_layernorm.weight"
    assert folded["mlp.up_proj.weight"] == "model.layers.1.post_attention_layernorm.weight"
    assert folded["mlp.down_proj.weight"] is None


def test_the_manifest_names_base_and_expert_and_hashes_every_base_tensor(make_pair, make_artifact):
    base, expert = make_pair()
    manifest = Artifact(make_artifact()).manifest
    checkpoint = open_checkpoint(base)
    assert manifest.base.source == str(base)
    assert manifest.expert == str(expert)
    assert manifest.base.sha256 == {name: checkpoint.sha256(name) for name in checkpoint.files}


def test_the_model_card_names_its_base(make_pair, make_artifact):
    card = (make_artifact() / "README.md").read_text()
    assert f"base_model: {make_pair()[0]}" in card
    assert "base_model_relation: quantized" in card


def test_verification_is_written_into_the_manifest(make_pair, compress_pair, tmp_path):
    root = compress_pair(*make_pair(), tmp_path / "artifact", verify=True)
    found = Artifact(root).manifest.verification
    assert found["tokens"] > 0
    assert found["nll_compressed"] > 0
    assert 0 < found["kl"] < found["kl_base"]


def test_without_held_out_text_nothing_is_verified(make_artifact):
    assert Artifact(make_artifact()).manifest.verification is None


def test_compressing_twice_writes_the_same_tensors(
    make_pair, make_artifact, compress_pair, tmp_path
):
    again = compress_pair(*make_pair(), tmp_path / "artifact")
    first = load_file(make_artifact() / "model.safetensors")
    second = load_file(again / "model.safetensors")
    assert second.keys() == first.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(make_pair, compress_pair, tmp_path, monkeypatch, error):
    def interrupt(*_):
        raise error

    monkeypatch.setattr(compress_module, "_verify", interrupt)
    with pytest.raises(error):
        compress_pair(*make_pair(), tmp_path / "artifact", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old_artifact(
    make_pair, make_artifact, compress_pair, tmp_path, monkeypatch
):
    old = shutil.copytree(make_artifact(), tmp_path / "artifact")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress_pair(*make_pair(), old, scheme="sign", verify=True, overwrite=True)
    Artifact(old).check_content()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_killed_run_leaves_nothing_under_the_final_name(make_pair, tmp_path):
    output = tmp_path / "artifact"
    command = [sys.executable, "-c", KILLED, *map(str, make_pair()), str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    # It was killed after the weights were written.
    assert len(list(tmp_path.glob(".artifact.*/artifact/model.safetensors"))) == 1


def test_an_existing_output_is_refused(make_pair, make_artifact, compress_pair, tmp_path):
    output = shutil.copytree(make_artifact(), tmp_path / "artifact")
    with pytest.raises(ValueError, match=r"exists already: .* or pass --overwrite"):
        compress_pair(*make_pair(), output)


def test_overwrite_replaces_an_artifact(make_pair, make_artifact, compress_pair, tmp_path):
    output = shutil.copytree(make_artifact(), tmp_path / "artifact")
    (output / "left-over").touch()
    compress_pair(*make_pair(), output, scheme="sign", overwrite=True)
    assert next(iter(Artifact(output).entries.values())).scheme == "int4"
    assert Artifact(output).entries["model.layers.0.mlp.up_proj.weight"].scheme == "sign"
    assert not (output / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_overwrite_does_not_replace_what_is_no_artifact(make_pair, compress_pair, tmp_path):
    base, expert = make_pair()
    copied = shutil.copytree(expert, tmp_path / "expert")
    with pytest.raises(ValueError, match="is not a compressed expert: it is not overwritten"):
        compress_pair(base, expert, copied, overwrite=True)
    assert (copied / "model.safetensors").is_file()


def test_missing_parents_of_the_output_are_made(make_pair, compress_pair, tmp_path):
    assert Artifact(compress_pair(*make_pair(), tmp_path / "a" / "b")).entries


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    make_pair, compress_pair, tmp_path
):
    base, expert = make_pair()
    copied = shutil.copytree(expert, tmp_path / "expert")
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(copied / "model.safetensors")
    weights[name][0, 0] = float("nan")
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name!r} holds NaN or infinity"):
        compress_pair(base, copied, tmp_path / "artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


@pytest.fixture(scope="module")
def unchanged(make_pair, compress_pair, tmp_path_factory):
    """The artifact of an expert that is its own base."""
    base = make_pair("qwen2")[0]
    output = tmp_path_factory.mktemp("unchanged") / "artifact"
    return base, compress_pair(base, base, output, verify=True)


def test_an_expert_equal_to_its_base_has_no_tensors(unchanged):
    artifact = Artifact(unchanged[1])
    artifact.check_content()
    assert artifact.entries == {}
    assert artifact.manifest.totals.bits_per_weight == 0


def test_an_expert_equal_to_its_base_has_lost_nothing(unchanged):
    verification = Artifact(unchanged[1]).manifest.verification
    assert verification["gain_kept"] == 1
    assert verification["kl"] == 0


def test_an_expert_equal_to_its_base_merges_back_to_the_base(unchanged, tmp_path):
    base = open_checkpoint(unchanged[0])
    merge(base, Artifact(unchanged[1]), tmp_path / "merged", progress=False)
    merged = open_checkpoint(tmp_path / "merged")
    assert set(merged.files) == set(base.files)
    assert all(torch.equal(merged.load(name), base.load(name)) for name in base.files)
