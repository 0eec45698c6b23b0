"""Which tokens end an expert's turn: all that its files name.

Three files may say it, and training libraries change one and leave the others: `generation_config.json`
(`eos_token_id`), `config.json` (the same, or in its `text_config`) and `tokenizer_config.json` (`eos_token`, a text).
transformers and vLLM stop at the first two's, training ends turns with the third's: the union stops where either would.
"""

import json
from pathlib import Path
from typing import Any

from deltamux.compression.errors import naming
from deltamux.compression.names import CONFIG_FILE

GENERATION_FILE = "generation_config.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"


def stop_ids(root: Path) -> list[int]:
    """The ids of the tokens that end a turn, those of `generation_config.json` first.

    Args:
        root: A checkpoint or artifact.

    Raises:
        ValueError: A file is damaged, or what it names is no token id.
    """
    found: list[int] = []
    for name in (GENERATION_FILE, CONFIG_FILE):
        settings = read_settings(root / name)
        inner = settings.get("text_config")
        for each in (settings, inner if isinstance(inner, dict) else {}):
            found += _ids(each.get("eos_token_id"), root / name)
    return list(dict.fromkeys([*found, *_of_tokenizer(root)]))


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object beside a checkpoint; empty where there is no such file.

    Raises:
        ValueError: It is no JSON object.
    """
    if not path.is_file():
        return {}
    with naming(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is no JSON object: save it again")
    return content


def _ids(value: object, path: Path) -> list[int]:
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool) or each < 0:
            raise ValueError(
                f"{str(path)!r} has the eos_token_id {value!r}, which is no token: write an id, or a list of ids"
            )
    return ids


def _of_tokenizer(root: Path) -> list[int]:
    """The id of the tokenizer's own end token, where its files say which."""
    token = read_settings(root / TOKENIZER_SETTINGS_FILE).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    content = read_settings(root / "tokenizer.json")
    with naming(root / "tokenizer.json", "save the tokenizer again"):
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or []}
        vocabulary = (content.get("model") or {}).get("vocab")
    if token in added:
        return [added[token]]
    return [vocabulary[token]] if isinstance(vocabulary, dict) and token in vocabulary else []
