"""What experts cost vLLM's engine at Mistral-7B's shapes, with random weights, on one GPU.

    python -m benchmarks.gpu_engine                      some four minutes
    python -m benchmarks.gpu_engine --layers 2 --tiny    the same path on any machine

Decoding steps of 1, 16 and 64 requests for the base, one expert, 4 and 16 of them; a prompt of 4,096 tokens; the
copy of an expert into a slot against a plain copy of as many bytes; the gaps that running requests see meanwhile;
what is left for the KV cache. The base's checkpoint is a header over a file of holes: weights are random
(`load_format="dummy"`), and experts are random images in the host cache. A step is the time of 33 tokens less
that of one, over 32.
"""

import argparse
import os
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_engine_swaps, gpu_engine_worker
from benchmarks.gpu_engine_base import MISTRAL, TINY, hollow_base, image_bytes
from benchmarks.record import record

SIZING = Path(__file__).parents[1] / "docker/tools/sizing.py"
EXPERTS = 16
BATCHES = (1, 16, 64)
STEPS = 32
ROUNDS = 2
PROMPT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=MISTRAL["num_hidden_layers"])
    parser.add_argument("--tiny", action="store_true", help="small matrices")
    parser.add_argument("--slots", type=int, default=EXPERTS)
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    options = parser.parse_args()
    os.environ |= {
        "VLLM_PLUGINS": "deltamux",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are taken one by one
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions for the worker
    }
    config = MISTRAL | (TINY if options.tiny else {}) | {"num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(hollow_base(Path(folder) / "base", config), config, options)
        try:
            bench.measure()
        finally:  # what was measured is kept, whatever fails later
            record("gpu-engine", bench.result)


class Bench:
    """An engine with experts in its host cache.

    Args:
        base: The checkpoint.
        config: Its config.json.
        options: Of the command line.
    """

    def __init__(self, base: Path, config: dict[str, Any], options: argparse.Namespace) -> None:
        from vllm.lora.request import LoRARequest

        self.config, self.options = config, options
        began = time.perf_counter()
        self.engine = start(base, config, options)
        start_seconds = time.perf_counter() - began
        count = options.slots + EXPERTS
        self.requests = [LoRARequest(f"e{i}", i, f"e{i}") for i in range(1, count + 1)]
        (slot_bytes,) = self._in_worker(gpu_engine_worker.fill_host_cache, count)
        self._rng = np.random.default_rng(0)
        cache = self.engine.llm_engine.vllm_config.cache_config
        self.result: dict[str, Any] = {
            "config": config,
            "start_seconds": start_seconds,
            "slot_bytes": slot_bytes,
            "slots": options.slots,
            "kv_blocks": cache.num_gpu_blocks,
            "kv_block_tokens": cache.block_size,
        }

    def measure(self) -> None:
        """Everything, printed and kept as it comes."""
        result = self.result
        result["memory"] = self.memory()
        print(f"memory: {result['memory']}", flush=True)
        result["step_seconds"] = self.step_seconds()
        step_table(result["step_seconds"])
        result["prefill_seconds"] = self.prefill_seconds()
        base, expert = result["prefill_seconds"].values()
        print(f"prefill: {base * 1e3:.1f} ms base, {expert * 1e3:.1f} expert, {expert / base:.2f}")
        (result["copy_seconds"],) = self._in_worker(gpu_engine_worker.time_copies)
        plain, slot = result["copy_seconds"].values()
        print(f"into a slot: {slot * 1e3:.1f} ms, plain copy {plain * 1e3:.1f}, {slot / plain:.2f}")
        vocabulary = self.config["vocab_size"]
        result["gap_seconds"] = gpu_engine_swaps.swap_gaps(self.engine, self.requests, vocabulary)
        gpu_engine_swaps.table(result["gap_seconds"])
        # Last, since it changes the base's weights. The CPU build keeps those where nothing can be added.
        if torch.cuda.is_available():
            result["agreement"] = self.check_against_merge()
            print(f"expert against its merge: {result['agreement']}", flush=True)

    def seconds(self, mix: list[Any], tokens: int, length: int = 16) -> float:
        """Time of `tokens` tokens for one request of each expert in `mix`."""
        from vllm import SamplingParams

        prompts: Any = [{"prompt_token_ids": self._ids(length)} for _ in mix]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        self.engine.generate(prompts, sampling, lora_request=mix, use_tqdm=False)
        return time.perf_counter() - began

    def step_seconds(self) -> dict[str, dict[str, float]]:
        """Seconds of a decoding step, by batch and by experts active."""
        found: dict[str, dict[str, list[float]]] = {}
        for repeat in range(ROUNDS + 1):
            for batch in BATCHES:
                for active in (0, 1, 4, EXPERTS):
                    if active > min(batch, self.options.slots):
                        continue
                    mix = [self.requests[i % active] if active else None for i in range(batch)]
                    spent = (self.seconds(mix, STEPS + 1) - self.seconds(mix, 1)) / STEPS
                    if repeat:  # the first one warms up
                        found.setdefault(str(batch), {}).setdefault(str(active), []).append(spent)
        return {
            batch: {active: statistics.median(times) for active, times in each.items()}
            for batch, each in found.items()
        }

    def prefill_seconds(self) -> dict[str, float]:
        """Seconds of one long prompt, for the base and for an expert."""
        length = 64 if self.options.tiny else PROMPT
        mixes = {"base": [None], "expert": [self.requests[0]]}
        times: dict[str, list[float]] = {name: [] for name in mixes}
        for repeat in range(ROUNDS + 1):
            for name, mix in mixes.items():
                spent = self.seconds(mix, 1, length)
                if repeat:
                    times[name].append(spent)
        return {name: statistics.median(each) for name, each in times.items()}

    def check_against_merge(self) -> dict[str, float]:
        """Log-probabilities of an expert, beside those of the base with the expert merged into its weights.

        Returns:
            The largest difference to the merged model, rounded to 16 bit, and to the base.
        """
        ids = self._ids(48)
        base, expert = self._logprobs(ids, None), self._logprobs(ids, self.requests[0])
        self._in_worker(gpu_engine_worker.merge_first_expert)
        merged = self._logprobs(ids, None)
        to_merge, to_base = abs(expert - merged).max(), abs(expert - base).max()
        return {"to_merge": float(to_merge), "to_base": float(to_base)}

    def memory(self) -> dict[str, int]:
        """Bytes of the metrics' parts, what NVML and torch say, and what sizing.py computes."""
        from deltamux.serve.observability.memory import kv_cache_bytes

        (found,) = self._in_worker(gpu_engine_worker.device_memory)
        computed = runpy.run_path(str(SIZING))["sizes"](self.config)
        cache = self.engine.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        return found | {
            "kv_cache": kv_cache_bytes(self.engine.llm_engine.vllm_config),
            "computed_base": computed.base,
            "computed_kv_cache": tokens * computed.kv_token,
            "computed_slot": computed.slot,
        }

    def _logprobs(self, ids: list[int], request: Any) -> Any:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts: Any = [{"prompt_token_ids": ids}]
        (output,) = self.engine.generate(prompts, sampling, lora_request=[request], use_tqdm=False)
        found = output.prompt_logprobs[1:]
        return np.array([each[i].logprob for each, i in zip(found, ids[1:], strict=True)])

    def _ids(self, length: int) -> list[int]:
        ids: list[int] = self._rng.integers(3, self.config["vocab_size"], length).tolist()
        return ids

    def _in_worker(self, work: Any, *args: Any) -> list[Any]:
        found: list[Any] = self.engine.collective_rpc(work, args=args)
        return found


def start(base: Path, config: dict[str, Any], options: argparse.Namespace) -> Any:
    """Start vLLM's engine with slots for random experts."""
    from vllm import LLM

    slot = {"bytes": image_bytes(config)}
    return LLM(
        str(base),
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=options.slots,
        max_cpu_loras=4 * EXPERTS,
        max_model_len=2 * PROMPT,
        max_num_batched_tokens=2 * PROMPT,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        enforce_eager=options.eager,
        additional_config={"deltamux": {"version": 1, "host_cache": "256GiB", "slot": slot}},
        **device_options(options.tiny),
    )


def device_options(tiny: bool) -> dict[str, Any]:
    """What only one kind of device takes."""
    if torch.cuda.is_available():
        sizes = [1, 16, 64]
        return {"compilation_config": {"cudagraph_capture_sizes": sizes}, "dtype": "bfloat16"}
    return {"kv_cache_memory_bytes": 2**28, "dtype": "float32" if tiny else "bfloat16"}


def step_table(steps: dict[str, dict[str, float]]) -> None:
    print(f"{'requests':>10}{'experts':>10}{'step ms':>10}{'to base':>10}")
    for batch, each in steps.items():
        for active, spent in each.items():
            ratio = spent / each["0"]
            print(f"{batch:>10}{active:>10}{spent * 1e3:>10.2f}{ratio:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
