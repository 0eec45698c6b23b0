"""From text to token ids, with a `tokenizer.json` alone.

A router's features are token ids, so a router belongs to one tokenizer. The SHA-256 of
`tokenizer.json` is its identity.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltamux.router.decide.config import CONFIG_FILE, TOKENIZER_FILE, parse_config

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


def tokenizer_sha256(directory: str | Path) -> str:
    """Return the SHA-256 of a directory's `tokenizer.json` as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: The directory has no `tokenizer.json`.
    """
    return hashlib.sha256(read_tokenizer(directory)).hexdigest()


def read_tokenizer(directory: str | Path) -> bytes:
    """Return the bytes of a directory's `tokenizer.json`.

    Raises:
        FileNotFoundError: The directory has no `tokenizer.json`.
    """
    path = Path(directory, TOKENIZER_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"no {TOKENIZER_FILE} in {directory}; save the base's fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return path.read_bytes()


def build_encode(tokenizer_json: bytes) -> tuple[Encode, int]:
    """Return an encode function and the size of its vocabulary.

    The function adds no special tokens, and neither truncates nor pads.

    Raises:
        ValueError: The bytes are not a tokenizer.
    """
    tokenizer = _tokenizer(tokenizer_json)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    return encode, size


def build_decode(tokenizer_json: bytes) -> Decode:
    """Return the function from token ids back to text.

    Raises:
        ValueError: The bytes are not a tokenizer.
    """
    tokenizer = _tokenizer(tokenizer_json)

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids)
        return text

    return decode


def _tokenizer(tokenizer_json: bytes) -> Any:
    """The tokenizer of a `tokenizer.json`, without truncation and padding."""
    from tokenizers import Tokenizer

    # The library raises bare Exception.
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    except Exception as error:
        raise ValueError(f"{TOKENIZER_FILE} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_tokenizer(path: str | Path) -> Encode:
    """Return the encode function of a router's directory.

    Args:
        path: A router's directory, as written by `deltamux router fit`.

    Raises:
        FileNotFoundError: `tokenizer.json` or `router_config.json` is missing.
        ValueError: The tokenizer is not the one that the router was fitted with.
    """
    directory = Path(path)
    data = read_tokenizer(directory)
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {directory}; fit a router there first")
    config = parse_config(config_path.read_text(encoding="utf-8"), config_path)
    check_tokenizer(config.tokenizer_sha256, hashlib.sha256(data).hexdigest())
    return build_encode(data)[0]


def check_tokenizer(expected: str, got: str) -> None:
    """Refuse a tokenizer other than the router's own.

    Raises:
        ValueError: The two SHA-256 differ.
    """
    if expected != got:
        raise ValueError(
            f"the router was fitted with the tokenizer {expected[:12]}, got {got[:12]}; "
            "fit the router again with --tokenizer set to the served base"
        )
