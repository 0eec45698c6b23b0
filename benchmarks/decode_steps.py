"""What an expert costs a decoding step, and what a swap costs, inside one engine.

    python -m benchmarks.decode_steps [--root .demo]    (after `make demo`)

Eight requests decode together: all for the base, all for one expert, half for each of two, and a
quarter for each of two with half for the base. A step is the time of 33 tokens less the time of one,
over 32; each mix is run ROUNDS times in turn, and the median is kept.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.record import record

ROUNDS = 3
STEPS = 32
BATCH = 8
MIXES: dict[str, list[str | None]] = {
    "base": [None] * BATCH,
    "one expert": ["math"] * BATCH,
    "two experts": ["math", "sql"] * (BATCH // 2),
    "two experts and the base": ["math", "sql", None, None] * (BATCH // 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".demo")
    root = Path(parser.parse_args().root).absolute()
    os.environ["VLLM_PLUGINS"] = "deltamux"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from deltamux.serve.status import read_status

    engine = LLM(
        str(root / "base"),
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=4,
        max_model_len=1024,
        max_num_seqs=BATCH,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**29,
        additional_config={"deltamux": {"version": 1}},
    )
    names = ("math", "sql", "shell")
    requests = {
        name: LoRARequest(lora_name=name, lora_int_id=i, lora_path=str(root / "compressed" / name))
        for i, name in enumerate(names, start=1)
    }
    lines = (root / "data" / "sql" / "test.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:BATCH]]

    def seconds(mix: list[str | None], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        chosen: Any = [requests[name] if name else None for name in mix]
        start = time.perf_counter()
        engine.generate(prompts[: len(mix)], sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - start

    for mix in MIXES.values():
        seconds(mix, STEPS + 1)
    times: dict[str, list[float]] = {label: [] for label in MIXES}
    for _ in range(ROUNDS):
        for label, mix in MIXES.items():
            times[label].append((seconds(mix, STEPS + 1) - seconds(mix, 1)) / STEPS)
    for _ in range(ROUNDS):
        for name in names:
            seconds([name], 1)
    steps = {label: statistics.median(each) for label, each in times.items()}
    status = read_status()
    swaps = {
        tier: {"count": sum(each.counts), "mean_seconds": each.sum / sum(each.counts)}
        for tier, each in status.swap_seconds.items()
    }
    for label, each in steps.items():
        print(f"{label:<26}{each * 1e3:8.1f} ms a step  {each / steps['base']:5.2f} x base")
    for tier, each in swaps.items():
        print(f"into {tier:<21}{each['mean_seconds'] * 1e3:8.1f} ms, mean of {each['count']}")
    record(
        "decode-steps",
        {"step_seconds": steps, "swaps": swaps, "memory_bytes": status.memory_bytes},
    )


if __name__ == "__main__":
    main()
