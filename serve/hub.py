"""Experts on a model hub: `org/name@revision` stands for the directory of a snapshot."""

import re
from pathlib import Path

from deltamux.compression.paths import resolve_directory
from deltamux.serve.settings import HUB_ID


def local_directory(path: Path) -> Path:
    """Where an expert lies on this machine; a hub id is fetched unless it is cached.

    Raises:
        ValueError: It is no directory and the hub does not give it; the message is one line.
    """
    if path.is_absolute() or path.exists() or not re.fullmatch(HUB_ID, str(path)):
        return path
    name, _, revision = str(path).partition("@")
    try:
        return resolve_directory(name, revision)
    except (
        Exception
    ) as error:  # of the hub's client, of the connection, of the disk: none ends the server
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{str(path)!r} is no directory here, and the hub does not give it: {reason}"
        ) from error
