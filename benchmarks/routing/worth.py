"""What routing is worth: held-out loss of the model that `auto` picks, prompt by prompt.

python -m benchmarks.routing.worth --base .demo/base --experts math=.demo/compressed/math ...
                                   --router .demo/router --data .demo/data [--count 24]

The defaults are the demo's files (`make demo` makes them). Every model, base and compressed experts,
scores every held-out response; then each prompt takes the loss of one of them:

    base     always the base
    oracle   the expert of the prompt's domain, the base where there is none
    auto     who the router decides on
    random   the mean over base and experts: what routing without looking would give

Losses are nats per response token, averaged over a domain's tokens. Prompts without a response (the
demo's general ones) only count in who answers them.

`margins` is what `router.resident_margin` buys: the same prompts in random orders, one at a time, with
fewer slots than experts. Of each margin: bytes of experts that were moved into a slot, and the loss. The
slot that was used least recently is given up.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.record import record
from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import reconstructed
from deltamux.compression.checkpoint.checkpoint import Checkpoint, open_checkpoint
from deltamux.compression.streaming.forward import StreamedModel, WeightSource, batches
from deltamux.compression.streaming.text import Sample, encode_rows
from deltamux.router.console import table
from deltamux.router.decide.conversation import Conversation
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import load_tokenizer
from deltamux.router.fit.fit import fit_router

BATCH_TOKENS = 2048
MAX_TOKENS = 512
BASE = "base"
MARGINS = (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
SLOTS, ORDERS = 1, 5


def losses(base: Checkpoint, source: WeightSource, samples: list[Sample]) -> np.ndarray:
    """Sum of the loss over each sample's response tokens, float64 [N]."""
    plan = list(batches(samples, BATCH_TOKENS))
    model = StreamedModel(base.config, source, torch.float32, base.tied)
    hidden_PH, head_VH = model.hidden_states(plan), model.head()
    found: dict[int, float] = {}
    start = 0
    for sample in (each for batch in plan for each in batch):
        stop = start + len(sample.predicted)
        logits_PV = hidden_PH[start:stop] @ head_VH.T
        loss = functional.cross_entropy(logits_PV, sample.predicted, reduction="sum")
        found[id(sample)] = float(loss)
        start = stop
    return np.array([found[id(sample)] for sample in samples])


def read(data: Path, count: int) -> list[tuple[str, str, str | None]]:
    """Domain, prompt and response of held-out rows."""
    rows = []
    for file in sorted(data.glob("*/test.jsonl")):
        lines = file.read_text(encoding="utf-8").split("\n")
        for line in [line for line in lines if line][:count]:
            row = json.loads(line)
            rows.append((file.parent.name, row["prompt"], row.get("response")))
    return rows


def of_domain(table_MN: Any, total: int, picked_N: Any, oracle: int) -> dict[str, Any]:
    """Losses in nats a token of N prompts of one domain, by who answers."""
    count = table_MN.shape[1]
    return {
        "base": float(table_MN[0].sum() / total),
        "oracle": float(table_MN[oracle].sum() / total),
        "auto": float(table_MN[picked_N, np.arange(count)].sum() / total),
        "random": float(table_MN.mean(axis=0).sum() / total),
        "to_own_expert": float(np.mean(picked_N == oracle)),
        "prompts": count,
    }


