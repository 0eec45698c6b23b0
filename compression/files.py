"""The one place that opens what others wrote: regular files alone, and no more of them than a file of its kind may have.

A pipe blocks whoever opens it, a device never ends, and a file of another size than its kind's fills the memory. The
check is made on what was opened, not on its name: nobody can put something else in its place in between.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deltamux.compression.errors import naming

MIB = 1024**2
# Of the largest configuration, index or template that is read, and of the largest manifest; ours take some hundred
# bytes a weight. A tokenizer's vocabulary with its merges takes tens of megabytes. Chosen, not measured.
MOST_SETTINGS_BYTES = 16 * MIB
MOST_VOCABULARY_BYTES = 256 * MIB


@contextmanager
def open_regular(path: Path, most_bytes: int | None = None) -> Iterator[BufferedReader]:
    """Open a file for reading; an error while it is read names it, as one of opening does.

    Args:
        path: The file; links are followed.
        most_bytes: Refuse a larger one.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be opened or read.
        ValueError: It is a pipe, a device or a directory, or too large.
    """
    # Without O_NONBLOCK, the opening of a pipe would wait for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ValueError(f"{str(path)!r} is no regular file: put a file there")
    if most_bytes is not None and found.st_size > most_bytes:
        os.close(descriptor)
        raise ValueError(
            f"{str(path)!r} has {found.st_size:,} bytes, files of its kind have up to {most_bytes:,}"
        )
    try:
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_text(path: Path, most_bytes: int = MOST_SETTINGS_BYTES) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No regular file, too large, or no UTF-8.
    """
    with naming(path), open_regular(path, most_bytes) as file:
        return file.read().decode("utf-8")


def read_json(path: Path, most_bytes: int = MOST_SETTINGS_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: As `read_text`, or it is no JSON, or nested too deep.
    """
    text = read_text(path, most_bytes)
    with naming(path):
        try:
            return json.loads(text)
        except RecursionError as error:
            raise ValueError(f"{str(path)!r} is nested too deep: save it again") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_tensors(path: Path, way_out: str, framework: str = "pt") -> Any:
    """Open a safetensors file, whose header is checked against its size.

    Args:
        path: The file.
        way_out: What to do where it is missing or damaged.
        framework: Of the tensors.

    Raises:
        ValueError: It is missing, no regular file, truncated, or no safetensors file.
    """
    try:
        with open_regular(path):
            return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} is missing: {way_out}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is truncated or damaged ({error}): {way_out}") from error
