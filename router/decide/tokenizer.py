"""From text to token ids, with a `tokenizer.json` alone.

A router's features are token ids, so a router belongs to one tokenizer. The SHA-256 of what
 `tokenizer.json` says is its identity: indentation, the order of keys, truncation and padding
(which routing switches off) do not change a token id, so they do not count.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from deltamux.router.decide.config import CONFIG_FILE, TOKENIZER_FILE, parse_config

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]

_NOT_ROUTED: Final = frozenset({"truncation", "padding"})


def tokenizer_sha256(directory: str | Path) -> str:
    """Return the identity of a directory's `tokenizer.json` as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: The directory has no `tokenizer.json`.
        ValueError: It is not JSON.
    """
    return identity(read_tokenizer(directory))


def identity(tokenizer_json: bytes) -> str:
    """Return the SHA-256 of what a `tokenizer.json` says, as 64 hexadecimal digits.

    Raises:
        ValueError: The bytes are not a JSON object.
    """
    try:
        content = json.loads(tokenizer_json)
    except ValueError as error:
        raise ValueError(f"{TOKENIZER_FILE} cannot be read: {error}") from error
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in _NOT_ROUTED}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


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
    check_tokenizer(config.tokenizer_sha256, identity(data))
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
