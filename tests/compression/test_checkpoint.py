import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression.checkpoint.checkpoint import open_checkpoint, resolve_directory


@pytest.fixture
def copied(make_pair, tmp_path):
    """A tied checkpoint that a test may damage."""
    return shutil.copytree(make_pair(tied=True)[0], tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def sharded(make_pair, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(make_pair()[0])
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


def test_a_sharded_checkpoint_equals_the_single_file(make_pair, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    whole, parts = open_checkpoint(make_pair()[0]), open_checkpoint(sharded)
    assert set(parts.files) == set(whole.files)
    for name in whole.files:
        assert parts.shape(name) == whole.shape(name)
        assert torch.equal(parts.load(name), whole.load(name))
        assert parts.sha256(name) == whole.sha256(name)


def test_bytes_of_a_sharded_checkpoint_count_every_shard_once(sharded):
    sizes = [path.stat().st_size for path in sharded.glob("*.safetensors")]
    assert open_checkpoint(sharded).tensor_bytes() == sum(sizes)


def test_total_bytes_count_weights_configuration_tokenizer_and_template(make_pair):
    root = make_pair()[0]
    assert open_checkpoint(root).total_bytes() == sum(p.stat().st_size for p in root.iterdir())


def test_a_missing_shard_is_named(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "checkpoint")
    gone = max(directory.glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        open_checkpoint(directory)


def test_a_truncated_file_is_named(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors' is truncated or damaged"):
        open_checkpoint(copied)


def test_a_truncated_shard_is_named_when_it_is_read(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "checkpoint")
    damaged = max(directory.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    checkpoint = open_checkpoint(directory)
    name = next(name for name, path in checkpoint.files.items() if path == damaged)
    with pytest.raises(ValueError, match=damaged.name):
        checkpoint.load(name)


def test_a_directory_without_configuration_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


def test_a_directory_without_weights_is_no_checkpoint(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(copied)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "one", "a/b/c"])
def test_what_is_neither_directory_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="neither a directory nor a hub id"):
        resolve_directory(source)


def test_a_missing_tensor_is_named(make_pair):
    with pytest.raises(ValueError, match=r"'no\.such\.weight' is missing"):
        open_checkpoint(make_pair()[0]).load("no.such.weight")


def test_a_shared_lm_head_that_was_written_twice_is_ignored(copied):
    weights = load_file(copied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, copied / "model.safetensors")
    checkpoint = open_checkpoint(copied)
    assert checkpoint.tied
    assert "lm_head.weight" not in checkpoint


def test_an_lm_head_of_its_own_is_not_tied(make_pair):
    checkpoint = open_checkpoint(make_pair(tied=False)[0])
    assert not checkpoint.tied
    assert "lm_head.weight" in checkpoint


def test_hashes_tell_values_dtype_and_shape_apart(copied):
    ones = torch.ones(4, 4)
    tensors = {
        "same": ones,
        "again": ones.clone(),
        "flat": torch.ones(16),
        "narrow": torch.ones(4, 4).bfloat16(),
        "other": ones * 2,
    }
    save_file(tensors, copied / "model.safetensors")
    checkpoint = open_checkpoint(copied)
    assert checkpoint.sha256("same") == checkpoint.sha256("again")
    assert len({checkpoint.sha256(name) for name in tensors}) == 4


def test_a_configuration_is_read_as_it_is(make_pair):
    root = make_pair()[0]
    assert open_checkpoint(root).config == json.loads((root / "config.json").read_text())
