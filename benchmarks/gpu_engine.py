"""What experts cost vLLM's engine at Mistral-7B's shapes, with random weights, on one GPU.

    python -m benchmarks.gpu_engine                      some four minutes
    python -m benchmarks.gpu_engine --layers 2 --tiny    the same path on any machine

Decoding steps of 1, 16 and 64 requests for the base, one expert, 4 and 16 of them; a prompt of 4,096 tokens; the
copy of an expert into a slot against a plain copy of as many bytes; what is left for the KV cache. The base's
checkpoint is a header over a file of holes: weights are random (`load_format="dummy"`), and experts are random
images in the host cache. A step is the time of 33 tokens less that of one, over 32.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import record

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
}
EXPERTS = 16
BATCHES = (1, 16, 64)
STEPS = 32
ROUNDS = 3
PROMPT = 4096
# As measured on an expert of 1 bit a weight on disk.
ESCAPES = 0.007
# Small enough that random experts leave a random model's activations finite.
STEP = 1e-4


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
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions for the worker, below
    }
    config = MISTRAL | (TINY if options.tiny else {}) | {"num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        result = measure(hollow_base(Path(folder) / "base", config), config, options)
    record("gpu-engine", result)


def measure(base: Path, config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Start the engine, fill its host cache, and time it."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    began = time.perf_counter()
    engine = LLM(
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
        additional_config={
            "deltamux": {
                "version": 1,
                "host_cache": "256GiB",
                "slot": {"bytes": image_bytes(config)},
            }
        },
        **device_options(options.tiny),
    )
    start_seconds = time.perf_counter() - began
    slot_bytes = engine.collective_rpc(fill_host_cache, args=(options.slots,))[0]
    requests = [LoRARequest(f"e{i}", i, f"e{i}") for i in range(1, options.slots + 1)]
    rng = np.random.default_rng(0)

    def seconds(mix: list[Any], tokens: int, length: int = 16) -> float:
        prompts: Any = [
            {"prompt_token_ids": rng.integers(3, config["vocab_size"], length).tolist()}
            for _ in mix
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, lora_request=mix, use_tqdm=False)
        return time.perf_counter() - start

    steps = step_seconds(seconds, requests)
    prefill = prefill_seconds(seconds, requests[0], min(PROMPT, 64 if options.tiny else PROMPT))
    copies = engine.collective_rpc(time_copies)[0]
    table(steps, prefill, copies)
    # Last, since it changes the base's weights.
    on_gpu = torch.cuda.is_available()  # the CPU build keeps weights where nothing can be added
    agreement = check_against_merge(engine, requests[0], config) if on_gpu else {}
    print(f"expert against its merge: {agreement}")
    kv = engine.llm_engine.vllm_config.cache_config
    return {
        "config": config,
        "start_seconds": start_seconds,
        "slot_bytes": slot_bytes,
        "slots": options.slots,
        "kv_blocks": kv.num_gpu_blocks,
        "kv_block_tokens": kv.block_size,
        "step_seconds": steps,
        "prefill_seconds": prefill,
        "copy_seconds": copies,
        "agreement": agreement,
    }


def check_against_merge(engine: Any, request: Any, config: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities of an expert, beside those of the base with the expert merged into its weights.

    Returns:
        The largest difference to the merged model, rounded to 16 bit, and to the base.
    """
    from vllm import SamplingParams

    ids = np.random.default_rng(1).integers(3, config["vocab_size"], 48).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def logprobs(chosen: Any) -> Any:
        prompts: Any = [{"prompt_token_ids": ids}]
        (output,) = engine.generate(prompts, sampling, lora_request=[chosen], use_tqdm=False)
        found = output.prompt_logprobs[1:]
        return np.array([each[i].logprob for each, i in zip(found, ids[1:], strict=True)])

    base, expert = logprobs(None), logprobs(request)
    engine.collective_rpc(merge_first_expert)
    merged = logprobs(None)
    to_merge, to_base = abs(expert - merged).max(), abs(expert - base).max()
    return {"to_merge": float(to_merge), "to_base": float(to_base)}


