"""One engine of `serving.py`, in a process of its own: a JSON job in, a line of JSON out.

Job: model, kind (deltamux, lora, or none), compiled, experts {name: path}, mixes {label: [expert or null]},
slots, rank, adapters (make random ones where the paths are), reload, rounds.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

STEPS = 32
PROMPT_TOKENS = 512
PREFILLS = 5


def options_of(job: dict[str, Any]) -> dict[str, Any]:
    """What an engine is told about experts, by the kind of engine."""
    kind, slots = job.get("kind"), job.get("slots", 4)
    if not kind:
        return {}
    options = {"enable_lora": True, "max_loras": slots, "max_cpu_loras": max(slots, 4)}
    if kind == "lora":
        options["max_lora_rank"] = job["rank"]
    else:
        listed = [{"name": name, "path": path} for name, path in job.get("experts", {}).items()]
        options["additional_config"] = {"deltamux": {"version": 1, "experts": listed}}
    return options


def set_environment(kind: str | None) -> None:
    """What vLLM reads when it is imported."""
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "deltamux" if kind == "deltamux" else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    set_environment(job.get("kind"))
    if job.get("adapters"):
        for seed, path in enumerate(job["experts"].values()):
            save_adapter(Path(job["model"]), Path(path), job["rank"], seed)
    from vllm import LLM

    began = time.perf_counter()
    engine = LLM(
        job["model"],
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=not job["compiled"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**29,
        **options_of(job),
    )
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - began}
    if job.get("reload"):
        result["reload_seconds"] = reload_seconds(engine, job["rounds"])
    else:
        result |= measure(engine, job)
    result["memory_bytes"] = resident_bytes()
    print("RESULT " + json.dumps(result))


def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = {
        name: LoRARequest(lora_name=name, lora_int_id=i, lora_path=path)
        for i, (name, path) in enumerate(job.get("experts", {}).items(), start=1)
    }
    prompts = [f"Question {i}: how many of the {i + 7} rows are kept?" for i in range(16)]

    def seconds(mix: list[str | None], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        chosen: Any = [requests.get(name or "") for name in mix] if requests else None
        start = time.perf_counter()
        engine.generate(prompts[: len(mix)], sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - start

    for mix in job["mixes"].values():
        seconds(mix, STEPS + 1)
    times: dict[str, list[float]] = {label: [] for label in job["mixes"]}
    for _ in range(job["rounds"]):
        for label, mix in job["mixes"].items():
            times[label].append((seconds(mix, STEPS + 1) - seconds(mix, 1)) / STEPS)
    ids = engine.get_tokenizer().encode(" ".join(prompts * 20))[:PROMPT_TOKENS]
    first = next(iter(requests.values()), None)
    return {
        "steps": {label: statistics.median(each) for label, each in times.items()},
        "prefill": prefill_seconds(engine, ids, first),
    }


def prefill_seconds(engine: Any, ids: list[int], request: Any) -> float:
    from vllm import SamplingParams

    times = []
    for _ in range(PREFILLS + 1):
        start = time.perf_counter()
        engine.generate(
            [{"prompt_token_ids": ids}],
            SamplingParams(max_tokens=1),
            lora_request=[request] if request else None,
            use_tqdm=False,
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def reload_seconds(engine: Any, rounds: int) -> float:
    """What putting another checkpoint into a running engine takes."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        engine.collective_rpc("reload_weights")
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def resident_bytes() -> int:
    """Memory of this process and its children that no other process has (PSS, where it is told)."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        memory = process.memory_full_info()
        total += getattr(memory, "pss", memory.rss)
    return total


def save_adapter(base: Path, folder: Path, rank: int, seed: int) -> None:
    """A random LoRA adapter over all linears, as PEFT saves one."""
    if (folder / "adapter_model.safetensors").is_file():
        return
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(base / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file handle, not a mapping
            if not name.endswith("_proj.weight"):
                continue
            rows, columns = file.get_slice(name).get_shape()
            module = f"base_model.model.{name.removesuffix('.weight')}"
            right = torch.randn(rank, columns, generator=generator) * columns**-0.5
            left = torch.randn(rows, rank, generator=generator) * 0.01
            tensors[f"{module}.lora_A.weight"] = right.bfloat16()
            tensors[f"{module}.lora_B.weight"] = left.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))


if __name__ == "__main__":
    main()
