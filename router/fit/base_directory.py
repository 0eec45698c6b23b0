"""The base whose token ids the router reads: a directory, or a hub id."""

from pathlib import Path
from typing import Final

from deltamux.router.decide.config import TOKENIZER_FILE
from deltamux.router.fit.embedding import embedding_file

_FIRST_FILES: Final = [TOKENIZER_FILE, "model.safetensors.index.json"]


def resolve_base(base: str) -> Path:
    """Return a directory with the base's tokenizer and, where there is one, its input embedding.

    Args:
        base: A checkpoint directory (needs no network), or a hub id such as `org/name`. Of a
            sharded checkpoint on the hub only the shard with the embedding is downloaded.

    Raises:
        ValueError: It is neither a directory nor a model that the hub can give.
    """
    directory = Path(base).expanduser()
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = Path(snapshot_download(base, allow_patterns=_FIRST_FILES))
        shard = embedding_file(found)
        weights = shard.name if shard else "model.safetensors"
        return Path(snapshot_download(base, allow_patterns=[*_FIRST_FILES, weights]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"base {base!r} is neither a directory nor a model that the hub gives "
            f"({type(error).__name__}); pass the directory of the served base"
        ) from error