def worth(arguments: argparse.Namespace, router: Router) -> dict[str, Any]:
    """The table, by domain."""
    base = open_checkpoint(arguments.base)
    paths = dict(pair.split("=", 1) for pair in arguments.experts)
    rows = [row for row in read(arguments.data, arguments.count) if row[0] in {*paths, "general"}]
    asked = [row for row in rows if row[2] is not None]
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(response)}]
        for _, prompt, response in asked
    ]
    samples = encode_rows(conversations, base.root, MAX_TOKENS)
    if len(samples) != len(asked):
        raise ValueError(f"a prompt fills {MAX_TOKENS} tokens alone; raise MAX_TOKENS")
    names = [BASE, *paths]
    sums = [losses(base, base.load, samples)]
    for name, path in paths.items():
        print("scoring", name, flush=True)
        sums.append(losses(base, reconstructed(Artifact(Path(path)), base), samples))
    table_MN = np.stack(sums)
    encode = load_tokenizer(arguments.router)
    answers = [router.decide([prompt], encode).expert or BASE for _, prompt, _ in rows]
    chosen = [answer if answer in names else BASE for answer in answers]
    tokens = np.array([len(sample.predicted) for sample in samples])
    auto = [name for name, row in zip(chosen, rows, strict=True) if row[2] is not None]
    domains = np.array([row[0] for row in asked])
    found: dict[str, Any] = {}
    for domain in dict.fromkeys(domains):
        inside = np.flatnonzero(domains == domain)
        oracle = names.index(domain) if domain in names else 0
        picked = np.array([names.index(auto[index]) for index in inside])
        found[str(domain)] = of_domain(table_MN[:, inside], tokens[inside].sum(), picked, oracle)
    read_all = [router.read([prompt], encode) for _, prompt, _ in asked]
    sizes = {
        name: (Path(path) / "model.safetensors").stat().st_size for name, path in paths.items()
    }
    margins = by_margin(router, read_all, table_MN / tokens, sizes)
    left = [name == BASE for name, row in zip(chosen, rows, strict=True) if row[0] == "general"]
    general = float(np.mean(left)) if left else None
    return {"domains": found, "general_left_to_base": general, "margins": margins}


def by_margin(
    router: Router, asked: list[Conversation], losses_MN: np.ndarray, sizes: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Bytes moved and mean loss by margin; rows of the losses are the base, then the experts."""
    names = [BASE, *sizes]
    found = {}
    for margin in MARGINS:
        moved, loss = [], []
        for seed in range(ORDERS):
            slots: list[str] = []
            total = 0
            for index in np.random.default_rng(seed).permutation(len(asked)):
                made = router.decide_read(asked[index], slots.__contains__, margin).expert
                name = made if made in sizes else BASE
                loss.append(losses_MN[names.index(name), index])
                if name != BASE:
                    total += 0 if name in slots else sizes[name]
                    slots = [name, *(other for other in slots if other != name)][:SLOTS]
            moved.append(total)
        found[str(margin)] = {"moved_mb": float(np.mean(moved)) / 1e6, "loss": float(np.mean(loss))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    demo = Path(".demo")
    parser.add_argument("--base", default=str(demo / "base"))
    parser.add_argument(
        "--experts", nargs="+",
        default=[f"{name}={demo / 'compressed' / name}" for name in ("math", "sql", "shell")],
    )  # fmt: skip
    parser.add_argument("--router", type=Path, help="default: fitted on DATA/*/train.jsonl")
    parser.add_argument("--data", type=Path, default=demo / "data")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--theme", default="routing-worth")
    arguments = parser.parse_args()
    if arguments.router is None:
        import tempfile

        from deltamux.router.fit.data import read_dataset

        arguments.router = Path(tempfile.mkdtemp()) / "router"
        fit_router(read_dataset(arguments.data), arguments.router, base=arguments.base)
    result = worth(arguments, Router.load(arguments.router))
    columns = ("base", "random", "auto", "oracle", "to_own_expert")
    rows = [
        (name, *(f"{figures[column]:.3f}" for column in columns))
        for name, figures in result["domains"].items()
    ]
    print(table(("domain", *columns), rows))
    rows = [(m, *(f"{v:.4f}" for v in f.values())) for m, f in result["margins"].items()]
    print(table(("margin", "moved MB", "loss"), rows))
    print("general prompts left to the base:", result["general_left_to_base"])
    record(arguments.theme, result)


if __name__ == "__main__":
    main()
