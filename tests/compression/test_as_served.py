"""Deltas from a base as a server has it that quantizes it."""

import pytest
import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.as_served import BaseQuantization, as_served
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.evaluate import evaluate
from deltamux.compression.recipe import AllocationRecipe, Recipe
from deltamux.compression.streaming.text import random_samples

FP8 = BaseQuantization.FP8_PER_CHANNEL
LINEAR = "model.layers.1.mlp.up_proj.weight"
TEXT = random_samples(272, count=8, length=24)


def recipe(quantization: BaseQuantization | None) -> Recipe:
    return Recipe(
        allocation=AllocationRecipe(bits=4.0, slot_bits=20.0), base_as_served=quantization
    )


def test_eight_bit_floats_keep_three_bits_behind_the_first():
    weight = torch.randn(16, 64).bfloat16()
    served = as_served(weight, FP8)
    assert served.dtype == torch.float32
    largest = weight.abs().amax(dim=1, keepdim=True)
    close = (served - weight.float()).abs() <= weight.float().abs() / 16 + 1e-5 * largest
    assert close.all()
    assert not torch.equal(served, weight.float())
    # A row's largest value is what its scale makes exact.
    torch.testing.assert_close(served.abs().amax(dim=1), largest[:, 0].float())
    assert not as_served(torch.zeros(2, 8), FP8).any()


def test_it_is_what_vllm_makes_of_a_weight():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.online import fp8

    weight = torch.randn(24, 96).bfloat16()
    scale = fp8._fp8_channel_scale(fp8.weight_amax(weight, dim=1, keepdim=True))
    theirs = fp8._fp8_quant_per_channel(weight, scale).float() * scale
    assert torch.equal(as_served(weight, FP8), theirs)


def test_linears_alone_are_read_so_and_hashes_are_of_what_is_stored(make_pair):
    stored = open_checkpoint(make_pair()[0])
    served = stored.as_served(FP8)
    for name in stored.files:
        same = torch.equal(served.load(name), stored.load(name))
        assert same == (not name.endswith("_proj.weight")), name
        assert served.sha256(name) == stored.sha256(name)


def test_a_delta_from_the_served_base_takes_back_what_its_quantization_lost(
    make_pair, checkpoints, tmp_path
):
    base = open_checkpoint(make_pair()[0])
    # A fine-tune is small beside what eight bits lose of the base.
    expert = open_checkpoint(checkpoints.save_expert(base.root, tmp_path / "tuned", scale=0.02))
    for name, quantization in (("plain", None), ("served", FP8)):
        compress(
            *(base, expert, tmp_path / name, recipe(quantization)),
            calibration=TEXT,
            held_out=TEXT,
            progress=False,
        )
    artifact = Artifact(tmp_path / "served")
    assert artifact.manifest.base.quantization == "fp8_per_channel"
    assert artifact.manifest.verification is not None
    found = evaluate(base, expert, artifact, TEXT, progress=False)
    assert found.kl == pytest.approx(artifact.manifest.verification["kl"], rel=1e-4)
    # What the other loses where the server quantizes its base.
    merge(base, Artifact(tmp_path / "plain"), tmp_path / "merged", progress=False)
    over = open_checkpoint(tmp_path / "merged").load(LINEAR)
    over = over - base.load(LINEAR) + base.as_served(FP8).load(LINEAR)
    merge(base, artifact, tmp_path / "merged-served", progress=False)
    taken_back = open_checkpoint(tmp_path / "merged-served").load(LINEAR)
    wanted = expert.load(LINEAR)
    assert (taken_back - wanted).norm() < 0.5 * (over - wanted).norm()


def test_lossless_is_refused_with_it():
    with pytest.raises(ValueError, match=r"lossless keeps bits .* drop base_as_served"):
        Recipe(lossless=True, base_as_served=FP8)
    with pytest.raises(ValueError, match="base_as_served"):
        Recipe(base_as_served="int9")
