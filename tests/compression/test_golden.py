"""Golden files of the artifact format: what an earlier version wrote must read the same for ever.

`golden/format_1` holds a base of one layer, its compressed expert, and the SHA-256 of the float32
bytes of everything read from it. Its matrices use every scheme of fixed width, a row bitmap,
dropped and salient channels; its expert has biases, a folded norm and a replaced one. `coded` and
`lossless` are of the same base: entropy codes, two factors, exact planes; so is `sketched`: factors
with a sketch of the inputs. A change of layout gets a new format version and a directory of its own:
these files are never written again.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltamux.compression.artifact.artifact import (
    SCHEME_BITS,
    Artifact,
    content_hash,
    encode_matrix,
)
from deltamux.compression.artifact.merge import check_base, reconstructed
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.quantize import Scheme

GOLDEN = Path(__file__).parent / "golden" / "format_1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CODED = json.loads((GOLDEN / "expected_coded.json").read_text())


@pytest.fixture(scope="module")
def artifact():
    return Artifact(GOLDEN / "artifact")


@pytest.fixture(scope="module")
def base():
    return open_checkpoint(GOLDEN / "base")


def float32_sha256(tensor):
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


def test_the_golden_artifact_is_intact(artifact):
    artifact.check_content()
    assert content_hash(artifact.root) == "cfb3fae96a366184"


def test_the_golden_artifact_has_every_scheme_and_every_kind_of_tensor(artifact):
    fixed_width = {*SCHEME_BITS, "ternary"}
    assert {entry.scheme for entry in artifact.entries.values()} == {*fixed_width, None}
    # Five levels, and the factors' 256, are stored under an entropy code only.
    assert set(Scheme) - fixed_width == {"quinary", "int8"}
    suffixes = {name.rsplit(".", 1)[1] for name in load_file(artifact.root / "model.safetensors")}
    assert suffixes == {
        "channels",
        "codes",
        "delta",
        "replacement",
        "rows",
        "salient_channels",
        "salient_values",
        "steps",
    }


def test_the_golden_artifact_lists_the_weights_that_were_stored(artifact):
    assert list(artifact.entries) == list(EXPECTED["stored"])


@pytest.mark.parametrize("name", EXPECTED["stored"])
def test_a_golden_weight_reads_to_the_same_bytes(artifact, name):
    if artifact.entries[name].scheme is None:
        found = artifact.vector(name)
    else:
        found = artifact.quantized(name).dequantize()
    assert float32_sha256(found) == EXPECTED["stored"][name]


@pytest.mark.parametrize("name", EXPECTED["weights"])
def test_a_golden_expert_is_rebuilt_to_the_same_bytes(artifact, base, name):
    found = reconstructed(artifact, base)(name)
    assert float32_sha256(found) == EXPECTED["weights"][name]


def test_golden_matrices_are_written_as_they_were(artifact):
    stored = load_file(artifact.root / "model.safetensors")
    matrices = [name for name, entry in artifact.entries.items() if entry.scheme]
    for name in matrices:
        written = encode_matrix(name, artifact.quantized(name))
        assert written.keys() == {key for key in stored if key.startswith(f"{name}.")}
        for key, tensor in written.items():
            assert tensor.dtype == stored[key].dtype, key
            assert torch.equal(tensor, stored[key]), key


def test_the_golden_base_has_the_hashes_of_the_manifest(artifact, base):
    check_base(artifact, base)


@pytest.mark.parametrize("name", CODED)
def test_golden_entropy_coded_artifacts_are_intact(name):
    artifact = Artifact(GOLDEN / name)
    artifact.check_content()
    assert content_hash(artifact.root) == CODED[name]["content"]


def test_the_golden_coded_artifacts_have_every_kind_of_tensor():
    suffixes = {
        key.split("weight.")[-1]
        for name in CODED
        for key in load_file(GOLDEN / name / "model.safetensors")
        if "weight." in key
    }
    assert suffixes == {
        "deflated",
        "exact",
        "inputs.deflated",
        "inputs.steps",
        "left.deflated",
        "left.steps",
        "right.deflated",
        "right.steps",
        "rows",
        "steps",
    }
    schemes = {entry.scheme for entry in Artifact(GOLDEN / "coded").entries.values()}
    assert schemes == {"int4", "quinary", "ternary", "int8", None}


@pytest.mark.parametrize("directory", ["coded", "sketched"])
def test_golden_codes_and_factors_read_to_the_same_bytes(directory):
    artifact = Artifact(GOLDEN / directory)
    found = {}
    for name, entry in artifact.entries.items():
        if entry.scheme is None:
            found[name] = artifact.vector(name)
            continue
        quantized = artifact.quantized(name)
        if isinstance(quantized, FactoredDelta):
            found[f"{name}.left"] = quantized.left.dequantize()
            found[f"{name}.right"] = quantized.right.dequantize()
            if quantized.inputs is not None:
                found[f"{name}.inputs"] = quantized.inputs.coded.dequantize()
        else:
            found[name] = quantized.dequantize()
    assert {key: float32_sha256(value) for key, value in found.items()} == CODED[directory][
        "stored"
    ]


@pytest.mark.parametrize("name", CODED)
def test_golden_coded_experts_are_rebuilt_to_the_same_bytes(base, name):
    load = reconstructed(Artifact(GOLDEN / name), base)
    expected = CODED[name]["weights"]
    assert len(expected) >= len(base.files) - 2  # a product of factors is not exact to the bit
    assert {key: float32_sha256(load(key)) for key in expected} == expected
