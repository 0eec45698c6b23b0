import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from deltamux.compression import compress as compress_module
from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.architecture import MODEL_TYPES, Role
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import compare
from deltamux.compression.choice import measure as measure_module
from deltamux.compression.choice import predict as predict_module
from deltamux.compression.choice.workspace import Workspace
from deltamux.compression.compress import compress
from deltamux.compression.recipe import AllocationRecipe, LinearRecipe, PruningRecipe, Recipe
from deltamux.compression.rounding.ladder import Linear
from deltamux.compression.streaming.moments import InputMoments
from deltamux.compression.streaming.text import Sample, random_samples

# Records and padding take most of a slot of matrices so small.
RECIPE = Recipe(allocation=AllocationRecipe(slot_bits=20.0))
CASES = [*((each, False) for each in MODEL_TYPES), ("llama", True), ("gemma2", True)]
TEXT = random_samples(272, count=4, length=24)

# Compresses on TEXT and dies in the middle of the third layer.
KILLED = """
import os, signal, sys
from pathlib import Path
from deltamux.compression.artifact.stored import Encoded
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.text import random_samples

def encode(spec, stored, **common):
    if spec.name == "model.layers.2.mlp.gate_proj.weight" and predicted.is_file() == measuring:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(spec, stored, **common)

whole, Encoded.of = Encoded.of, encode
base, expert, output = sys.argv[1:4]
predicted = Path(output).with_name(".artifact.partial") / "predicted-0002.json"
measuring = sys.argv[4] == "measuring"
pair = open_checkpoint(base), open_checkpoint(expert)
text = random_samples(272, count=4, length=24)
compress(*pair, Path(output), Recipe(), calibration=text, held_out=[], progress=False)
"""


def compress_on_text(base, expert, output, recipe=RECIPE, text=TEXT):
    pair = open_checkpoint(base), open_checkpoint(expert)
    compress(*pair, output, recipe, calibration=text, held_out=[], progress=False)


def interrupt(*_):
    raise KeyboardInterrupt


def measured_layers(monkeypatch):
    """The layers that are measured from now on."""
    layers = []
    measure_layer = measure_module.measure_layer

    def note(difference, recipe, specs, *args, **kwargs):
        layers.append(specs[0].layer)
        measure_layer(difference, recipe, specs, *args, **kwargs)

    monkeypatch.setattr(measure_module, "measure_layer", note)
    return layers


@pytest.mark.parametrize(("model_type", "tied"), CASES)
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
            lost = (delta - artifact.stored(spec.name).delta.dequantize()).square().sum()
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


