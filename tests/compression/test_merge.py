import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression.artifact import merge as merge_module
from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.architecture import MODEL_TYPES
from deltamux.compression.checkpoint.checkpoint import open_checkpoint

CASES = [
    *((each, False) for each in MODEL_TYPES),
    ("llama", True),
    ("gemma2", True),
    ("qwen3", True),
]
IDS = torch.arange(48).view(2, 24) * 5 % 272


def load_model(root):
    from transformers import AutoModelForCausalLM

    # Other kernels know no soft caps.
    return AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def logits(root):
    return load_model(root)(IDS).logits


def logits_by_hand(base, artifact, folder):
    """The base's model with each delta put in its place."""
    weights = load_file(base / "model.safetensors")
    for name, entry in artifact.entries.items():
        stored = artifact.stored(name)
        if entry.kind == "replacement":
            weights[name] = stored.weight_N
        elif entry.kind == "bias":
            weights[name] += stored.difference_N
        else:
            weights[name] += stored.delta.dequantize()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    shutil.copy(base / "config.json", folder)
    return logits(folder)


def merged(base, artifact_root, output, dtype=None):
    merge(open_checkpoint(base), Artifact(artifact_root), output, dtype, progress=False)
    return output


@pytest.mark.parametrize(("model_type", "tied"), CASES)
def test_a_merged_checkpoint_computes_base_plus_delta(
    make_pair, make_artifact, tmp_path, model_type, tied
):
    base, _ = make_pair(model_type, tied)
    root = make_artifact(model_type, tied)
    found = logits(merged(base, root, tmp_path / "merged"))
    # The same float32 weights in the same model.
    torch.testing.assert_close(
        found, logits_by_hand(base, Artifact(root), tmp_path / "hand"), rtol=0, atol=0
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "mixtral"])
def test_four_bits_are_nearer_to_the_expert_than_one(
    make_pair, make_artifact, tmp_path, model_type
):
    base, expert = make_pair(model_type)
    wanted = logits(expert)
    distance = {
        scheme: (
            logits(merged(base, make_artifact(model_type, False, scheme), tmp_path / scheme))
            - wanted
        ).norm()
        for scheme in ("sign", "int4")
    }
    assert distance["int4"] < distance["sign"]
    assert distance["int4"] < 0.5 * (logits(base) - wanted).norm()


def test_a_norm_that_cannot_be_folded_is_restored_exactly(checkpoints, compress_pair, tmp_path):
    base = checkpoints.save_base(tmp_path / "base")
    model = load_model(base)
    with torch.no_grad():
        norm = model.model.layers[0].input_layernorm.weight
        norm[3] = 0
        model.save_pretrained(base)
        norm.add_(0.5)
        model.save_pretrained(tmp_path / "expert")
    checkpoints.save_tokenizer(tmp_path / "expert")
    root = compress_pair(base, tmp_path / "expert", tmp_path / "artifact")
    assert list(Artifact(root).entries) == ["model.layers.0.input_layernorm.weight"]
    found = logits(merged(base, root, tmp_path / "merged"))
    torch.testing.assert_close(found, logits(tmp_path / "expert"), rtol=0, atol=0)


def test_a_folded_norm_alone_gives_the_expert_s_logits(checkpoints, compress_pair, tmp_path):
    base = checkpoints.save_base(tmp_path / "base")
    model = load_model(base)
    with torch.no_grad():
        # Doubling a norm doubles its linears' weights: a delta of the base's own size.
        model.model.layers[0].post_attention_layernorm.weight.mul_(2)
        model.save_pretrained(tmp_path / "expert")
    checkpoints.save_tokenizer(tmp_path / "expert")
    root = compress_pair(base, tmp_path / "expert", tmp_path / "artifact", salient_channels=64)
    assert {entry.folded_norm for entry in Artifact(root).entries.values()} == {
        "model.layers.0.post_attention_layernorm.weight"
    }
    wanted = logits(tmp_path / "expert")
    lost = (logits(merged(base, root, tmp_path / "merged")) - wanted).norm()
    # All channels have a bfloat16 part: what is lost is its rounding, 2^-9 of what codes leave.
    assert lost < 0.01 * (logits(base) - wanted).norm()


def test_a_sharded_merge_loads_in_transformers(make_pair, make_artifact, tmp_path, monkeypatch):
    base, _ = make_pair()
    whole = merged(base, make_artifact(), tmp_path / "whole")
    monkeypatch.setattr(merge_module, "SHARD_BYTES", 100_000)
    shards = merged(base, make_artifact(), tmp_path / "shards")
    sizes = [path.stat().st_size for path in shards.glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 110_000  # a header comes on top
    torch.testing.assert_close(logits(shards), logits(whole), rtol=0, atol=0)


def test_a_shard_index_sums_the_bytes_of_the_tensors(
    make_pair, make_artifact, tmp_path, monkeypatch
):
    base, _ = make_pair()
    monkeypatch.setattr(merge_module, "SHARD_BYTES", 100_000)
    root = merged(base, make_artifact(), tmp_path / "shards")
    index = json.loads((root / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(base)
    elements = sum(checkpoint.load(name).numel() for name in checkpoint.files)
    assert index["metadata"]["total_size"] == elements * 4
    assert set(index["weight_map"]) == set(checkpoint.files)


def test_a_merge_keeps_the_base_s_dtype(checkpoints, compress_pair, tmp_path):
    base = checkpoints.save_base(tmp_path / "base", dtype=torch.bfloat16)
    expert = checkpoints.save_expert(base, tmp_path / "expert")
    root = compress_pair(base, expert, tmp_path / "artifact")
    checkpoint = open_checkpoint(merged(base, root, tmp_path / "merged"))
    assert {checkpoint.load(name).dtype for name in checkpoint.files} == {torch.bfloat16}


def test_a_merge_writes_the_dtype_asked_for(make_pair, make_artifact, tmp_path):
    base, _ = make_pair()
    root = merged(base, make_artifact(), tmp_path / "merged", torch.bfloat16)
    checkpoint = open_checkpoint(root)
    assert {checkpoint.load(name).dtype for name in checkpoint.files} == {torch.bfloat16}
    assert checkpoint.config["dtype"] == "bfloat16"


def test_a_merged_checkpoint_is_an_ordinary_one(make_pair, make_artifact, tmp_path):
    base, expert = make_pair()
    root = merged(base, make_artifact(), tmp_path / "merged")
    assert {path.name for path in root.iterdir()} == {path.name for path in expert.iterdir()}
    config = json.loads((root / "config.json").read_text())
    assert config == json.loads((expert / "config.json").read_text())


def test_a_merge_into_something_that_exists_is_refused(make_pair, make_artifact, tmp_path):
    with pytest.raises(ValueError, match="exists already: name a new directory"):
        merged(make_pair()[0], make_artifact(), tmp_path)


def test_a_merge_with_another_base_is_refused(make_pair, make_artifact, tmp_path):
    with pytest.raises(ValueError, match="differs: use that base"):
        merged(make_pair()[1], make_artifact(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_of_altered_weights_is_refused(make_pair, make_artifact, tmp_path):
    root = shutil.copytree(make_artifact(), tmp_path / "artifact")
    path = root / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has SHA-256"):
        merged(make_pair()[0], root, tmp_path / "merged")


def test_an_interrupted_merge_leaves_nothing(make_pair, make_artifact, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "_write_side_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merged(make_pair()[0], make_artifact(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
