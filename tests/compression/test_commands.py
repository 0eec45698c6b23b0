import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.streaming.rows import drawn, read_rows
from deltamux.serve.cli import app

EVALUATION = [
    "nll_base",
    "nll_expert",
    "nll_compressed",
    "gain_kept",
    "kl",
    "kl_base",
    "top1_agreement",
    "exact_match",
    "exact_match_expert",
    "bits_per_weight",
    "bytes",
    "bytes_full",
    "slot_bits_per_weight",
    "slot_bits_overall",
]
RECIPE = """
linear: {scheme: int2, salient_channels: 8, feedback: false}
embedding: {scheme: int4}
"""
TOTALS = [
    "linear_weights",
    "linear_bytes",
    "bits_per_weight",
    "embedding_bytes",
    "other_bytes",
    "weights_file_bytes",
    "expert_bytes",
    "slot_bytes",
    "slot_bits_per_weight",
    "slot_bits_overall",
]


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run_well(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*args):
    """What `main` prints behind `error:`."""
    result = run(*args)
    assert isinstance(result.exception, ValueError)
    return str(result.exception)


@pytest.fixture(scope="module")
def compressed(make_pair, text_file, tmp_path_factory):
    """(artifact, what the command printed)."""
    root = tmp_path_factory.mktemp("commands")
    (root / "recipe.yaml").write_text(RECIPE)
    texts = ("--calibration", text_file, "--recipe", root / "recipe.yaml")
    printed = run_well("compress", *make_pair(), "-o", root / "artifact", *texts, "--json")
    return root / "artifact", printed


def test_compress_prints_one_json_line_of_totals_and_verification(compressed):
    output, printed = compressed
    manifest = Artifact(output).manifest
    assert printed.count("\n") == 1
    found = json.loads(printed)
    text = found.pop("text")
    assert found == manifest.totals.model_dump() | manifest.verification
    assert text["calibration"]["used"] == 11
    assert text["held out"]["used"] == 1
    assert text["held out"]["response_tokens"] == manifest.verification["tokens"]


def test_compress_sets_an_eighth_of_the_rows_aside_to_verify_on(compressed):
    # One of the twelve rows: "the sum is 3, done" in bytes and the end mark, or a digit more.
    assert Artifact(compressed[0]).manifest.verification["tokens"] in (19, 20)