def test_other_users_may_read_the_weights(make_pair, compress_pair, tmp_path):
    umask = os.umask(0o022)
    try:
        root = compress_pair(*make_pair(), tmp_path / "artifact")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((root / "model.safetensors").stat().st_mode) == 0o644


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
def test_an_interrupted_run_leaves_finished_layers_alone(
    make_pair, compress_pair, tmp_path, monkeypatch, error
):
    def fail(*_):
        raise error

    monkeypatch.setattr(compress_module, "finish_artifact", fail)
    with pytest.raises(error):
        compress_pair(*make_pair(), tmp_path / "artifact", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == [".artifact.partial"]


def test_an_interrupted_overwrite_keeps_the_old_artifact(
    make_pair, make_artifact, compress_pair, tmp_path, monkeypatch
):
    old = shutil.copytree(make_artifact(), tmp_path / "artifact")
    monkeypatch.setattr(compress_module, "finish_artifact", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress_pair(*make_pair(), old, scheme="sign", verify=True, overwrite=True)
    found = Artifact(old)
    found.check_content()
    assert found.entries["model.layers.0.mlp.up_proj.weight"].scheme == "int2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".artifact.partial", "artifact"]


@pytest.fixture(scope="module", params=["predicting", "measuring"])
def killed(request, checkpoints, tmp_path_factory):
    """(base, expert, output) of a run that was killed in its third layer."""
    root = tmp_path_factory.mktemp("killed")
    base = checkpoints.save_base(root / "base", num_hidden_layers=3)
    paths = base, checkpoints.save_expert(base, root / "expert"), root / "out" / "artifact"
    command = [sys.executable, "-c", KILLED, *map(str, paths), request.param]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return paths


def test_a_killed_run_leaves_nothing_under_the_final_name(killed, request):
    output = killed[-1]
    assert not output.exists()
    finished = {path.name for path in (output.parent / ".artifact.partial").glob("*-*.json")}
    if "predicting" in request.node.name:
        assert finished == {"predicted-0000.json", "predicted-0001.json"}
    else:
        predicted = {f"predicted-000{layer}.json" for layer in range(3)}
        assert finished == predicted | {"layer-0000.json", "layer-0001.json"}


def test_a_killed_run_goes_on_from_its_last_finished_layer(killed, tmp_path, monkeypatch):
    output = shutil.copytree(killed[-1].parent, tmp_path / "out") / "artifact"
    partial = output.with_name(".artifact.partial")
    written = {path: path.stat().st_mtime_ns for path in partial.glob("*-*")}
    assert len(written) in {2, 7}
    rewritten = []

    def clear(self):
        rewritten.extend(path for path in written if path.stat().st_mtime_ns != written[path])
        shutil.rmtree(self.root)

    monkeypatch.setattr(Workspace, "clear", clear)
    layers = measured_layers(monkeypatch)
    compress_on_text(*killed[:2], output)
    assert rewritten == []
    assert layers == ([0, 1, 2] if len(written) == 2 else [2])


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(killed, tmp_path):
    output = shutil.copytree(killed[-1].parent, tmp_path / "out") / "artifact"
    compress_on_text(*killed[:2], output)
    compress_on_text(*killed[:2], tmp_path / "whole")
    found, wanted = (load_file(p / "model.safetensors") for p in (output, tmp_path / "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_finished_run_removes_its_working_directory(killed, tmp_path):
    output = shutil.copytree(killed[-1].parent, tmp_path / "out") / "artifact"
    compress_on_text(*killed[:2], output)
    assert [path.name for path in output.parent.iterdir()] == ["artifact"]


@pytest.fixture
def interrupted(make_pair, tmp_path, monkeypatch):
    """Where a run was interrupted after its last layer, and the layers measured from now on."""
    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "finish_artifact", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress_on_text(*make_pair(), tmp_path / "artifact")
    return tmp_path / "artifact", measured_layers(monkeypatch)


def test_another_budget_predicts_nothing_again(make_pair, interrupted, monkeypatch):
    output, layers = interrupted
    recipe = Recipe(allocation=AllocationRecipe(bits=2.5, slot_bits=20.0))
    monkeypatch.setattr(predict_module, "predict_linear", interrupt)
    compress_on_text(*make_pair(), output, recipe)
    assert layers == [0, 1]
    assert 2 < Artifact(output).manifest.totals.bits_per_weight <= 2.5


def test_another_ladder_discards_finished_layers(make_pair, interrupted):
    output, layers = interrupted
    recipe = Recipe(linear=LinearRecipe(pruning=PruningRecipe()))
    compress_on_text(*make_pair(), output, recipe)
    assert layers == [0, 1]


def test_other_text_discards_finished_layers(make_pair, interrupted):
    output, layers = interrupted
    compress_on_text(*make_pair(), output, text=TEXT[:-1])
    assert layers == [0, 1]


def test_the_same_tokens_cut_elsewhere_discard_finished_layers(make_pair, interrupted):
    output, layers = interrupted
    joined = Sample(torch.cat([TEXT[0].ids, TEXT[1].ids]), 24)
    compress_on_text(*make_pair(), output, text=[joined, *TEXT[2:]])
    assert layers == [0, 1]


def test_another_expert_discards_finished_layers(make_pair, interrupted, checkpoints, tmp_path):
    output, layers = interrupted
    base = make_pair()[0]
    compress_on_text(base, checkpoints.save_expert(base, tmp_path / "other", seed=2), output)
    assert layers == [0, 1]


def test_another_version_of_deltamux_discards_finished_layers(make_pair, interrupted, monkeypatch):
    output, layers = interrupted
    monkeypatch.setattr(measure_module, "deltamux_version", lambda: "99")
    compress_on_text(*make_pair(), output)
    assert layers == [0, 1]


def test_an_existing_output_is_refused(make_pair, make_artifact, compress_pair, tmp_path):
    output = shutil.copytree(make_artifact(), tmp_path / "artifact")
    with pytest.raises(ValueError, match=r"exists already: .* or pass --overwrite"):
        compress_pair(*make_pair(), output)


def test_overwrite_replaces_an_artifact(make_pair, make_artifact, compress_pair, tmp_path):
    output = shutil.copytree(make_artifact(), tmp_path / "artifact")
    (output / "left-over").touch()
    compress_pair(*make_pair(), output, scheme="sign", overwrite=True)
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


def test_predicted_rungs_are_close_to_measured_ones(make_pair, tmp_path):
    difference = compare(*(open_checkpoint(root) for root in make_pair()))
    inputs = InputMoments(difference.expert, TEXT)
    predicted, measured = (
        look(difference, RECIPE, inputs, Workspace(tmp_path / look.__name__, {}), progress=False)
        for look in (predict_module.predict, measure_module.measure)
    )
    assert [ladder.name for ladder in predicted] == [ladder.name for ladder in measured]
    for found, wanted in zip(predicted, measured, strict=True):
        for entry, real in zip(found.entries, wanted.entries, strict=True):
            assert entry.shape == real.shape
            # Streams of some hundred bytes, most of them tables.
            assert entry.bytes == pytest.approx(real.bytes, rel=0.25, abs=200)


def test_what_lies_in_few_rows_is_predicted_from_all_of_them(make_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "SAMPLED_ROWS", 8)
    difference = compare(*(open_checkpoint(root) for root in make_pair()))
    spec = next(spec for spec in difference.specs if spec.name.endswith("0.mlp.up_proj.weight"))
    moments = dict(InputMoments(difference.expert, TEXT).of([0]))[0]
    linear = measure_module.changed_linears(difference, [spec], moments)[spec.name]
    few_NK = torch.zeros_like(linear.delta_NK)
    few_NK[3] = linear.delta_NK[3]
    few = Linear(few_NK, linear.moment_KK, linear.curvature)
    ladder = predict_module.predict_linear(spec, few)
    whole = measure_module.measure_linear(
        spec, measure_module.ways_of_steps(few, ladder.steps), None
    )
    real = {number: rung.entry for number, rung in whole}
    for step, entry in zip(ladder.steps, ladder.entries, strict=True):
        assert entry.error == pytest.approx(real[step].error, rel=1e-6)
