"""What can be said of a base before vLLM takes its time to load it; each refusal is one line."""

from pathlib import Path
from typing import Any

from deltamux.compression.errors import naming
from deltamux.compression.files import MOST_VOCABULARY_BYTES, read_json
from deltamux.compression.names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

# Settings of config.json that quantization leaves as they are.
SHAPE_SETTINGS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
TOKENIZER_FILE = "tokenizer.json"


def check_base(root: Path, ranks: int, has_tokenizer: bool) -> None:
    """Refuse a base that cannot be served with experts.

    Args:
        root: Its directory.
        ranks: Devices that share every matrix.
        has_tokenizer: Whether its own tokenizer is the one that will be used.

    Raises:
        ValueError: Weights of two kinds lie in it, it is quantized already, ranks do not divide its matrices, or its
            tokenizer has tokens without a row or is damaged.
    """
    check_one_set_of_weights(root)
    if not (root / CONFIG_FILE).is_file():
        return  # vLLM's own to refuse
    config = read_json(root / CONFIG_FILE)
    if not isinstance(config, dict):
        return
    check_not_quantized(root, config)
    check_ranks(root, config, ranks)
    if has_tokenizer:
        check_tokenizer(root, config)


def check_one_set_of_weights(root: Path) -> None:
    """Refuse a base beside whose weights vLLM would load others.

    Without an index vLLM loads every safetensors file of the folder.

    Raises:
        ValueError: There is another one.
    """
    other = sorted(path.name for path in root.glob("*.safetensors") if path.name != WEIGHTS_FILE)
    if (root / WEIGHTS_FILE).exists() and other and not (root / INDEX_FILE).is_file():
        raise ValueError(
            f"{str(root)!r} holds {other[0]!r} beside {WEIGHTS_FILE!r}, and vLLM would load both: move it "
            "to another folder"
        )


def check_not_quantized(root: Path, config: dict[str, Any]) -> None:
    """Refuse a checkpoint that is quantized already: its tensors are none that experts are deltas of.

    Raises:
        ValueError: It is; the message has the method.
    """
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "an unnamed method")
        raise ValueError(
            f"{str(root)!r} is quantized by {method!r}, and experts are deltas of the weights before that: name the "
            "16-bit base under base.model, and this checkpoint under base.quantized"
        )


def check_quantized(root: Path, quantized: Path) -> None:
    """Refuse a quantized checkpoint that is none, or of another base, as far as embeddings tell.

    Args:
        root: The 16-bit base.
        quantized: The checkpoint that is to be served in its place.

    Raises:
        ValueError: It is not quantized, of another architecture or shape, or has another embedding.
    """
    import torch

    from deltamux.compression.checkpoint.architecture import EMBEDDING
    from deltamux.compression.checkpoint.checkpoint import open_checkpoint

    base, served = open_checkpoint(root), open_checkpoint(quantized)
    if not isinstance(served.config.get("quantization_config"), dict):
        raise ValueError(
            f"{str(quantized)!r} has no quantization_config: drop base.quantized, or name a quantized checkpoint there"
        )
    for key in SHAPE_SETTINGS:
        ours, theirs = base.config.get(key), served.config.get(key)
        if ours != theirs:
            raise ValueError(
                f"{str(quantized)!r} is quantized from another base than {str(root)!r}: {key} is {theirs!r} there "
                f"and {ours!r} here"
            )
    if EMBEDDING in served:
        ours, theirs = base.load(EMBEDDING).float(), served.load(EMBEDDING).float()
        # float16 and bfloat16 of one number differ by less.
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=2**-7, atol=1e-6):
            raise ValueError(
                f"{str(quantized)!r} is quantized from another base than {str(root)!r}: its {EMBEDDING!r} is another"
            )


def check_ranks(root: Path, config: dict[str, Any], ranks: int) -> None:
    """Refuse ranks that do not divide a base's heads and rows.

    Raises:
        ValueError: They do not; the message names the numbers that do.
    """
    heads = config.get("num_attention_heads")
    if ranks == 1 or not isinstance(heads, int):
        return
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("intermediate_size")

    def divide(count: int) -> bool:
        # Where there are fewer heads of keys and values than ranks, several ranks have the same.
        shared = kv_heads % count == 0 or count % kv_heads == 0
        return heads % count == 0 and shared and (not isinstance(width, int) or width % count == 0)

    if not divide(ranks):
        able = ", ".join(str(count) for count in range(1, heads + 1) if divide(count))
        raise ValueError(
            f"tensor_parallel_size is {ranks}, which does not divide the {heads} heads, {kv_heads} heads of keys and "
            f"values and {width} rows of {str(root)!r}: take one of {able}"
        )


def check_tokenizer(root: Path, config: dict[str, Any]) -> None:
    """Refuse a tokenizer with tokens that no row of the embedding stands for.

    Raises:
        ValueError: It has, and the message names the first; or the file is none of a tokenizer.
    """
    rows = config.get("vocab_size")
    path = root / TOKENIZER_FILE
    if not isinstance(rows, int) or not path.is_file():
        return
    content = read_json(path, MOST_VOCABULARY_BYTES)
    with naming(path):
        vocabulary = content["model"]["vocab"]
        # Unigram models list their pieces, each with a score, in the order of their ids.
        pieces = enumerate(vocabulary) if isinstance(vocabulary, list) else ()
        ids = {piece[0]: number for number, piece in pieces} or dict(vocabulary)
        ids |= {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise ValueError(
            f"{str(path)!r} has the token {token!r} with id {number}, the embedding has {rows} rows: resize the base "
            f"to {beyond[-1][0] + 1} rows and save it, or take the tokenizer that belongs to it"
        )
