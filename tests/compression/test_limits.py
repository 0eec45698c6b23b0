import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.names import WEIGHTS_FILE
from deltamux.compression.recipe import PRESETS, load_recipe
from deltamux.serve.cli import app
from deltamux.serve.worker.host_cache import BaseHashes, open_expert


@pytest.fixture
def compress(make_pair, text_file, tmp_path):
    def run(*options, output=tmp_path / "artifact"):
        arguments = ["compress", *make_pair(), "-o", output, "--calibration", text_file, *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None:
            raise result.exception
        return Artifact(output)

    return run


def test_each_preset_takes_more_than_the_one_before(compress, tmp_path):
    found = [
        compress("--preset", preset, output=tmp_path / preset).manifest.totals
        for preset in ("small", "balanced", "faithful")
    ]
    bits = [totals.bits_per_weight for totals in found]
    assert bits == sorted(bits)
    for totals, preset in zip(found, PRESETS.values(), strict=True):
        assert totals.bits_per_weight <= preset.allocation.bits
        assert totals.slot_bits_per_weight <= preset.allocation.slot_bits


def test_bits_bound_the_linears_with_all_their_bytes(compress):
    artifact = compress("--bits", 1.5)
    totals = artifact.manifest.totals
    tensors = load_file(artifact.root / WEIGHTS_FILE)
    linear = sum(tensor.nbytes for name, tensor in tensors.items() if "_proj.weight." in name)
    assert totals.linear_bytes == linear
    assert 1.0 < linear * 8 / totals.linear_weights <= 1.5


def test_slot_bits_bound_the_linears_in_a_slot(compress):
    totals = compress("--bits", 3, "--slot-bits", 3).manifest.totals
    assert 2 < totals.slot_bits_per_weight <= 3


def test_a_budget_bounds_the_weights_file(compress):
    artifact = compress("--budget", "40kB")
    assert 20_000 < (artifact.root / WEIGHTS_FILE).stat().st_size <= 40_000


def test_a_target_is_met_on_the_held_out_text(compress):
    verification = compress("--target-kl", 0.1).manifest.verification
    assert 0.05 < verification["kl"] <= 0.1


def test_the_recipe_inside_repeats_the_compression(compress, tmp_path):
    first = compress("--preset", "small", "--bits", 0.8)
    kept = load_recipe(first.root / "recipe.yaml")
    assert kept.allocation.bits == 0.8
    again = compress("--recipe", first.root / "recipe.yaml", output=tmp_path / "again")
    one, other = (load_file(artifact.root / WEIGHTS_FILE) for artifact in (first, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "tiny"), "preset must be one of small, balanced, faithful, got 'tiny'"),
        (("--bits", 1, "--target-kl", 0.1), "one of bits, num_bytes and target_kl"),
        (("--budget", "lots"), "budget must be a size like 25MB or 24MiB, got 'lots'"),
        (("--budget", "100B"), "num_bytes must be at least"),
        (("--bits", 0), "greater than 0"),
        (("--slot-bits", 0), "greater than 0"),
        (("--slot-bits", 0.1), "slot_bits 0.1 cannot be kept: no less than 0.167"),
        (("--target-kl", 1e-12), "target_kl 1e-12 cannot be met"),
    ],
)
def test_limits_without_sense_are_refused(compress, options, message):
    with pytest.raises(ValueError, match=message):
        compress(*options)


def test_a_recipe_and_a_preset_together_are_refused(compress, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    with pytest.raises(ValueError, match="--recipe or --preset, not both"):
        compress("--recipe", recipe, "--preset", "small")


def test_a_fixed_width_leaves_nothing_to_allocate(compress, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("linear: {scheme: int2}")
    with pytest.raises(ValueError, match="the fixed width of 'int2' leaves nothing to allocate"):
        compress("--recipe", recipe, "--bits", 1)


def test_a_lossless_artifact_merges_into_the_expert_bit_for_bit(compress, make_pair, tmp_path):
    artifact = compress("--lossless")
    base, expert = make_pair()
    arguments = ["merge", base, artifact.root, "-o", tmp_path / "merged"]
    assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    merged, tuned = open_checkpoint(tmp_path / "merged"), open_checkpoint(expert)
    for name in tuned.files:
        assert torch.equal(merged.load(name), tuned.load(name))
    assert artifact.manifest.verification["kl"] == 0
    assert artifact.manifest.totals.weights_file_bytes < tuned.tensor_bytes()


def test_a_lossless_artifact_is_refused_where_slots_would_hold_it(compress, make_pair, tmp_path):
    artifact = compress("--lossless")
    hashes = BaseHashes(open_checkpoint(make_pair()[0]), tmp_path / "hashes.json")
    with pytest.raises(ValueError, match="compressed with --lossless, which no slot holds"):
        open_expert(str(artifact.root), hashes, max_rank=64)
