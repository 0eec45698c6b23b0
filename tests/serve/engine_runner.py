"""Run batches through a real vLLM engine in a process of its own; a JSON job in, JSON results out.

Job: {"model", "plugin", "slots", "experts": {name: path}, "batches": [[[expert or null, prompt]]],
"output"}, "base" where the model is a quantized checkpoint of another, and of vLLM's configuration "speculative" (drafted tokens), "quantization", "dtype" and
"tensor_parallel_size", or none. Result: for each batch, for each request, token ids, their log-probabilities, the gap
between the two likeliest tokens, and the prompt's log-probabilities.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ["VLLM_PLUGINS"] = "deltamux" if job["plugin"] else ""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    if job.get("tensor_parallel_size", 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if job["plugin"]:
        options = {
            "enable_lora": True,
            "max_loras": job["slots"],
            "max_cpu_loras": 8,
            "additional_config": {"deltamux": {"version": 1, "base": job.get("base")}},
        }
    if job.get("speculative"):
        options |= {"speculative_config": job["speculative"], "disable_log_stats": False}
    engine = LLM(
        job["model"],
        dtype=job.get("dtype") or "float32",
        quantization=job.get("quantization"),
        tensor_parallel_size=job.get("tensor_parallel_size", 1),
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=True,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=2**26,
        **options,
    )
    names = sorted(job["experts"])
    requests = {
        name: LoRARequest(
            lora_name=name, lora_int_id=names.index(name) + 1, lora_path=job["experts"][name]
        )
        for name in names
    }
    sampling = SamplingParams(temperature=0, max_tokens=10, logprobs=2, prompt_logprobs=0)
    results = []
    for batch in job["batches"]:
        outputs = engine.generate(
            [prompt for _, prompt in batch],
            sampling,
            lora_request=[requests.get(name) for name, _ in batch] if job["plugin"] else None,
            use_tqdm=False,
        )
        results.append([describe(output) for output in outputs])
    if job.get("speculative"):
        counts = {
            each.name: each.value
            for each in engine.get_metrics()
            if "spec" in each.name and hasattr(each, "value")
        }
        results.append(counts)
    Path(job["output"]).write_text(json.dumps(results))


def describe(output: Any) -> dict[str, Any]:
    answer = output.outputs[0]
    steps = [
        sorted((entry.logprob for entry in step.values()), reverse=True) for step in answer.logprobs
    ]
    prompt_ids = output.prompt_token_ids
    return {
        "prompt_ids": prompt_ids,
        "ids": list(answer.token_ids),
        "logprobs": [
            step[token].logprob
            for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ],
        "gaps": [step[0] - step[1] for step in steps],
        "prompt_logprobs": [
            step[token].logprob
            for step, token in zip(output.prompt_logprobs[1:], prompt_ids[1:], strict=True)
        ],
    }


if __name__ == "__main__":
    main()
