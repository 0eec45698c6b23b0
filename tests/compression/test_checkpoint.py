import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression.checkpoint.checkpoint import open_checkpoint


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


def test_a_left_over_index_is_passed_over_as_transformers_does(sharded, make_pair, tmp_path):
    directory = shutil.copytree(make_pair()[0], tmp_path / "checkpoint")
    shutil.copy(sharded / "model.safetensors.index.json", directory)
    assert set(open_checkpoint(directory).files.values()) == {directory / "model.safetensors"}


def test_part_of_the_older_shards_is_left_over_too(sharded, make_pair, tmp_path):
    directory = shutil.copytree(make_pair()[0], tmp_path / "checkpoint")
    shutil.copy(sharded / "model.safetensors.index.json", directory)
    shutil.copy(min(sharded.glob("model-*.safetensors")), directory)
    assert set(open_checkpoint(directory).files.values()) == {directory / "model.safetensors"}


def test_a_single_file_beside_whole_shards_is_refused(sharded, make_pair, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "checkpoint")
    shutil.copy(make_pair()[0] / "model.safetensors", directory)
    with pytest.raises(ValueError, match="of which one is left over from before: delete the older"):
        open_checkpoint(directory)


def test_an_index_of_the_single_file_is_no_second_one(make_pair, tmp_path):
    directory = shutil.copytree(make_pair()[0], tmp_path / "checkpoint")
    names = open_checkpoint(directory).files
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(directory).files == names


def test_shards_of_another_save_beside_those_of_the_index_are_passed_over(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "checkpoint")
    save_file({"left.over": torch.ones(2)}, directory / "model-00001-of-00099.safetensors")
    assert "left.over" not in open_checkpoint(directory)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3, None, ["a"]], ids=str)
def test_an_index_that_names_no_file_beside_it_is_refused(sharded, tmp_path, file):
    directory = shutil.copytree(sharded, tmp_path / "checkpoint")
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json' cannot be used"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("pytorch_model.bin", "but 'pytorch_model.bin': load it with transformers"),
        ("model.gguf", "but 'model.gguf': load it with transformers"),
        ("consolidated.safetensors", "but 'consolidated.safetensors': load it with transformers"),
        ("adapter_model.safetensors", "but a LoRA adapter: merge it into its base"),
        ("README.md", ": it has no weights"),
    ],
)
def test_weights_of_another_kind_are_named_with_the_way_out(copied, name, finding):
    (copied / "model.safetensors").unlink()
    (copied / name).touch()
    with pytest.raises(ValueError, match="neither") as caught:
        open_checkpoint(copied)
    assert finding in str(caught.value)


def test_an_adapter_is_told_to_need_no_compression(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA adapter, which needs no compression: name it"):
        open_checkpoint(tmp_path)


def test_the_folder_of_a_training_run_names_its_checkpoint(copied, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(copied, run / "checkpoint-20")
    with pytest.raises(ValueError, match="but its folder 'checkpoint-20' has one: name that one"):
        open_checkpoint(run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_nothing_is_told_with_its_target(copied, name):
    (copied / name).unlink()
    (copied / name).symlink_to("../blobs/abc")
    with pytest.raises(ValueError, match=rf"{name}' is a link to '\.\./blobs/abc', which is not"):
        open_checkpoint(copied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_told(copied, name):
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}' is no file: fetch or save"):
        open_checkpoint(copied)


def test_templates_beside_the_default_one_are_copied_along(copied, tmp_path):
    folder = copied / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "target").mkdir()
    open_checkpoint(copied).copy_side_files(tmp_path / "target")
    assert (tmp_path / "target" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert (tmp_path / "target" / "tokenizer.json").is_file()
