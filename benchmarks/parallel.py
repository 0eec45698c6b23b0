"""Two ranks beside one: what they say, what a slot takes on each, and what a step costs (CPU; minutes).

    python -m benchmarks.parallel

A random base of four layers (hidden 1024, 16 heads, 8 of keys and values, 32,000 tokens) and two fine-tunes of it, all
in float32. One engine has them on one rank, one on two, each rank on a core of its own; a third is plain vLLM on two. For
every prompt of a mixed batch the log-probabilities of its tokens are compared. Slots, and the time in which ranks agree at a
step, are asked of the workers. Every engine is a process of its own (`--job`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import record
from benchmarks.serving_engine import options_of, set_environment

NAMES = ("one", "two")
PROMPT_TOKENS, STEPS, BATCH = 48, 48, 4
AGREEMENTS = 200
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def prepare(folder: Path) -> None:
    """Write a base, two fine-tunes, and their artifacts below a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.compression.compress import compress
    from deltamux.compression.recipe import Recipe
    from deltamux.compression.streaming.text import random_samples

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder / "base")
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    text = random_samples(SHAPE["vocab_size"], count=8, length=64)
    for name in NAMES:
        with torch.no_grad():
            for key, weight in model.state_dict().items():
                changed = torch.randn_like(weight) * 0.004 * (weight.dim() == 2)
                # A fine-tune changes few tokens' rows.
                if key.endswith(("embed_tokens.weight", "lm_head.weight")):
                    changed[torch.arange(len(changed)) % 8 > 0] = 0
                weight.copy_(base[key] + changed)
        model.save_pretrained(folder / f"tuned-{name}")
        pair = open_checkpoint(folder / "base"), open_checkpoint(folder / f"tuned-{name}")
        compress(*pair, folder / name, Recipe(), calibration=text, held_out=[])


class Asked:
    """An engine that runs here, and what it is asked."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.model = LLM(
            job["model"],
            dtype="float32",
            skip_tokenizer_init=True,
            tensor_parallel_size=job["ranks"],
            max_model_len=256,
            max_num_seqs=8,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**26,
            **options_of(job),
        )
        names = NAMES if job.get("kind") else ()
        requests = [
            LoRARequest(name, number, job["experts"][name])
            for number, name in enumerate(names, start=1)
        ]
        # The experts and the base in turn.
        places = range(BATCH)
        self.mixed = requests and [[*requests, None][place % (len(names) + 1)] for place in places]
        self.prompts = [
            [(8 * (31 * i + 97 * k)) % 32000 for i in range(PROMPT_TOKENS)] for k in places
        ]

    def answers(self, tokens: int, logprobs: int | None) -> list[Any]:
        """Of the mixed batch."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            prompt_logprobs=logprobs,
            detokenize=False,
        )
        given = [TokensPrompt(prompt_token_ids=ids) for ids in self.prompts]
        found: list[Any] = self.model.generate(
            given, sampling, lora_request=self.mixed or None, use_tqdm=False
        )
        return found


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """What an engine says and takes."""
    set_environment(job.get("kind"))
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if job["ranks"] > 1:
        cores = "|".join(str(rank) for rank in range(job["ranks"]))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    asked_here = Asked(job)
    logs = []
    for output in asked_here.answers(1, 0):
        places = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        logs.append([position[token].logprob for position, token in places])
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        asked_here.answers(STEPS, None)
        seconds.append((time.perf_counter() - begin) / STEPS)
    ranks = asked_here.model.collective_rpc(of_rank) if job.get("kind") else []
    return {"logs": logs, "step_seconds": statistics.median(seconds), "ranks": ranks}


def of_rank(worker: Any) -> dict[str, float]:
    """What a worker has, and how long an agreement takes it."""
    manager = worker.model_runner.lora_manager
    begin = time.perf_counter()
    for _ in range(AGREEMENTS):
        manager.ranks.largest([0, 0])
    return {
        "slot_bytes": manager.slots.slot_bytes,
        "host_cache_bytes": manager.residency.host.num_bytes,
        "base_bytes": manager.residency.status.memory_bytes["base"],
        "agreement_seconds": (time.perf_counter() - begin) / AGREEMENTS,
    }


def measure(folder: Path) -> dict[str, Any]:
    """One rank, two ranks, and plain vLLM on two."""
    experts = {name: str(folder / name) for name in NAMES}
    job = {"model": str(folder / "base"), "kind": "deltamux", "slots": 2, "experts": experts}
    found = {
        label: asked(job | changes, folder)
        for label, changes in (
            ("one rank", {"ranks": 1}),
            ("two ranks", {"ranks": 2}),
            ("two ranks, plain vLLM", {"ranks": 2, "kind": None}),
        )
    }
    one, two = found["one rank"], found["two ranks"]
    pairs = zip(one["logs"], two["logs"], strict=True)
    differences = [abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True)]
    largest = max(rank["slot_bytes"] for rank in two["ranks"])
    for each in found.values():
        del each["logs"]
    return {
        "engines": found,
        "largest_difference": max(differences),
        "slot_share": largest / one["ranks"][0]["slot_bytes"],
    }


def asked(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an engine in a process of its own answers."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    subprocess.run([sys.executable, "-m", "benchmarks.parallel", "--job", path], check=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        arguments.job.write_text(json.dumps(engine(json.loads(arguments.job.read_text()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        record("parallel", measure(Path(folder)))


if __name__ == "__main__":
    main()
