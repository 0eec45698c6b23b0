"""What people name on a command line: files, folders, hub ids.

A shell expands `~` only at the beginning of a word, so that `--output=~/x` arrives as it is written: every path is
expanded here. A folder that is there is meant before a hub id; of what is neither, the missing folder is said first.
"""

import re
from pathlib import Path

# Of a repository: everything but weights in other formats.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.yaml", "README.md", "merges.txt"]
# As the hub allows them: letters, digits, dots, dashes and underscores around one slash.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def user_path(text: str) -> Path:
    """A path as a user writes it, for `typer.Option(parser=user_path)`."""
    return Path(text).expanduser()


def resolve_directory(
    source: str, revision: str | None = None, cache: str | Path | None = None
) -> Path:
    """The local directory of a checkpoint or compressed expert; a hub id is fetched unless it is cached.

    Args:
        source: A directory, or a hub id.
        revision: Of the hub id.
        cache: Where hub ids are kept; None: where huggingface_hub keeps them.

    Raises:
        ValueError: It is neither, or the hub does not give it.
    """
    path = user_path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{source!r} is a file: name the folder that it is in")
    if path.is_symlink():
        raise ValueError(f"{source!r} is a link to {str(path.readlink())!r}, which is not there")
    if not HUB_ID.fullmatch(source):
        raise ValueError(
            f"no folder {source!r} is there: {source!r} is neither a directory nor a hub id like "
            "'org/name'"
        )
    return _fetched(source, revision, cache)


def _fetched(source: str, revision: str | None, cache: str | Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            source, revision=revision, cache_dir=cache, allow_patterns=PATTERNS
        )
    except LocalEntryNotFoundError as error:
        reason = (
            "the hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not hold it"
        )
        raise ValueError(_not_there(source, reason)) from error
    # Errors of the hub come from a dozen classes of several libraries.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(_not_there(source, reason)) from error
    return Path(folder)


def _not_there(source: str, reason: str) -> str:
    return (
        f"no folder {source!r} is there, and as a hub id it could not be fetched ({reason}): check "
        "the path, or fetch it first"
    )
