"""A base of Mistral-7B's shapes without its weights, and random experts of it as slot images."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from deltamux.compression.image.layout import Field, Record, float_bits, head_bytes, section_bytes
from deltamux.compression.image.planes import BLOCK_COLUMNS, blocks, row_stride

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
# As measured on an expert of 1 bit a weight on disk.
ESCAPES = 0.007
# Small enough that random experts leave a random model's activations finite.
STEP = 1e-4


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


def image_bytes(config: dict[str, Any]) -> int:
    """What the random image of a base takes."""
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
    return max(1, int(ESCAPES * min(columns, BLOCK_COLUMNS)))


def random_record(rows: int, columns: int, rng: np.random.Generator) -> Record:
    """One plane of uniform codes around nought, and escapes."""
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
