"""The other data sets of `shifted.py` and `quality.py`, made of clones of public repositories.

python -m benchmarks.routing.public_sets --clones DIR -o SETS

DIR holds clones of pubmedqa/pubmedqa, openai/human-eval, arkilpatel/SVAMP, taoyds/spider,
HazyResearch/legalbench, clinc/oos-eval, PolyAI-LDN/task-specific-datasets, lm-sys/RouteLLM (MMLU),
lm-sys/FastChat (MT-Bench) and RouteWorks/RouterArena, each as a folder called like its repository
(`human-eval`). SETS gets NAME.jsonl with rows of `prompt`; a name begins with the domain whose expert
should answer, or with "none". Duplicates are dropped, and each set is a random draw under seed 0.
"""

import argparse
import csv
import gzip
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEDICAL = ("anatomy", "clinical_knowledge", "college_medicine", "medical_genetics",
           "professional_medicine", "virology")  # fmt: skip
SCHOOL_MATH = ("elementary_mathematics", "high_school_mathematics")
HUMANITIES = (
    "philosophy", "high_school_us_history", "high_school_world_history", "prehistory",
    "world_religions", "professional_law", "jurisprudence", "international_law",
    "high_school_geography", "sociology", "moral_disputes", "us_foreign_policy", "marketing",
    "public_relations", "astronomy", "security_studies", "high_school_government_and_politics",
    "business_ethics", "management", "logical_fallacies", "high_school_psychology",
    "high_school_european_history",
)  # fmt: skip
# Sets of RouterArena that are of a domain here; sets that could be of several are left out.
ARENA = {
    "PubMedQA": "medical", "MedMCQA": "medical", "MMLUPro_health": "medical",
    "LiveCodeBench": "code", "FinQA": "finance", "MathQA": "math", "AsDiv": "math", "MATH": "math",
    "GSM8K": "math", "AIME": "math", "MMLUPro_math": "math", "OpenTDB_Science: Mathematics": "math",
}  # fmt: skip
ARENA_LEFT_OUT = (
    "MMLUPro_computer science", "OpenTDB_Science: Computers", "MMLUPro_business",
    "MMLUPro_economics", "MMLUPro_biology", "MMLUPro_engineering", "MMLUPro_physics",
    "MMLUPro_chemistry",
)  # fmt: skip
# What a row of LegalBench asks, in the order of preference, and what is no part of it.
LEGAL_TEXT = ("question", "text", "Clause", "clause", "quote", "claim")
LEGAL_OTHER = ("index", "answer", "slice", "document_name", "label", "idx")


def lines(path: Path) -> list[Any]:
    """Rows of JSON lines."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


def table(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """Rows of a file with a header."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def legal(folder: Path) -> list[str]:
    """One text of each training row of LegalBench's tasks."""
    found = []
    for file in sorted(folder.glob("tasks/*/train.tsv")):
        for row in table(file, "\t"):
            told = {k: v for k, v in row.items() if k and v and k.lower() not in LEGAL_OTHER}
            text = next((told[name] for name in LEGAL_TEXT if name in told), None)
            found.append(text or "\n".join(told.values()))
    return found


def mmlu(folder: Path, subjects: Iterable[str]) -> list[str]:
    """Questions with their four answers."""
    responses = folder / "routellm/evals/mmlu/responses"
    files = [responses / f"mmlu_{subject}.csv" for subject in subjects]
    rows = [row for file in files if file.is_file() for row in table(file)]
    return [row["prompt"].rsplit("\nAnswer:", 1)[0] for row in rows]


def arena(folder: Path) -> dict[str, list[str]]:
    """Questions of the public subset, by domain."""
    found: dict[str, list[str]] = {}
    for row in lines(folder / "cached_results/claude-3-haiku-20240307.jsonl"):
        name = row["global_index"].rsplit("_", 1)[0]
        if name not in ARENA_LEFT_OUT:
            found.setdefault(ARENA.get(name, "none"), []).append(row["question"])
    return found


def bench(folder: Path, *categories: str) -> list[str]:
    """First turns of MT-Bench."""
    rows = lines(folder / "fastchat/llm_judge/data/mt_bench/question.jsonl")
    return [row["turns"][0] for row in rows if row["category"] in categories]


def sets(clones: Path) -> dict[str, list[str]]:
    """Prompts by name, as they come."""
    clinc = json.loads((clones / "oos-eval/data/data_full.json").read_text())
    domains = json.loads((clones / "oos-eval/data/domains.json").read_text())
    bank = {*domains["banking"], *domains["credit_cards"]}
    polyai, llm = clones / "task-specific-datasets", clones / "RouteLLM"
    pubmed = json.loads((clones / "pubmedqa/data/ori_pqal.json").read_text())
    svamp = json.loads((clones / "SVAMP/SVAMP.json").read_text())
    spider = json.loads((clones / "spider/evaluation_examples/examples/dev.json").read_text())
    hotels = [
        row["text"]
        for number in range(8)
        for row in json.loads((polyai / f"nlupp/data/hotels/fold{number}.json").read_text())
    ]
    humanities = mmlu(llm, HUMANITIES)
    talk = bench(clones / "FastChat", "writing", "roleplay", "humanities", "stem", "extraction")
    return {
        "medical pubmedqa": [row["QUESTION"] for row in pubmed.values()],
        "code humaneval": [r["prompt"] for r in lines(clones / "human-eval/data/HumanEval.jsonl.gz")],
        "math svamp": [f"{row['Body'].strip()} {row['Question'].strip()}" for row in svamp],
        "sql spider": [row["question"] for row in spider],
        "medical mmlu": mmlu(llm, MEDICAL),
        "math mmlu": mmlu(llm, SCHOOL_MATH),
        "code mtbench": bench(clones / "FastChat", "coding"),
        "math mtbench": bench(clones / "FastChat", "math"),
        "none legal": legal(clones / "legalbench"),
        "none clinc-oos": [text for text, _ in clinc["oos_test"]],
        "none clinc-other": [text for text, intent in clinc["test"] if intent not in bank],
        "none banking": [row["text"] for row in table(polyai / "banking_data/test.csv")],
        "none nlupp-hotels": hotels,
        "none mmlu-humanities": humanities,
        "none mmlu-humanities-question": [text.split("\nA. ")[0] for text in humanities],
        "none mtbench": talk,
        **{f"{name} routerarena": asked for name, asked in arena(clones / "RouterArena").items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--count", type=int, default=600)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, texts in sets(arguments.clones).items():
        prompts = [text for text in dict.fromkeys(text.strip() for text in texts) if text]
        random.Random(0).shuffle(prompts)
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts[: arguments.count])
        (arguments.output / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        print(name, min(len(prompts), arguments.count))


if __name__ == "__main__":
    main()