def device_options(tiny: bool) -> dict[str, Any]:
    """What only one kind of device takes."""
    if torch.cuda.is_available():
        sizes = [1, 2, 4, 8, 16, 32, 64]
        return {"compilation_config": {"cudagraph_capture_sizes": sizes}, "dtype": "bfloat16"}
    return {"kv_cache_memory_bytes": 2**28, "dtype": "float32" if tiny else "bfloat16"}


def step_seconds(seconds: Callable[..., float], requests: list[Any]) -> dict[str, dict[str, float]]:
    """Seconds of a decoding step, by batch and by experts active."""
    found: dict[str, dict[str, list[float]]] = {}
    for repeat in range(ROUNDS + 1):
        for batch in BATCHES:
            for active in (0, 1, 4, EXPERTS):
                if active > min(batch, len(requests)):
                    continue
                mix = [requests[i % active] if active else None for i in range(batch)]
                spent = (seconds(mix, STEPS + 1) - seconds(mix, 1)) / STEPS
                if repeat:  # the first one warms up
                    found.setdefault(str(batch), {}).setdefault(str(active), []).append(spent)
    return {
        batch: {active: statistics.median(times) for active, times in each.items()}
        for batch, each in found.items()
    }


def prefill_seconds(seconds: Callable[..., float], request: Any, length: int) -> dict[str, float]:
    """Seconds of one long prompt, for the base and for an expert."""
    mixes = {"base": [None], "expert": [request]}
    times: dict[str, list[float]] = {name: [] for name in mixes}
    for repeat in range(ROUNDS + 1):
        for name, mix in mixes.items():
            spent = seconds(mix, 1, length)
            if repeat:
                times[name].append(spent)
    return {name: statistics.median(each) for name, each in times.items()}


def table(
    steps: dict[str, dict[str, float]], prefill: dict[str, float], copies: dict[str, float]
) -> None:
    print(f"{'requests':>10}{'experts':>10}{'step ms':>10}{'to base':>10}")
    for batch, each in steps.items():
        for active, spent in each.items():
            print(f"{batch:>10}{active:>10}{spent * 1e3:>10.2f}{spent / each['0']:>10.2f}")
    base, expert = prefill["base"], prefill["expert"]
    print(f"prefill: {base * 1e3:.1f} ms base, {expert * 1e3:.1f} ms expert, {expert / base:.2f}")
    plain, slot = copies["plain"], copies["slot"]
    print(f"into a slot: {slot * 1e3:.1f} ms, plain copy {plain * 1e3:.1f} ms, {slot / plain:.2f}")


def hollow_base(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint whose weights file has a header and holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


def shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """The tensors of a Llama-like decoder."""
    hidden, inner, head = (
        config[name] for name in ("hidden_size", "intermediate_size", "head_dim")
    )
    heads, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": [hidden],
            f"{prefix}.post_attention_layernorm.weight": [hidden],
            f"{prefix}.self_attn.q_proj.weight": [heads, hidden],
            f"{prefix}.self_attn.k_proj.weight": [keys, hidden],
            f"{prefix}.self_attn.v_proj.weight": [keys, hidden],
            f"{prefix}.self_attn.o_proj.weight": [hidden, heads],
            f"{prefix}.mlp.gate_proj.weight": [inner, hidden],
            f"{prefix}.mlp.up_proj.weight": [inner, hidden],
            f"{prefix}.mlp.down_proj.weight": [hidden, inner],
        }
    return found | {"model.norm.weight": [hidden], "lm_head.weight": [config["vocab_size"], hidden]}


def manager_of(worker: Any) -> Any:
    """Deltamux's manager inside of a vLLM worker."""
    return getattr(worker, "worker", worker).model_runner.lora_manager


def image_bytes(config: dict[str, Any]) -> int:
    """What the random image of a base takes."""
    from deltamux.compression.image.layout import head_bytes, section_bytes
    from deltamux.compression.image.planes import blocks, row_stride

    matrices = [shape for shape in shapes(config).values() if len(shape) == 2]
    sizes = [
        section_bytes(rows * row_stride(columns))
        + section_bytes(4 * (rows * blocks(columns) + 1))
        + section_bytes(2 * rows * blocks(columns) * escapes_of(columns))
        for rows, columns in matrices
    ]
    return head_bytes(len(shapes(config))) + sum(sizes)


