"""The tiny random base and experts that `fleet.py` serves; by itself it measures nothing."""

import json
import os
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

COMMAND = [sys.executable, "-m", "deltamux.serve"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
END = "<|end|>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


ENGINE = {
    "served_model_name": "tiny",
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**26,
}


def build(folder: Path, experts: int, slots: int) -> list[str]:
    """Write a base, its experts and a `deltamux.yaml`; the experts' names."""
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint
    from deltamux.compression.compress import compress
    from deltamux.compression.recipe import Recipe
    from deltamux.compression.streaming.rows import read_rows
    from deltamux.compression.streaming.text import encode_rows

    rows = [{"prompt": f"add {i} and {i + 3}", "response": f"it is {2 * i + 3}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(), dtype=torch.float32)
    _save(model, folder / "base")
    names = [f"expert-{number}" for number in range(1, experts + 1)]
    recipe = Recipe.model_validate({"linear": {"scheme": "int2"}})
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        tuned = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
        _save(tuned, folder / f"tuned-{name}")
        pair = open_checkpoint(folder / "base"), open_checkpoint(folder / f"tuned-{name}")
        samples = encode_rows(read_rows(folder / "rows.jsonl"), folder / f"tuned-{name}", 64)
        compress(*pair, folder / name, recipe, calibration=samples, held_out=[], progress=False)
    content = {
        "base": {"model": "base"},
        "experts": [{"name": name, "path": name} for name in names],
        "slots": slots,
        "host_cache": "1GiB",
        "engine": ENGINE,
    }
    (folder / "deltamux.yaml").write_text(yaml.safe_dump(content))
    return names


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=256,
    )


def _save(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
