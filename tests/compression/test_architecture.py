"""What is found out about a model by asking its class."""

import pytest
import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.architecture import (
    MODEL_TYPES,
    Role,
    architecture,
    is_tied,
    tensor_specs,
)
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.image.source import open_source
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.moments import second_moments
from deltamux.compression.streaming.text import Sample

ATTENTION = {f"self_attn.{part}_proj": "self_attn.q_proj" for part in ("q", "k", "v")} | {
    "self_attn.o_proj": "self_attn.o_proj"
}
DENSE = ATTENTION | {
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
EXPERTS = {
    "qwen3_moe": "mlp.experts.{}.gate_proj mlp.experts.{}.up_proj mlp.experts.{}.down_proj",
    "mixtral": "block_sparse_moe.experts.{0}.w1 block_sparse_moe.experts.{0}.w3 "
    "block_sparse_moe.experts.{0}.w2",
}


def readers_of(model_type):
    """Linear → the first one that reads the same activations, in a layer."""
    if model_type == "phi3":
        fused = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        return {name: name for name in fused}
    if model_type not in EXPERTS:
        return DENSE
    found = dict(ATTENTION)
    for expert in range(4):
        gate, up, down = EXPERTS[model_type].replace("{}", "{0}").format(expert).split()
        found |= {gate: gate, up: gate, down: down}
    return found


def short(name, layer=1):
    return name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_linears_and_who_reads_the_same_are_found(make_pair, model_type):
    checkpoint = open_checkpoint(make_pair(model_type)[0])
    specs = tensor_specs(checkpoint.config, set(checkpoint.files))
    linears = {
        short(spec.name): short(spec.reader)
        for spec in specs
        if spec.layer == 1 and spec.role is Role.LINEAR
    }
    assert linears == readers_of(model_type)
    assert {spec.name for spec in specs} == set(checkpoint.files)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_gemma_s_norms_add_one_to_their_weight(make_pair, model_type):
    checkpoint = open_checkpoint(make_pair(model_type)[0])
    offsets = {
        spec.offset for spec in architecture(checkpoint.config).specs if spec.role is Role.NORM
    }
    assert offsets == ({1.0} if model_type.startswith("gemma") else {0.0})


@pytest.mark.parametrize("model_type", EXPERTS)
def test_what_reads_a_norm_in_a_mixture_includes_its_router(make_pair, model_type):
    checkpoint = open_checkpoint(make_pair(model_type)[0])
    specs = tensor_specs(checkpoint.config, set(checkpoint.files))
    norm = "model.layers.1.post_attention_layernorm.weight"
    reading = {short(spec.name): spec for spec in specs if spec.norm == norm}
    assert sum(spec.role is Role.ROUTER for spec in reading.values()) == 1
    assert len(reading) == 9
    assert not any(spec.served for spec in reading.values())


def test_a_default_that_a_configuration_leaves_out_counts():
    assert is_tied({"model_type": "gemma3_text"})
    assert not is_tied({"model_type": "llama"})
    assert is_tied({"model_type": "llama", "tie_word_embeddings": True})


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_mixture_is_compressed_and_refused_for_slots_by_name(make_artifact, model_type):
    root = make_artifact(model_type)
    artifact = Artifact(root)
    assert artifact.manifest.totals.slot_bytes is None
    for name, entry in artifact.entries.items():
        assert (entry.slot_bytes is None) == ("expert" in name or ".gate." in name)
    with pytest.raises(ValueError, match=r"of a mixture of experts, .*: `deltamux merge` it"):
        open_source(root, 64)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_that_no_token_was_sent_to_are_compressed_too(make_pair, tmp_path, model_type):
    pair = [open_checkpoint(root) for root in make_pair(model_type)]
    text = [Sample(torch.tensor([5]), 0)]
    _, moments = next(second_moments(pair[1], text))
    asked = {name for name, moment in moments.items() if "expert" in name and moment.any()}
    # Two of four experts see the token, each in three matrices.
    assert len(asked) == 6
    compress(*pair, tmp_path / "a", Recipe(), calibration=text, held_out=[], progress=False)
    artifact = Artifact(tmp_path / "a")
    # At one bit a matrix that says nothing may be left out; what is there is whole.
    for name, entry in artifact.entries.items():
        assert torch.isfinite(artifact.stored(name).dense(torch.zeros(entry.shape))).all()
