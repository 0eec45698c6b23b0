"""Which tokens end an expert's turn: all that its files name.

Three files may say it, and training libraries change one and leave the others: `generation_config.json`
(`eos_token_id`), `config.json` (the same, or in its `text_config`) and `tokenizer_config.json` (`eos_token`, a text).
transformers and vLLM stop at the first two's, training ends turns with the third's: the union stops where either would.
"""

from pathlib import Path

from deltamux.compression.checkpoint.settings import read_side_settings
from deltamux.compression.errors import naming
from deltamux.compression.files import MOST_VOCABULARY_BYTES, read_json


def stop_ids(root: Path) -> list[int]:
    """The ids of the tokens that end a turn, those of `generation_config.json` first.

    Args:
        root: A checkpoint or artifact.

    Raises:
        ValueError: A file is damaged, or what it names is no token id.
    """
    return read_side_settings(root, token_id=lambda token: _token_id(root, token)).stop_ids


def _token_id(root: Path, token: str) -> int | None:
    """The id of a token in the tokenizer of a checkpoint, None where it has no such token."""
    path = root / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_json(path, MOST_VOCABULARY_BYTES)
    with naming(path, "save the tokenizer again"):
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or []}
        vocabulary = (content.get("model") or {}).get("vocab")
    found = added.get(token)
    if found is None and isinstance(vocabulary, dict):
        found = vocabulary.get(token)
    return found if isinstance(found, int) else None