def escapes_of(columns: int) -> int:
    """Escapes of a row in a block of columns."""
    from deltamux.compression.image.planes import BLOCK_COLUMNS

    return max(1, int(ESCAPES * min(columns, BLOCK_COLUMNS)))


def fill_host_cache(worker: Any, count: int) -> int:
    """Runs in the worker: a random image under every expert's id; a slot's bytes."""
    from deltamux.compression.image.layout import assemble
    from deltamux.serve import compat

    manager = manager_of(worker)
    # Dummy weights are some 1e-3, norms too: with those of 1 activations are of order 1.
    _, _, norm = compat.hooked_layers()
    for module in getattr(worker, "worker", worker).model_runner.get_model().modules():
        if isinstance(module, norm):
            module.weight.data.fill_(1)
    rng = np.random.default_rng(0)
    records = {
        index: random_record(*shape, rng)
        for index, shape in enumerate(manager.shapes.values())
        if len(shape) == 2
    }
    image = assemble(records, len(manager.shapes))
    if torch.cuda.is_available():
        image = image.pin_memory()
    for expert_id in range(1, count + 1):
        manager.host.put(expert_id, image)
    assert image.numel() <= manager.slots.slot_bytes
    return int(manager.slots.slot_bytes)


def random_record(rows: int, columns: int, rng: np.random.Generator) -> Any:
    """One plane of uniform codes around nought, and escapes."""
    from deltamux.compression.image.layout import Field, Record, float_bits
    from deltamux.compression.image.planes import BLOCK_COLUMNS, blocks, row_stride

    count = blocks(columns)
    per_group = escapes_of(columns)
    shape = rows * count, per_group
    places = np.sort(rng.integers(0, columns - (count - 1) * BLOCK_COLUMNS, shape), axis=1)
    differences = rng.choice([6, 7, 9, 10], shape)  # −2, −1, 1, 2
    return Record(
        {
            Field.PLANES: 1,
            Field.ROWS: rows,
            Field.COLUMNS: columns,
            Field.STRIDE: row_stride(columns),
            Field.BLOCKS: count,
            Field.ZERO: float_bits(1.5),
            Field.STEP: float_bits(STEP),
        },
        {
            Field.PLANE0: np.frombuffer(rng.bytes(rows * row_stride(columns)), np.uint8),
            Field.STARTS: (np.arange(rows * count + 1) * per_group).astype(np.uint32),
            Field.ESCAPES: (places | differences << 12).astype(np.uint16).reshape(-1),
        },
    )


def merge_first_expert(worker: Any) -> None:
    """Runs in the worker: add the delta of slot 0, the first expert's image, to the base's weights."""
    from deltamux.serve import compat
    from deltamux.serve.worker.triton_dense import launch_dense

    manager = manager_of(worker)
    manager.slots.load(0, manager.host.get(1))
    model = getattr(worker, "worker", worker).model_runner.get_model()
    linear, _, _ = compat.hooked_layers()
    linears = [(name, each) for name, each in model.named_modules() if isinstance(each, linear)]
    tables = [("lm_head", model.lm_head), ("model.embed_tokens", model.model.embed_tokens)]
    for name, module in [*linears, *tables]:
        parent, dot, leaf = name.rpartition(".")
        start = 0
        for part in model.packed_modules_mapping.get(leaf, [leaf]):
            weight = f"{parent}{dot}{part}.weight"
            rows = manager.shapes[weight][0]
            target = module.weight.data[start : start + rows]
            merged = torch.empty_like(target)
            launch_dense(merged, manager.slots.buffer, 0, manager.slots.index(weight), target)
            target.copy_(merged)
            start += rows


def time_copies(worker: Any) -> dict[str, float]:
    """Runs in the worker: seconds of a plain copy of an image to the device, and of one into a slot."""
    manager = manager_of(worker)
    image = manager.host.get(1)
    device = manager.slots.buffer.device
    target = torch.empty(image.numel(), dtype=torch.uint8, device=device)

    def spent(copy: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS + 1):
            wait(device)
            start = time.perf_counter()
            copy()
            wait(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return {
        "plain": spent(lambda: target.copy_(image, non_blocking=True)),
        "slot": spent(lambda: manager.slots.load(0, image)),
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
