"""Experts on a model hub: `org/name@revision` stands for the directory of a snapshot."""

import re
from pathlib import Path

from deltamux.compression.paths import resolve_directory
from deltamux.serve.settings import HUB_ID

# Seconds that a hub has to answer a question, twice; a download takes as long as it takes. Chosen, not measured.
ANSWER_SECONDS = 10.0


def local_directory(path: Path) -> Path:
    """Where an expert lies on this machine; a hub id is fetched, or taken from the cache if the hub is silent.

    Raises:
        ValueError: It is no directory and the hub does not give it; the message is one line.
    """
    if path.is_absolute() or path.exists() or not re.fullmatch(HUB_ID, str(path)):
        return path
    name, _, revision = str(path).partition("@")
    try:
        return _snapshot(name, revision)
    except (
        Exception
    ) as error:  # of the hub's client, of the connection, of the disk: none ends the server
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{str(path)!r} is no directory here, and the hub does not give it: {reason}"
        ) from error


def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Asked first, with a limit: the download itself would wait for a silent hub for minutes.
        HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS)
    except Exception:
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            pass  # the hub's own error says more than that nothing is cached
        raise
    return resolve_directory(name, revision)
