"""Experts over a base that vLLM quantizes as it loads it, though they were made against the 16-bit base.

    python -m benchmarks.quantized_base [--root .demo] [--experts math …] [--bits 1 2]   (after `make demo`; 5 minutes, and
                                                                    2 for each expert and width that is compressed for it)

An expert is W + Δ̂. Over a quantized base it is Q(W) + Δ̂: what the base's quantization loses, the expert loses too, and no
more if the two add up. For every text it compares log-probabilities of the next token:

    base      Q(W) to W, in plain vLLM
    expert    Q(W) + Δ̂ to W + Δ̂
    lost      W + Δ̂, Q(W) + Δ̂, and for each of `--bits` Q(W) + Δ̂' to the fine-tune itself, in plain vLLM; Δ̂' is the delta
              from Q(W), as `deltamux compress --base-as-served` takes it

The divergence is Σ p (log p − log q) over the `TOKENS` likeliest tokens of p and the rest as one more; it is at most the
Kullback-Leibler divergence of the whole vocabularies. Base requests with the plugin on must equal those of plain vLLM bit by
bit. Every engine is a process of its own (`--job`).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import record
from benchmarks.serving_engine import options_of, set_environment

TOKENS = 200
ROWS = 12
MAX_TOKENS = 160
# Of a sampled position: token to log-probability.
Position = dict[str, float]


def engine(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prompt's positions, by an engine that runs here."""
    set_environment(job.get("kind"))
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    model = LLM(
        job["base"],
        dtype="bfloat16",
        quantization=job["quantization"],
        max_model_len=512,
        max_num_seqs=1,
        max_logprobs=TOKENS,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**27,
        **options_of(job),
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOKENS)
    names = list(job.get("experts", {}))
    found = []
    for name, ids in job["texts"]:
        request = name and LoRARequest(name, names.index(name) + 1, job["experts"][name])
        (output,) = model.generate(
            [TokensPrompt(prompt_token_ids=ids)], sampling, lora_request=request, use_tqdm=False
        )
        positions = [
            {str(token): entry.logprob for token, entry in position.items()}
            for position in output.prompt_logprobs[1:]
        ]
        found.append({"name": name, "positions": positions})
    return found


def asked(job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The same, by a process of its own."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    subprocess.run([sys.executable, "-m", "benchmarks.quantized_base", "--job", path], check=True)
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def divergence(one: Position, other: Position) -> float:
    """From the first to the second, nats; tokens that either lacks are taken together."""
    both = one.keys() & other.keys()
    total = sum(math.exp(one[token]) * (one[token] - other[token]) for token in both)
    rests = [1 - sum(math.exp(position[token]) for token in both) for position in (one, other)]
    rest, its = (max(each, 1e-9) for each in rests)
    return total + rest * math.log(rest / its)


def mean_divergence(ones: list[Any], others: list[Any]) -> float:
    """Over all positions of texts."""
    pairs = [
        pair
        for one, other in zip(ones, others, strict=True)
        for pair in zip(one["positions"], other["positions"], strict=True)
    ]
    return sum(divergence(*pair) for pair in pairs) / len(pairs)


def texts_of(root: Path, names: list[str]) -> list[tuple[str, list[int]]]:
    """Held-out rows of each expert, as token ids of the base."""
    from deltamux.compression.streaming.rows import read_rows
    from deltamux.compression.streaming.text import encode_rows

    found = []
    for name in names:
        rows = read_rows(root / "data" / name / "test.jsonl")[:ROWS]
        samples = encode_rows(rows, root / "base", MAX_TOKENS)
        found += [(name, [int(token) for token in sample.ids]) for sample in samples]
    return found


def as_served(root: Path, name: str, quantization: str, bits: float) -> str:
    """An expert compressed for the base as it is served; kept beside the others."""
    output = root / f"as-served-{quantization}" / f"{name}-{bits:g}"
    if not output.exists():
        data = root / "data" / name / "train.jsonl"
        command = ["compress", root / "base", root / "experts" / name, "-o", output]
        command += ["--calibration", data, "--bits", bits, "--base-as-served", quantization]
        subprocess.run([sys.executable, "-m", "deltamux.serve", *map(str, command)], check=True)
    return str(output.resolve())


def measure(root: Path, quantization: str, names: list[str], bits: list[float]) -> dict[str, Any]:
    """The divergences, by expert."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(root, quantization, names, bits, Path(folder))


def _measure(
    root: Path, quantization: str, names: list[str], widths: list[float], folder: Path
) -> dict[str, Any]:
    texts = texts_of(root, names)
    experts = {name: str((root / "compressed" / name).resolve()) for name in names}
    base: list[Any] = [(None, ids) for _, ids in texts]
    job: dict[str, Any] = {"base": str((root / "base").resolve())}
    runs = {}
    for kind in (None, quantization):
        job["quantization"] = kind
        runs[kind, False] = asked(job | {"texts": base}, folder)
        ours = {"kind": "deltamux", "slots": len(names), "experts": experts}
        runs[kind, True] = asked(job | ours | {"texts": base + texts}, folder)
    plain, quantized = runs[None, False], runs[quantization, False]
    count = len(base)
    found: dict[str, Any] = {
        "quantization": quantization,
        "base_bit_identical": quantized == runs[quantization, True][:count],
        "base": mean_divergence(plain, quantized),
    }
    over, under = runs[None, True][count:], runs[quantization, True][count:]
    for name in names:
        mine = [place for place, (expert, _) in enumerate(texts) if expert == name]
        of_base = mean_divergence(*([each[i] for i in mine] for each in (plain, quantized)))
        lost = mean_divergence(*([each[i] for i in mine] for each in (over, under)))
        own = [texts[i] for i in mine]
        whole = {"base": str((root / "experts" / name).resolve()), "quantization": None}
        tuned = asked(whole | {"texts": [(None, ids) for _, ids in own]}, folder)
        ours = {"kind": "deltamux", "slots": 2, "texts": own}
        losses = {
            "16 bit": mean_divergence(tuned, [over[i] for i in mine]),
            "quantized": mean_divergence(tuned, [under[i] for i in mine]),
        }
        for bits in widths:
            experts = {name: as_served(root, name, quantization, bits)}
            served = asked(job | ours | {"experts": experts, "quantization": quantization}, folder)
            losses[f"as served, {bits:g} bits"] = mean_divergence(tuned, served)
        found[name] = {"base": of_base, "expert": lost, "share": lost / of_base, "lost": losses}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"))
    parser.add_argument("--quantization", default="fp8_per_channel")
    parser.add_argument("--experts", nargs="+", default=["math", "shell", "sql"])
    parser.add_argument("--bits", nargs="+", type=float, default=[])
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        arguments.job.write_text(json.dumps(engine(json.loads(arguments.job.read_text()))))
        return
    chosen = arguments.quantization, sorted(arguments.experts), arguments.bits
    record("quantized-base", measure(arguments.root, *chosen))


if __name__ == "__main__":
    main()
