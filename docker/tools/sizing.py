"""How many slots and how much KV cache fit on a card, from a model's own config.json.

    python docker/tools/sizing.py                       the table of README.md
    python docker/tools/sizing.py path/to/base --slots 4

    device = base + slots · slot + tokens · kv + workspace ≤ utilization · card
    host   = experts · slot + process
    disk   = experts · (bits · linear weights + embeddings) / 8

`slot` is computed by allocating the server's own slot buffers on torch's meta device, so that it is what
the server will take. A slot holds 4-bit codes whatever the width on disk, and so does the host cache.
`base` counts 16-bit weights, `kv` 16-bit keys and values of one token.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltamux.serve.worker.ops import padded_shape
from deltamux.serve.worker.slots import MatrixSlots, SlotPlan, slot_bytes

GIB = 2**30
CARDS = (24, 48, 80)
UTILIZATION = 0.9  # vLLM's gpu_memory_utilization
WORKSPACE = 2 * GIB  # activations and captured graphs; vLLM logs its own measure at start
VOCABULARY_MULTIPLE = 64  # vLLM pads the embedding's rows to it
# The fields of config.json that matter, as published with the models.
KNOWN: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Mistral-7B-v0.3": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "model_type": "qwen2",
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a deployment; `linear` and `embeddings` count weights."""

    base: int
    slot: int
    kv_token: int
    linear: int
    embeddings: int

    def disk(self, bits: float) -> float:
        """Bytes of one expert on disk, its embeddings as wide as its linears."""
        return bits * (self.linear + self.embeddings) / 8

    def kv_tokens(self, card_gib: float, slots: int) -> int:
        """Tokens of KV cache beside the slots; negative where they do not fit."""
        left = UTILIZATION * card_gib * GIB - WORKSPACE - self.base - slots * self.slot
        return int(left // self.kv_token)


def linears(config: dict[str, Any]) -> list[tuple[list[int], int, bool]]:
    """Output slices, input channels and bias of the linears of one decoder layer, as vLLM merges them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads", heads) * head
    bias = config.get("model_type") == "qwen2" or bool(config.get("attention_bias"))
    return [
        ([heads * head, keys, keys], hidden, bias),
        ([hidden], heads * head, False),
        ([inner, inner], hidden, False),
        ([hidden], inner, False),
    ]


def sizes(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, salient: int = 8) -> Sizes:
    """The sizes of a base.

    Args:
        config: Its config.json.
        dtype: What it is served in.
        salient: `slot.salient_channels` of deltamux.yaml.
    """
    plan = SlotPlan(1, salient, dtype, torch.device("meta"))
    layers, hidden, vocabulary = (
        config[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    keys = config.get("num_key_value_heads", config["num_attention_heads"]) * head
    slot = linear = biases = 0
    for slices, columns, bias in linears(config):
        rows, room = sum(slices), salient * len(slices)
        slot += layers * slot_bytes(MatrixSlots(plan, rows, columns, room, bias))
        linear += layers * rows * columns
        biases += layers * rows * bias
    norms = [hidden] * (2 * layers + 1)
    if config.get("model_type") == "qwen3":
        norms += [head] * (2 * layers)
    slot += sum(size * dtype.itemsize + 1 for size in norms)
    padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    code_rows, code_columns = padded_shape(padded, hidden)
    slot += code_rows * (code_columns // 2 + dtype.itemsize)
    slot += slot_bytes(MatrixSlots(plan, vocabulary, hidden, 0, has_bias=False))
    tables = 1 if config.get("tie_word_embeddings") else 2
    weights = linear + biases + sum(norms) + padded * hidden + (tables - 1) * vocabulary * hidden
    kv_token = 2 * layers * keys * dtype.itemsize
    return Sizes(weights * dtype.itemsize, slot, kv_token, linear, tables * vocabulary * hidden)


def line(name: str, found: Sizes, slots: tuple[int, ...]) -> str:
    """One row of the table."""
    cells = [name, f"{found.base / GIB:.1f}", f"{found.slot / GIB:.2f}"]
    cells += [f"{found.disk(bits) / GIB:.2f}" for bits in (1, 2)]
    cells.append(f"{found.kv_token // 1024}")
    for card in CARDS:
        tokens = [found.kv_tokens(card, count) for count in slots]
        cells.append(" / ".join(f"{max(each, 0) // 1000}k" if each > 0 else "–" for each in tokens))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", type=Path, help="a folder with a config.json")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    slots = tuple(arguments.slots)
    shown = " / ".join(map(str, slots))
    bases = KNOWN
    if arguments.base:
        bases = {arguments.base.name: json.loads((arguments.base / "config.json").read_text())}
    head = "| base | weights, GiB | a slot, GiB | an expert on disk at 1 bit, GiB | at 2 bits, GiB "
    head += "| KV of a token, KiB |"
    head += "".join(f" {card} GB: tokens of KV with {shown} slots |" for card in CARDS)
    print(head)
    print("|---" * (6 + len(CARDS)) + "|")
    for name, config in bases.items():
        print(line(name, sizes(config), slots))


if __name__ == "__main__":
    main()
