"""Learning from use: the decision log read back, a refit with feedback, clusters of a log."""

import json
import random

import pytest
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from deltamux.router.commands import route, router_app
from deltamux.router.decide.router import Router
from deltamux.router.fit import suggest as suggesting
from deltamux.router.fit.data import Dataset, Prompt
from deltamux.router.fit.suggest import suggest
from deltamux.router.fit.usage import read_log, with_feedback

WORDS = {
    "math": ["sum", "product", "apples", "each", "total", "twice", "half"],
    "sql": ["table", "column", "join", "select", "rows", "where", "group"],
    "general": ["poem", "story", "weather", "friend", "holiday", "music", "travel"],
}
SLANG = ["gimme", "dbthing", "pronto"]
app = typer.Typer()
app.add_typer(router_app, name="router")
app.command("route")(route)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def said(words, count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=6)) for _ in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `base`, `data`, a fitted `router`, and `log`: slang that belongs to sql."""
    folder = tmp_path_factory.mktemp("learning")
    words = ["<unk>", *SLANG, *(word for group in WORDS.values() for word in group)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("base", "data"):
        (folder / name).mkdir()
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    for domain, own in WORDS.items():
        rows = [json.dumps({"prompt": text}) for text in said(own, 30)]
        (folder / "data" / f"{domain}.jsonl").write_text("\n".join(rows))
    lines = []
    for number, text in enumerate(dict.fromkeys(said(SLANG, 40))):
        lines += [{"id": f"{number}", "time": 0, "prompt": [text], "expert": "base"},
                  {"id": f"{number}", "time": 1, "feedback": "sql"}]  # fmt: skip
    lines.append({"id": None, "time": 2, "prompt": ["twice the sum"], "expert": "math"})
    (folder / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fitted = run("router", "fit", folder / "data", "-o", folder / "router", "--tokenizer",
                 folder / "base")  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    return folder


def refit(place, log, output):
    return run("router", "refit", place / "router", log, "--data", place / "data", "-o", output,
               "--tokenizer", place / "base", "--json")  # fmt: skip


def test_a_refit_learns_the_feedback_and_tells_what_changes(place, tmp_path):
    before = (place / "router" / "router.safetensors").read_bytes()
    done = refit(place, place / "log", tmp_path / "new")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["right_after"] > 0.8 * report["feedback"] > report["right_before"]
    assert {"from": "base", "to": "sql"}.items() <= report["moved"][0].items()
    assert report["shown"][0]["prompt"].split()[0] in SLANG
    assert Router.load(tmp_path / "new").config.training.prompts["sql"] > 30
    assert (place / "router" / "router.safetensors").read_bytes() == before


def test_a_refit_never_writes_over_the_router_in_use(place):
    done = refit(place, place / "log", place / "router")
    assert done.exit_code == 2
    assert "write the new one elsewhere" in done.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "1", "hash": "ab"}, {"id": "1", "feedback": "sql"}], "set router.log_prompts"),
        ([{"id": "1", "prompt": ["a"]}, {"id": "1", "feedback": "law"}], "names ['law']"),
        ([[1]], "line 1: not a line of a decision log"),
    ],
)
def test_a_log_that_teaches_nothing_is_refused_with_the_way_out(place, tmp_path, lines, message):
    log = tmp_path / "log"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = refit(place, log, tmp_path / "new")
    assert done.exit_code == 2
    assert message in done.output


def test_the_last_feedback_counts_and_the_older_part_is_read(tmp_path):
    rows = [{"id": "1", "prompt": ["a", "b"]}, {"id": "1", "feedback": "x"}]
    (tmp_path / "log.1").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "log").write_text(json.dumps({"id": "1", "feedback": "y"}) + "\n")
    usage = read_log(tmp_path / "log")
    assert (usage.prompts, usage.feedback) == ({"1": ("a", "b")}, {"1": "y"})


def test_feedback_stands_for_the_label_a_prompt_had():
    data = Dataset([Prompt(("a",), "math"), Prompt(("b",), "math")], [], 0, [])
    found = with_feedback(data, [Prompt(("b",), "sql")])
    assert found.prompts == [Prompt(("b",), "sql"), Prompt(("a",), "math")]
    assert found.pinned == 1


def test_clusters_of_a_log_become_files_that_fit_reads(tmp_path, monkeypatch):
    def missing():
        raise ValueError("not installed")

    monkeypatch.setattr(suggesting, "load_encoder", missing)
    log = tmp_path / "log.jsonl"
    texts = [text for own in WORDS.values() for text in said(own, 25)]
    log.write_text("".join(json.dumps({"prompt": [text]}) + "\n" for text in texts))
    done = run("router", "suggest", log, "-o", tmp_path / "found", "--json")
    assert done.exit_code == 0, done.output
    clusters = json.loads(done.stdout)
    assert len(clusters) == 3
    for cluster in clusters:
        assert any(set(cluster["words"]) <= set(own) for own in WORDS.values())
        assert len(cluster["examples"]) == 5
    files = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert files == ["cluster-1.jsonl", "cluster-2.jsonl", "cluster-3.jsonl"]


def test_too_few_prompts_are_no_clusters():
    with pytest.raises(ValueError, match="20 are the least"):
        suggest([("a",)] * 3)


def test_experts_own_rows_make_a_router_without_labels(place, tmp_path):
    options = []
    for name in ("math", "sql"):
        options += ["--from-expert", f"{name}={place / 'data' / name}.jsonl"]
    done = run("router", "fit", *options, "-o", tmp_path / "router", "--tokenizer", place / "base")
    assert done.exit_code == 0, done.output
    config = Router.load(tmp_path / "router").config
    assert config.experts == {"general": None, "math": "math", "sql": "sql"}
    nothing = run("router", "fit", "-o", tmp_path / "no", "--tokenizer", place / "base")
    assert "give labelled prompts, or --from-expert" in nothing.output
