import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deltamux.router.decide.artifact import load_artifact, save_artifact
from deltamux.router.decide.config import HeldOut, RouterConfig, Training
from deltamux.router.decide.router import Router
from deltamux.router.decide.tables import Tables

VOCAB, BUCKETS = 50, 64
METADATA = {"format": "deltamux-router"}


def make_config(**changes):
    fields = {
        "labels": ["general", "math", "sql"],
        "experts": {"general": None, "math": "math-v2", "sql": "sql"},
        "threshold": 0.6,
        "temperature": 0.8,
        "vocab_size": VOCAB,
        "buckets": BUCKETS,
        "prefix_tokens": 8,
        "suffix_tokens": 8,
        "tokenizer_sha256": "ab" * 32,
        "training": Training(
            prompts={"math": 5}, mix={"math": 1.0}, added=0, embedding=False, seed=0, keep=0.95
        ),
        "heldout": HeldOut(accuracy=1.0, macro_f1=1.0, ece=0.0, kept=1.0, n=5),
    }
    return RouterConfig(**(fields | changes))


def make_tables(num_domains=3):
    rng = np.random.default_rng(0)
    shapes = {
        "tokens": (VOCAB, num_domains),
        "pairs": (BUCKETS, num_domains),
        "bias": (num_domains,),
        "words": (VOCAB, num_domains),
        "trust": (VOCAB, 2),
    }
    return Tables(**{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})


@pytest.fixture
def artifact(tmp_path):
    directory = tmp_path / "router"
    save_artifact(directory, make_tables(), make_config(), b"{}")
    return directory


def edit_config(directory, **changes):
    path = directory / "router_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_is_read_back(artifact):
    config, tables = load_artifact(artifact)
    assert config == make_config()
    assert tables.meaning is None
    for name in ("tokens", "pairs", "bias", "words", "trust"):
        original = getattr(make_tables(), name)
        # float16 keeps 11 significant bits.
        np.testing.assert_allclose(getattr(tables, name), original, rtol=2**-11)


def test_wire_names_and_types_are_those_of_format_version_1(artifact):
    assert sorted(p.name for p in artifact.iterdir()) == [
        "router.safetensors",
        "router_config.json",
        "tokenizer.json",
    ]
    with safe_open(artifact / "router.safetensors", framework="numpy") as file:
        assert file.metadata() == METADATA
    arrays = load_file(artifact / "router.safetensors")
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "tokens": "float16",
        "pairs": "float16",
        "words": "float16",
        "trust": "float16",
        "bias": "float32",
    }


def test_an_earlier_router_is_replaced_and_nothing_is_left_beside(artifact):
    save_artifact(artifact, make_tables(), make_config(threshold=0.7), b"{}")
    assert load_artifact(artifact)[0].threshold == 0.7
    assert [p.name for p in artifact.parent.iterdir()] == ["router"]


def test_a_full_disk_is_told_with_the_path_and_the_bytes_needed_and_leaves_nothing(
    tmp_path, full_disk
):
    needed = r"cannot be written \(.*\); [\d,]+ bytes are needed"
    with pytest.raises(ValueError, match=needed), full_disk(100):
        save_artifact(tmp_path / "router", make_tables(), make_config(), b"{}")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    save_artifact(tmp_path / "empty", make_tables(), make_config(), b"{}")
    assert load_artifact(tmp_path / "empty")[0] == make_config()


@pytest.mark.parametrize("beside_a_router", [True, False])
def test_other_files_are_never_overwritten(artifact, tmp_path, beside_a_router):
    directory = artifact if beside_a_router else tmp_path / "thesis"
    directory.mkdir(exist_ok=True)
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="another directory"):
        save_artifact(directory, make_tables(), make_config(), b"{}")
    assert (directory / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_weights_that_float16_cannot_hold_are_not_written(tmp_path, bad):
    tables = make_tables()
    tables.tokens[3, 1] = bad
    with pytest.raises(ValueError, match="finite in float16"):
        save_artifact(tmp_path / "router", tables, make_config(), b"{}")
    assert not (tmp_path / "router").exists()


def test_a_router_without_words_and_trust_reads_its_wording_from_the_tokens(tmp_path):
    tables = replace(make_tables(), words=None, trust=None)
    save_artifact(tmp_path / "router", tables, make_config(), b"{}")
    _, read = load_artifact(tmp_path / "router")
    assert read.words is None
    assert read.strength(np.array([1, 2])) == 1.0


@pytest.mark.parametrize("missing", ["words", "trust"])
def test_words_without_trust_are_refused_and_trust_without_words(tmp_path, missing):
    save_artifact(
        tmp_path / "router", replace(make_tables(), **{missing: None}), make_config(), b"{}"
    )
    with pytest.raises(ValueError, match=f"'{missing}' must have shape.*no such tensor"):
        load_artifact(tmp_path / "router")


@pytest.mark.parametrize("field", ["format_version", "feature_version"])
def test_a_newer_version_is_refused_with_the_upgrade_command(artifact, field):
    edit_config(artifact, **{field: 2})
    with pytest.raises(ValueError, match=f"{field} 2.*pip install --upgrade deltamux"):
        load_artifact(artifact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"format": "other"}, "'format' must be"),
        ({"temperature": 0}, "temperature"),
        ({"threshold": 1.5}, "threshold"),
        ({"buckets": 63}, "power of two"),
        ({"experts": {"math": "math"}}, "every entry of 'labels'"),
        ({"experts": {"general": None, "math": None, "sql": None}}, "needs an expert"),
        ({"tokenizer_sha256": "short"}, "tokenizer_sha256"),
    ],
)
def test_a_configuration_that_breaks_the_schema_is_refused(artifact, changes, message):
    edit_config(artifact, **changes)
    with pytest.raises(ValueError, match=message):
        load_artifact(artifact)


def test_a_truncated_configuration_is_refused(artifact):
    path = artifact / "router_config.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_artifact(artifact)


@pytest.mark.parametrize("name", ["router_config.json", "router.safetensors"])
def test_a_missing_file_is_named(artifact, name):
    (artifact / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_artifact(artifact)


@pytest.mark.parametrize("length", [0, 20, 500])
def test_truncated_tables_are_refused(artifact, length):
    path = artifact / "router.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="damaged"):
        load_artifact(artifact)


def test_tables_of_another_shape_are_refused(artifact):
    edit_config(artifact, vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match=r"'tokens' must have shape \(51, 3\).*got \(50, 3\)"):
        load_artifact(artifact)


@pytest.mark.parametrize("name", ["tokens", "pairs", "bias"])
def test_a_table_that_is_missing_or_not_finite_is_refused(artifact, name):
    path = artifact / "router.safetensors"
    arrays = load_file(path)
    arrays[name].flat[0] = np.nan
    save_file(arrays, path, METADATA)
    with pytest.raises(ValueError, match=f"'{name}' is not finite"):
        load_artifact(artifact)
    del arrays[name]
    save_file(arrays, path, METADATA)
    with pytest.raises(ValueError, match=f"'{name}'.*no such tensor"):
        load_artifact(artifact)


def test_tables_of_another_format_are_refused(artifact):
    save_file({"tokens": np.zeros(1)}, artifact / "router.safetensors")
    with pytest.raises(ValueError, match="does not hold a router's tables"):
        load_artifact(artifact)


def test_a_router_refuses_another_tokenizer(artifact):
    assert Router.load(artifact, tokenizer_sha256="ab" * 32).labels == ["general", "math", "sql"]
    with pytest.raises(ValueError, match=r"fitted with the tokenizer abababababab, got cdcd"):
        Router.load(artifact, tokenizer_sha256="cd" * 32)
