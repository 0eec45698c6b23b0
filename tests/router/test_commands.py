import inspect
import json
import random

import pytest
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from deltamux.router.commands import route, router_app
from deltamux.serve.cli import app as deltamux

WORDS = {
    "math": ["sum", "product", "apples", "each", "total", "twice", "half"],
    "sql": ["table", "column", "join", "select", "rows", "where", "group"],
    "general": ["poem", "story", "weather", "friend", "holiday", "music", "travel"],
}
RUNNER = CliRunner()

app = typer.Typer()
app.add_typer(router_app, name="router")
app.command("route")(route)


def run(*args, **kwargs):
    return RUNNER.invoke(app, [str(arg) for arg in args], **kwargs)


def write_prompts(folder, name, count, seed):
    rng = random.Random(seed)
    for domain, words in WORDS.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"prompt": " ".join(rng.choices(words, k=6))}) for _ in range(count)]
        (folder / domain / f"{name}.jsonl").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `base`, `data` and a `router` fitted through the command line."""
    folder = tmp_path_factory.mktemp("place")
    words = ["<unk>", *(word for group in WORDS.values() for word in group)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "base").mkdir()
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    write_prompts(folder / "data", "train", 30, seed=0)
    write_prompts(folder / "data", "test", 10, seed=1)
    result = fit(folder, folder / "router", "--expert", "math=gauss", "--json")
    assert result.exit_code == 0, result.stderr
    (folder / "report.json").write_text(result.stdout)
    return folder


def fit(folder, output, *options, data="data"):
    return run(
        "router", "fit", folder / data, "-o", output, "--tokenizer", folder / "base", *options
    )


def test_fit_prints_one_json_line(place):
    report = json.loads((place / "report.json").read_text())
    assert report["heldout"]["accuracy"] > 0.9
    assert report["training"]["keep"] == 0.95
    size = sum(path.stat().st_size for path in (place / "router").iterdir())
    assert report["bytes"] == size


def test_fit_prints_a_table_for_people(place, tmp_path):
    result = fit(place, tmp_path / "router", "--keep", "0.9", "--seed", "3")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["domain", "expert", "prompts"]
    assert "general    base" in result.stdout
    assert "held-out: accuracy" in result.stdout


def test_evaluate_counts_right_fallback_and_wrong_on_the_test_split(place):
    result = run("router", "evaluate", place / "router", place / "data", "--json")
    report = json.loads(result.stdout)
    assert report["quality"]["n"] == 30
    assert report["quality"]["accuracy"] == 1.0
    math = report["domains"]["math"]
    assert math["n"] == math["right"] + math["fallback"] + math["wrong"] == 10
    assert 0 < report["decision_p50_us"] <= report["decision_p99_us"]


def test_evaluate_takes_unknown_domains_as_out_of_scope(place, tmp_path):
    (tmp_path / "law.jsonl").write_text(
        '{"prompt": "weather"}\n{"prompt": "sum total apples twice half"}'
    )
    result = run("router", "evaluate", place / "router", tmp_path)
    assert result.exit_code == 0
    row = result.stdout.splitlines()[1]
    assert row.split() == ["law", "(out", "of", "scope)", "2", "1", "0", "1"]


def test_evaluate_writes_figures_and_json(place, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    out = tmp_path / "figures"
    result = run("router", "evaluate", place / "router", place / "data", "-o", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "evaluation.json").read_text())
    curves = report["curves"]
    assert curves["answers"] == ["gauss", "sql", "base"]
    assert sum(map(sum, curves["confusion"])) == 30
    assert sum(point[2] for point in curves["reliability"] if point) == 30
    coverage = [point[1] for point in curves["risk_coverage"]]
    assert coverage == sorted(coverage, reverse=True)
    for name in ("confusion", "reliability", "risk_coverage"):
        pixels = imread(out / f"{name}.png")
        assert pixels.shape[0] > 200
        assert pixels[..., :3].std() > 0.05  # not blank


def test_evaluate_reports_prompts_that_were_trained_on(place):
    result = run("router", "evaluate", place / "router", place / "data", "--json")
    assert json.loads(result.stdout)["seen"] == 0
    training = place / "data" / "math" / "train.jsonl"
    alone = place / "leak.jsonl"
    rows = [json.loads(line) | {"domain": "math"} for line in training.read_text().splitlines()]
    alone.write_text("\n".join(json.dumps(row) for row in rows[:7]))
    result = run("router", "evaluate", place / "router", alone, "--json")
    assert json.loads(result.stdout)["seen"] == 7
    assert "7 of these prompts were trained on" in result.stderr


def test_fit_takes_descriptions_minimums_and_a_target(place, tmp_path):
    result = fit(
        place,
        tmp_path / "router",
        *("--describe", "sql=tables and joins", "--minimum", "sql=0.97", "--max-wrong", "0.01"),
        "--json",
    )
    report = json.loads(result.stdout)
    assert report["training"]["max_wrong"] == 0.01
    assert report["heldout"]["wrong"] <= 0.01
    config = json.loads((tmp_path / "router" / "router_config.json").read_text())
    assert config["minimums"] == {"sql": 0.97}


@pytest.mark.parametrize("flag", [("--minimum", "sql=often"), ("--describe", "sql=")])
def test_a_flag_that_cannot_be_read_is_a_user_error(place, tmp_path, flag):
    result = fit(place, tmp_path / "router", *flag)
    assert result.exit_code == 2
    assert f"{flag[0]} takes DOMAIN=" in result.stderr


def test_route_prints_one_decision(place):
    result = run("route", "sum total apples twice half product", "--router", place / "router")
    decision = json.loads(result.stdout)
    assert list(decision) == ["expert", "domain", "confidence", "reason"]
    assert (decision["expert"], decision["reason"]) == ("gauss", "router")


def test_route_calls_the_base_by_name(place):
    result = run("route", "a story of the weather", "--router", place / "router")
    assert json.loads(result.stdout)["expert"] == "base"


def test_route_reads_json_lines_and_goes_on_after_a_bad_one(place):
    messages = [
        {"role": "user", "content": "join table rows where select"},
        {"role": "user", "content": "?"},
    ]
    lines = [
        json.dumps({"prompt": "sum total apples half"}),
        "{oops",
        "",
        json.dumps({"messages": messages}),
    ]
    lines += ["\udcff", json.dumps({"prompt": 3}), json.dumps({"prompt": ""})]
    stdin = "\n".join(lines).encode("utf-8", "surrogateescape")
    result = run("route", "--router", place / "router", "--jsonl", input=stdin)
    out = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row.get("expert") for row in out] == ["gauss", None, "sql", None, None, "base"]
    assert [row["error"].split(":")[0] for row in out if "error" in row] == [
        "line 2",
        "line 5",
        "line 6",
    ]
    assert result.exit_code == 1


def test_route_of_good_lines_succeeds(place):
    result = run("route", "--router", place / "router", "--jsonl", input='{"prompt": "sum"}\n')
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["route", "--router", "{place}/router"], "either a TEXT"),
        (["route", "hi", "--jsonl", "--router", "{place}/router"], "either a TEXT"),
        (["route", "hi", "--router", "{place}/data"], "no router_config.json"),
        (["router", "evaluate", "{place}/router", "{place}/none"], "no file or folder"),
        (["router", "evaluate", "{place}/none", "{place}/data"], "no router_config.json"),
    ],
)
def test_user_errors_are_one_line_and_status_2(place, args, message):
    result = run(*(arg.format(place=place) for arg in args))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_fit_refuses_a_malformed_expert(place, tmp_path):
    result = fit(place, tmp_path / "router", "--expert", "math")
    assert (result.exit_code, "DOMAIN=EXPERT, got 'math'" in result.stderr) == (2, True)


def test_fit_refuses_to_write_over_other_files(place):
    result = fit(place, place / "data")
    assert result.exit_code == 2
    assert "another directory" in result.stderr


def test_fit_names_dropped_duplicates_and_conflicts(place, tmp_path):
    for domain, words in WORDS.items():
        rows = [f"{a} {b}" for a in words for b in words[:3]] + ["both", "both"]
        text = "\n".join(json.dumps({"prompt": row}) for row in rows)
        (tmp_path / f"{domain}.jsonl").write_text(text)
    result = fit(place, tmp_path / "out" / "router", data=tmp_path)
    assert result.exit_code == 0
    assert "dropped 3 duplicate prompts" in result.stderr
    assert "1 prompts are under more than one domain, as 'both'" in result.stderr


@pytest.mark.parametrize("text", ["-5 degrees", "-5", "- a list", "-x^2 + 1"])
def test_a_text_may_begin_with_a_dash(place, text):
    result = RUNNER.invoke(deltamux, ["route", text, "--router", str(place / "router")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["reason"] == "abstain"


def test_a_misspelled_option_is_no_text(place):
    result = RUNNER.invoke(deltamux, ["route", "--rooter", "--router", str(place / "router")])
    assert result.exit_code == 2
    assert "no such option: --rooter" in result.output


def test_jsonl_in_utf_16_is_named_as_such(place):
    text = json.dumps({"prompt": "twice the sum"}).encode("utf-16")
    result = run("route", "--jsonl", "--router", place / "router", input=text)
    assert result.exit_code == 2
    assert "standard input is in UTF-16" in result.stderr


def test_the_flags_are_frozen():
    commands = {command.callback.__name__: command.callback for command in app.registered_commands}
    commands |= {command.name: command.callback for command in router_app.registered_commands}
    assert {name: list(inspect.signature(f).parameters) for name, f in commands.items()} == {
        "route": ["text", "directory", "jsonl"],
        "fit": [
            *("output", "tokenizer", "data", "from_expert", "keep", "expert", "max_wrong"),
            *("features", "describe", "minimum", "seed", "as_json"),
        ],
        "refit": ["directory", "log", "data", "output", "tokenizer", "as_json"],
        "suggest": ["log", "output", "count", "as_json"],
        "evaluate": ["directory", "data", "output", "as_json"],
    }
