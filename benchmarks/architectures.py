"""Served log-probabilities of every architecture beside transformers' on the merged weights, on tiny random models.

    python -m benchmarks.architectures [--only gemma2 phi3]

Each model has two layers, in float32, with whatever makes its architecture another one at values that a few dozen
tokens feel: windows of 8 tokens, soft caps, multipliers. Base and expert answer in one batch of one engine, each prompt's
and answer's log-probabilities are compared. The models are those of the tests (`tests/conftest.py`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.architecture import MODEL_TYPES
from deltamux.compression.checkpoint.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent
# vLLM multiplies all experts of a mixture in one kernel, which takes no delta a token.
MIXTURES = ("qwen3_moe", "mixtral")
# As they are published, and as vLLM takes them.
TIED_TYPES = ("gemma2", "gemma3_text", "smollm3")
SERVED_TYPES = tuple(each for each in MODEL_TYPES if each not in MIXTURES)
LENGTH, NEW_TOKENS = 30, 6
NAMES = ("expert", "base", "expert", "base")


def prepare(folder: Path, model_type: str, make: Any, text_file: Path) -> None:
    """Write base, expert, artifact and merged checkpoint below a folder."""
    base = make.save_base(folder / "base", model_type, tied=model_type in TIED_TYPES)
    tuned = make.save_expert(base, folder / "tuned")
    make.compress_tiny(base, tuned, folder / "artifact", text_file)
    artifact = Artifact(folder / "artifact")
    merge(open_checkpoint(base), artifact, folder / "expert", progress=False)


def differences(folder: Path) -> dict[str, float]:
    """The largest differences of log-probabilities in a prepared folder.

    Returns:
        Of the expert and of the base, each to transformers on its own weights; and of the expert to the base, which
        says that there was something to be served.
    """
    command = [sys.executable, "-m", "benchmarks.architectures", "--engine", str(folder)]
    environment = os.environ | {
        "VLLM_PLUGINS": "deltamux",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if not (folder / "answers.json").is_file():
        raise RuntimeError(done.stderr[-3000:])
    answers = json.loads((folder / "answers.json").read_text())
    own = {name: [a for a in answers if a["name"] == name] for name in NAMES}
    return {
        "expert": _largest(folder / "expert", own["expert"]),
        "base": _largest(folder / "base", own["base"]),
        "expert_to_base": _largest(folder / "base", own["expert"]),
    }


@torch.no_grad()
def _largest(checkpoint: Path, answers: list[dict[str, Any]]) -> float:
    from transformers import AutoModelForCausalLM

    # Other kernels know no soft caps.
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    largest = 0.0
    for answer in answers:
        ids = torch.tensor(answer["ids"])
        logs_TV = model(ids[None]).logits[0, :-1].log_softmax(dim=-1)
        wanted = logs_TV.gather(1, ids[1:, None]).squeeze(1)
        largest = max(largest, float((wanted - torch.tensor(answer["logs"])).abs().max()))
    return largest


def run_engine(folder: Path) -> None:
    """Answer prompts by base and expert in one batch, and write what the engine says of every token."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(folder / "base"),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=len(NAMES),
        enforce_eager=True,
        kv_cache_memory_bytes=2**24,
        enable_lora=True,
        max_loras=2,
        additional_config={"deltamux": {"version": 1}},
    )
    request = LoRARequest("expert", 1, str(folder / "artifact"))
    prompts = [[(7 * i + 13 * k) % 250 for i in range(LENGTH + k)] for k in range(len(NAMES))]
    outputs = engine.generate(
        [{"prompt_token_ids": each} for each in prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=0),
        lora_request=[request if name == "expert" else None for name in NAMES],
        use_tqdm=False,
    )
    answers = []
    for name, output in zip(NAMES, outputs, strict=True):
        ids = output.prompt_token_ids + list(output.outputs[0].token_ids)
        steps = output.prompt_logprobs[1:] + list(output.outputs[0].logprobs)
        logs = [step[token].logprob for step, token in zip(steps, ids[1:], strict=True)]
        answers.append({"name": name, "ids": ids, "logs": logs})
    (folder / "answers.json").write_text(json.dumps(answers))


def _makers() -> Any:
    """The tests' makers of tiny models."""
    spec = spec_from_file_location("tiny_models", ROOT / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["tiny_models"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SERVED_TYPES, default=SERVED_TYPES)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(arguments.engine)
        return
    make, found = _makers(), {}
    with tempfile.TemporaryDirectory() as scratch:
        text_file = Path(scratch) / "rows.jsonl"
        rows = [
            {"prompt": f"add {i} and {i + 3}", "response": f"it is {2 * i + 3}"} for i in range(12)
        ]
        text_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for model_type in arguments.only:
            folder = Path(scratch) / model_type
            prepare(folder, model_type, make, text_file)
            found[model_type] = differences(folder)
            print(
                f"{model_type:<12}",
                *(f"{k} {v:.1e}" for k, v in found[model_type].items()),
                flush=True,
            )
    record("architectures", found)


if __name__ == "__main__":
    main()