def test_compress_ends_with_a_report_of_rows_tokens_template_and_assumptions(
    make_pair, text_file, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    long = json.dumps({"prompt": "long " * 200, "response": "b"})
    rows.write_text(text_file.read_text() + long + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "calibration: {max_tokens: 64}")
    command = ("compress", *make_pair(), "-o", tmp_path / "a", "--recipe", recipe)
    held_out = ("--held-out", text_file)
    first, second, *report = run_well(*command, "--calibration", rows, *held_out).splitlines()
    assert re.search(r"a: .* MB -> .* bits per linear weight", first)
    assert re.fullmatch(
        rf"calibration: 13 of 13 rows of {rows}, \d+ tokens, \d+ of them in responses", second
    )
    assert report[0] == f"  cut to the limit: 1 row ({rows}:13)"
    assert report[1].startswith(f"held out: 12 of 12 rows of {text_file}, ")
    tokenizer = make_pair()[0]
    assert report[2:] == [
        f"read with: the tokenizer in {str(tokenizer)!r}, the expert's chat template"
    ]


def test_compress_without_text_uses_the_built_in_one(make_pair, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calibration: {samples: 4, max_tokens: 256}")
    printed = run_well("compress", *make_pair(), "-o", tmp_path / "artifact", "--recipe", recipe)
    assert re.search(r"artifact: .* MB -> .* bits per linear weight", printed)


def test_compress_verifies_on_the_held_out_file(make_pair, text_file, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "a", "response": "bcd"}\n')
    output = tmp_path / "artifact"
    run_well(
        "compress", *make_pair(), "-o", output, "--calibration", text_file, "--held-out", held_out
    )
    assert Artifact(output).manifest.verification["tokens"] == 4


def test_compress_follows_the_recipe(make_pair, text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("linear: {scheme: ternary, salient_channels: 0}\nembedding: {scheme: int2}")
    output = tmp_path / "artifact"
    run_well("compress", *make_pair(), "-o", output, "--calibration", text_file, "--recipe", recipe)
    coded = [entry for entry in Artifact(output).manifest.tensors if entry.kind == "coded"]
    schemes = {entry.role: entry.scheme for entry in coded}
    assert schemes["linear"] == "ternary"
    assert schemes["embedding"] == schemes["lm_head"] == "int2"
    assert "ternary" in (output / "recipe.yaml").read_text()


def test_compress_refuses_an_existing_output_and_overwrites_when_told(
    make_pair, text_file, tmp_path
):
    command = ("compress", *make_pair(), "-o", tmp_path / "a", "--calibration", text_file)
    run_well(*command)
    assert "exists already" in refusal(*command)
    run_well(*command, "--overwrite")


def test_compress_names_a_bad_line_of_the_text(make_pair, tmp_path):
    text = tmp_path / "rows.jsonl"
    text.write_text('{"prompt": "a"}\n')
    message = refusal("compress", *make_pair(), "-o", tmp_path / "a", "--calibration", text)
    assert message.startswith(f"{text}:1: a row needs")


def test_compress_works_without_a_tokenizer_but_not_on_text(make_pair, text_file, tmp_path):
    bare = []
    for root in make_pair():
        copy = tmp_path / root.name
        copy.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(root / name, copy / name)
        bare.append(copy)
    output = run_well("compress", *bare, "-o", tmp_path / "out", "--json")
    assert json.loads(output.splitlines()[-1])["tokens"] > 0
    assert "has a tokenizer to read" in refusal(
        "compress", *bare, "-o", tmp_path / "no", "--calibration", text_file
    )
    assert not (tmp_path / "no").exists()


def test_inspect_prints_what_the_manifest_says_as_json(compressed, make_pair):
    output, _ = compressed
    artifact = Artifact(output)
    base, expert = make_pair()
    assert json.loads(run_well("inspect", output, "--json")) == {
        "expert": str(expert),
        "base": str(base),
        "format_version": 1,
        "bytes": artifact.total_bytes(),
        "totals": artifact.manifest.totals.model_dump(),
        "verification": artifact.manifest.verification,
        "tensors": len(artifact.entries),
    }


def test_inspect_prints_a_table_of_weights_for_people(compressed):
    lines = run_well("inspect", compressed[0]).splitlines()
    assert re.search(r"in a slot 0\.\d MB, \d\.\d+ bits \(\d\.\d+ over all weights\)", lines[2])
    number = r" +\d+\.\d+"
    assert any(re.fullmatch(rf"up_proj +coded int2 +2({number}){{5}}", line) for line in lines)
    assert any(re.match(r"embed_tokens +coded int4 +1 ", line) for line in lines)
    assert any(re.match(r"norm +replacement +1 ", line) for line in lines)


def test_inspect_refuses_what_is_no_artifact(make_pair):
    assert "it is not a compressed expert" in refusal("inspect", make_pair()[0])


def test_merge_writes_a_checkpoint(compressed, make_pair, tmp_path):
    merged = tmp_path / "merged"
    base, expert = make_pair()
    assert run_well("merge", base, compressed[0], "-o", merged) == f"wrote {merged}\n"
    assert set(open_checkpoint(merged).files) == set(open_checkpoint(expert).files)


def test_merge_writes_the_dtype_asked_for(compressed, make_pair, tmp_path):
    merged = tmp_path / "merged"
    run_well("merge", make_pair()[0], compressed[0], "-o", merged, "--dtype", "float16")
    assert open_checkpoint(merged).config["dtype"] == "float16"


def test_merge_refuses_an_unknown_dtype(compressed, make_pair, tmp_path):
    message = refusal(
        "merge", make_pair()[0], compressed[0], "-o", tmp_path / "merged", "--dtype", "int8"
    )
    assert "got 'int8'" in message


def test_merge_refuses_another_base(compressed, make_pair, tmp_path):
    other = make_pair("qwen3")[0]
    assert "use that base" in refusal("merge", other, compressed[0], "-o", tmp_path / "merged")


def test_evaluate_prints_exactly_these_keys(compressed, make_pair, text_file):
    printed = run_well("evaluate", *make_pair(), compressed[0], "--data", text_file, "--json")
    assert printed.count("\n") == 1
    assert list(json.loads(printed)) == EVALUATION


def test_evaluate_prints_a_table_for_people(compressed, make_pair, text_file):
    printed = run_well("evaluate", *make_pair(), compressed[0], "--data", text_file)
    assert [line.split()[0] for line in printed.splitlines()] == EVALUATION


def test_evaluate_uses_as_many_rows_as_told(compressed, make_pair, text_file, tmp_path):
    (row,) = drawn(read_rows(text_file), 1, seed=0)
    line = int(row.place.rpartition(":")[2])
    drawn_row = tmp_path / "drawn.jsonl"
    drawn_row.write_text(text_file.read_text().splitlines()[line - 1] + "\n")
    command = ("evaluate", *make_pair(), compressed[0], "--json", "--data")
    assert run_well(*command, text_file, "--max-rows", "1") == run_well(*command, drawn_row)


def test_evaluate_refuses_another_base(compressed, make_pair, text_file):
    expert = make_pair()[1]
    message = refusal("evaluate", expert, expert, compressed[0], "--data", text_file)
    assert "use that base" in message


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "compress",
            [
                "base-as-served",
                "bits",
                "budget",
                "calibration",
                "held-out",
                "json",
                "lossless",
                "no-lossless",
                "no-overwrite",
                "output",
                "overwrite",
                "preset",
                "recipe",
                "slot-bits",
                "target-kl",
            ],
        ),
        ("inspect", ["json"]),
        ("merge", ["dtype", "output"]),
        ("evaluate", ["data", "json", "max-rows", "max-tokens"]),
    ],
)
def test_options_are_few_and_these(command, options):
    import typer

    group = typer.main.get_command(app)
    parameters = group.commands[command].params
    found = {
        name.removeprefix("--")
        for parameter in parameters
        for name in [*parameter.opts, *parameter.secondary_opts]
        if name.startswith("--")
    }
    assert sorted(found) == options


def test_a_bad_pair_is_one_line_and_exit_code_two(make_pair, tmp_path):
    command = [sys.executable, "-m", "deltamux.serve", "compress"]
    pair = [make_pair("llama")[0], make_pair("qwen2")[1]]
    done = subprocess.run(
        [*command, *map(str, pair), "-o", str(tmp_path / "artifact")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: setting 'model_type' is 'llama' .*\n", done.stderr)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_totals_of_an_artifact_are_these(compressed):
    assert list(Artifact(compressed[0]).manifest.totals.model_dump()) == TOTALS
