import json
import re
import shlex
import sqlite3

import pytest

from deltamux.serve.demo import data
from deltamux.serve.demo.data import (
    GENERATORS,
    SPECIALISTS,
    Example,
    general_prompts,
    generate,
    train_test,
    write_jsonl,
)

SCHEMA = re.compile(r"(\w+) ?\((\w+(?: \w+)?(?:, \w+(?: \w+)?)*)\)")
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.$")


def database_for(prompt: str) -> sqlite3.Connection:
    """Make the tables that a prompt describes, whatever the style."""
    connection = sqlite3.connect(":memory:")
    tables = SCHEMA.findall(prompt)
    assert tables, prompt
    for name, columns in tables:
        connection.execute(f"CREATE TABLE {name} ({columns})")
    return connection


@pytest.mark.parametrize("domain", GENERATORS)
def test_the_same_seed_gives_the_same_examples(domain):
    assert generate(domain, 40, seed=3) == generate(domain, 40, seed=3)
    assert generate(domain, 40, seed=3) != generate(domain, 40, seed=4)


@pytest.mark.parametrize("domain", GENERATORS)
def test_prompts_of_one_call_are_distinct(domain):
    prompts = [example.prompt for example in generate(domain, 1000, seed=0)]
    assert len(set(prompts)) == 1000


@pytest.mark.parametrize("domain", GENERATORS)
def test_no_placeholder_is_left_in_a_text(domain):
    for example in generate(domain, 500, seed=1):
        assert not re.search(r"{[a-z_]\w*}", example.prompt + example.response)


@pytest.mark.parametrize("domain", SPECIALISTS)
def test_train_and_test_share_no_prompt(domain):
    train, test = train_test(domain, 300, 80, seed=0)
    assert (len(train), len(test)) == (300, 80)
    assert not {example.prompt for example in train} & {example.prompt for example in test}


def test_every_equation_of_a_math_answer_holds():
    signs = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    for example in generate("math", 1000, seed=0):
        *steps, last = example.response.split("\n")
        results = []
        for step in steps:
            left, sign, right, result = EQUATION.search(step).groups()
            assert signs[sign](int(left), int(right)) == int(result)
            results.append(int(result))
        assert last == f"Answer: {results[-1]}"


def test_the_numbers_of_a_math_answer_come_from_its_prompt_or_an_earlier_step():
    for example in generate("math", 300, seed=0):
        known = set(re.findall(r"\d+", example.prompt))
        for step in example.response.split("\n")[:-1]:
            left, _, right, result = EQUATION.search(step).groups()
            assert {left, right} <= known
            known.add(result)


def test_every_query_runs_on_the_schema_of_its_prompt():
    for example in generate("sql", 1000, seed=0):
        connection = database_for(example.prompt)
        connection.execute(example.response)
        connection.close()


def test_every_word_of_a_condition_in_a_query_is_named_in_the_question():
    for example in generate("sql", 300, seed=0):
        for value in re.findall(r"'(.+?)'|\b(\d+)\b", example.response):
            assert "".join(value) in example.prompt


def test_every_command_splits_like_a_shell_line():
    for example in generate("shell", 1000, seed=0):
        words = shlex.split(example.response)
        assert len(words) > 1
        assert words[0].isalpha()


def test_numbers_of_a_command_are_named_in_the_request():
    for example in generate("shell", 300, seed=0):
        for number in re.findall(r"\b\d+\b", example.response):
            assert number in example.prompt


def test_general_prompts_are_plain_texts():
    prompts = general_prompts(200, seed=0)
    assert len(set(prompts)) == 200
    assert [Example(prompt, "") for prompt in prompts] == generate("general", 200, seed=0)


def test_no_single_word_gives_a_domain_away():
    """The most telling word of a domain must be missing from most of its prompts."""
    for domain in GENERATORS:
        own = [set(re.findall(r"\w+", e.prompt.lower())) for e in generate(domain, 400, seed=0)]
        others = set()
        for other in GENERATORS:
            if other != domain:
                for example in generate(other, 400, seed=0):
                    others |= set(re.findall(r"\w+", example.prompt.lower()))
        telling = set().union(*own) - others
        assert max(sum(word in words for words in own) for word in telling) < 240


def test_unknown_domain_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of .*math.*got 'poetry'"):
        generate("poetry", 1, seed=0)


def test_more_prompts_than_a_domain_has_are_refused(monkeypatch):
    monkeypatch.setattr(data, "GENERATORS", {"math": lambda rng: ("same", "same")})
    with pytest.raises(ValueError, match="ask for fewer"):
        generate("math", 50, seed=0)


def test_jsonl_holds_one_object_a_line(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, [Example("a\nb", "é"), {"prompt": "c", "domain": "math"}])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": "a\nb", "response": "é"}, {"prompt": "c", "domain": "math"}]
