"""How many slots and how much KV cache fit on a card, from a model's own config.json.

    python docker/tools/sizing.py                       the table of docs/operations.md
    python docker/tools/sizing.py path/to/base --slots 4
    python docker/tools/sizing.py path/to/base --ranks 2          for each of two cards (tensor parallelism)

    device = base + slots · slot + tokens · kv + workspace ≤ utilization · card
    host   = experts · slot + process
    disk   = experts · (bits · linear weights + embeddings) / 8

`slot` is the image of the largest expert (`compression/image`), host cache and slot alike: head and records, and
`--slot-bits` for each weight, which is what `deltamux compress --slot-bits` keeps linears to. An expert that is there already
says its own size: `deltamux inspect`. `base` counts 16-bit weights, `kv` 16-bit keys and values of one token.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamux.compression.image.layout import head_bytes, section_bytes, slot_size

GIB = 2**30
CARDS = (24, 48, 80)
UTILIZATION = 0.9  # vLLM's gpu_memory_utilization
WORKSPACE = 2 * GIB  # activations and captured graphs; vLLM logs its own measure at start
SLOT_BITS = 2.2  # what the preset `balanced` keeps to
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

    def on_rank(self, ranks: int, kv_heads: int) -> "Sizes":
        """What one of several cards has that share every matrix; a head of keys and values is on one at least."""
        heads = max(kv_heads // ranks, 1)
        return replace(
            self,
            base=self.base // ranks,
            slot=self.slot // ranks,
            kv_token=self.kv_token * heads // kv_heads,
        )

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


def sizes(config: dict[str, Any], slot_bits: float = SLOT_BITS, itemsize: int = 2) -> Sizes:
    """The sizes of a base and of what stands beside it.

    Args:
        config: Its config.json.
        slot_bits: Bits of a weight in a slot.
        itemsize: Bytes of the base's weights, and of keys and values.
    """
    layers, hidden, vocabulary = (
        config[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    keys = config.get("num_key_value_heads", config["num_attention_heads"]) * head
    per_layer = linears(config)
    linear = layers * sum(sum(slices) * columns for slices, columns, _ in per_layer)
    biases = layers * sum(sum(slices) for slices, _, bias in per_layer if bias)
    own_norms = [head] * 2 if config.get("model_type") == "qwen3" else []
    norms = [hidden] * (2 * layers + 1) + own_norms * layers
    tables = 1 if config.get("tie_word_embeddings") else 2
    padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    weights = linear + biases + sum(norms) + tables * padded * hidden
    # Per layer seven linears, as many biases where there are any, and norms; around them embedding, norm, head.
    records = layers * (7 + 3 * bool(biases) + 2 + len(own_norms)) + 1 + tables
    vectors = section_bytes(4 * (biases + sum(norms)))
    coded = int(slot_bits * (linear + tables * vocabulary * hidden) / 8)
    slot = slot_size(head_bytes(records) + coded + vectors)
    kv_token = 2 * layers * keys * itemsize
    return Sizes(itemsize * weights, slot, kv_token, linear, tables * vocabulary * hidden)


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
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--slot-bits", type=float, default=SLOT_BITS)
    parser.add_argument("--ranks", type=int, default=1, help="cards that share every matrix")
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
        kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
        found = sizes(config, arguments.slot_bits).on_rank(arguments.ranks, kv_heads)
        print(line(name, found, slots))


if __name__ == "__main__":
    main()
