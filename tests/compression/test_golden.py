"""Golden files of the artifact format: what an earlier version wrote must read the same for ever.

`golden/format_1` holds a base of one layer, compressed experts of it, and the SHA-256 of the float32 bytes of
everything read from them, and of their slot images. `artifact` has every scheme, a row bitmap, dropped and salient
channels, biases, a folded norm and a replaced one; `coded` has one step a matrix, and factors; `lossless` is exact. A
change of layout gets a new format version and a directory of its own: these files are never written again.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.manifest import content_hash
from deltamux.compression.artifact.merge import check_base, reconstructed
from deltamux.compression.checkpoint.architecture import tensor_specs
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.image.build import artifact_image
from deltamux.compression.rounding.quantize import Scheme

GOLDEN = Path(__file__).parent / "golden" / "format_1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
SERVABLE = [name for name in EXPECTED if "image" in EXPECTED[name]]


@pytest.fixture(scope="module")
def base():
    return open_checkpoint(GOLDEN / "base")


@pytest.fixture(scope="module", params=EXPECTED)
def golden(request):
    """(artifact, what is expected of it)."""
    return Artifact(GOLDEN / request.param), EXPECTED[request.param]


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def parts(name, stored):
    """What a stored weight holds, dense and by name."""
    if stored.kind == "factored":
        sides = {"left": stored.delta.left, "right": stored.delta.right}
        return {f"{name}.{side}": factor.dequantize() for side, factor in sides.items()}
    if stored.kind == "coded":
        return {name: stored.delta.dequantize()}
    if stored.kind == "replacement":
        return {name: stored.weight_N}
    return {name: stored.difference_N} if stored.kind == "bias" else {}


def test_golden_artifacts_are_intact(golden, base):
    artifact, expected = golden
    artifact.check_content()
    check_base(artifact, base)
    assert content_hash(artifact.root) == expected["content"]


def test_golden_artifacts_have_every_kind_every_scheme_and_every_tensor():
    entries, suffixes = [], set()
    for name in EXPECTED:
        artifact = Artifact(GOLDEN / name)
        entries += artifact.manifest.tensors
        for key in load_file(artifact.root / "model.safetensors"):
            suffixes.add(key.split("weight.")[-1].split("bias.")[-1])
    assert {entry.kind for entry in entries} == {
        "exact",
        "replacement",
        "bias",
        "coded",
        "factored",
    }
    schemes = {entry.scheme for entry in entries if entry.kind == "coded"}
    assert schemes == set(Scheme) - {Scheme.INT8}
    assert suffixes == {suffix for entry in entries for suffix in entry.forms()}
    assert suffixes >= {"rows", "channels", "salient_channels", "salient_values", "left.codes"}


def test_a_golden_weight_reads_to_the_same_bytes(golden):
    artifact, expected = golden
    found = {}
    for name, entry in artifact.entries.items():
        stored = artifact.stored(name)
        assert stored.kind == entry.kind
        found |= {key: sha256(value.float()) for key, value in parts(name, stored).items()}
    assert found == expected["stored"]


def test_a_golden_expert_is_rebuilt_to_the_same_bytes(golden, base):
    artifact, expected = golden
    load = reconstructed(artifact, base)
    factored = {entry.name for entry in artifact.manifest.tensors if entry.kind == "factored"}
    # A product of factors is not exact to the bit.
    assert expected["weights"].keys() == base.files.keys() - factored
    assert {name: sha256(load(name).float()) for name in expected["weights"]} == expected["weights"]


def test_golden_weights_are_written_as_they_were(golden):
    artifact, _ = golden
    stored = load_file(artifact.root / "model.safetensors")
    for name in artifact.entries:
        for suffix, tensor in artifact.stored(name).encode().items():
            assert tensor.dtype == stored[f"{name}.{suffix}"].dtype, suffix
            assert torch.equal(tensor, stored[f"{name}.{suffix}"]), suffix


@pytest.mark.parametrize("name", SERVABLE)
def test_a_golden_expert_has_the_same_slot_image(name, base):
    shapes = {
        spec.name: base.shape(spec.name) for spec in tensor_specs(base.config, set(base.files))
    }
    artifact = Artifact(GOLDEN / name)
    image = artifact_image(artifact, shapes)
    assert sha256(image) == EXPECTED[name]["image"]
    assert image.numel() == artifact.manifest.totals.slot_bytes
