"""What an expert is called: by clients, by vLLM, and on the way from one of its processes to another.

A client names an expert by a plain word. Inside vLLM the word and the path of the artifact carry a hash
of its content, so that vLLM's prefix cache never serves one version's keys to another: releases before
0.32 key on the name alone, later ones on name and path.
"""

import re
from pathlib import Path

# Model names with a meaning of their own.
AUTO = "auto"
BASE = "base"
# The label under which requests for models that do not exist are counted.
UNKNOWN = "unknown"
RESERVED_NAMES = (AUTO, BASE, UNKNOWN)
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
VERSION_MARK = "@"


def check_expert_name(name: str) -> None:
    """Refuse a name that could not be told from another model's, or that is no plain word.

    Raises:
        ValueError: The message names the rule.
    """
    if name in RESERVED_NAMES:
        raise ValueError(f"an expert cannot be called {name!r}: the name is taken")
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"an expert's name is up to 64 letters, digits, '.', '_' and '-', got {name!r}"
        )


def versioned_path(path: Path, content: str) -> str:
    """`path@content`: how a request names an expert's artifact."""
    return f"{path}{VERSION_MARK}{content}"


def artifact_path(versioned: str) -> Path:
    """The directory behind a versioned path (or a bare one)."""
    path, mark, version = versioned.rpartition(VERSION_MARK)
    return Path(path) if mark and "/" not in version else Path(versioned)


def versioned_name(name: str, content: str, lora_id: int) -> str:
    """What vLLM calls one version of an expert; it compares LoRA requests by this name alone."""
    return f"{name}{VERSION_MARK}{content}.{lora_id}"


def public_name(lora_name: str) -> str:
    """The expert's name behind a versioned name."""
    return lora_name.partition(VERSION_MARK)[0]
