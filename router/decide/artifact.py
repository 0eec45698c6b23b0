"""The router's directory on disk, format version 1.

- `router.safetensors`: `tokens` and `words` float16 [V, D], `pairs` float16 [B, D], `trust` float16
  [V, 2], `bias` float32 [D], and with a sentence encoder `meaning` float16 [E, D], in the terms of
  `tables.py`, columns in the order of the configuration's `labels` (a router without `words` and
  `trust` is read as `tables.py` says); `seen` uint64 [N], sorted, the fingerprints of the training
  prompts (`data.py`), by which an evaluation finds prompts that were trained on; `__metadata__` is
  {"format": "deltamux-router"} (one key, since safetensors writes several in no fixed order, and
  the same fit should give the same bytes).
- `router_config.json`: see `config.py`; UTF-8, keys in the schema's order.
- `tokenizer.json`: a copy of the base's tokenizer, so that a text can be routed with the directory
  alone. Its SHA-256 is in the configuration.

A directory appears complete or not at all: it is written beside its place and then renamed.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deltamux.router.decide.config import (
    CONFIG_FILE,
    FORMAT,
    TABLES_FILE,
    TOKENIZER_FILE,
    RouterConfig,
    parse_config,
)
from deltamux.router.decide.encoder import WIDTH as SENTENCE_WIDTH
from deltamux.router.decide.tables import Floats, Tables

# Of the largest files that are read. Chosen, not measured: tables of 256 thousand tokens and 64 domains take 33 MB.
MOST_CONFIG_BYTES: Final = 16 * 2**20
MOST_TABLES_BYTES: Final = 2 * 2**30

# Tensor that the classifier does not read.
SEEN: Final = "seen"

Fingerprints = npt.NDArray[np.uint64]

# Tensors in float16.
_TABLES: Final = ("tokens", "pairs", "meaning", "words", "trust")
ARTIFACT_FILES = frozenset({CONFIG_FILE, TABLES_FILE, TOKENIZER_FILE})


def fingerprint(turns: Sequence[str]) -> int:
    """Return 64 bits of a hash of a prompt's words; case and spaces do not count."""
    words = " ".join(" ".join(turns).lower().split()).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def check_target(directory: Path) -> None:
    """Refuse to write over anything that is not a router.

    Raises:
        ValueError: The path exists and is neither an empty directory nor a router's.
    """
    if not directory.exists():
        return
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {"a file"}
    if names and not (CONFIG_FILE in names and names <= ARTIFACT_FILES):
        raise ValueError(
            f"{directory} exists and does not hold a router alone; give another directory to write"
        )


def save_artifact(
    directory: Path,
    tables: Tables,
    config: RouterConfig,
    tokenizer: bytes,
    *,
    seen: Fingerprints | None = None,
) -> int:
    """Write the three files, replacing an earlier router.

    Args:
        directory: Where to write; its parents are made.
        tables: The weights; stored as float16, the bias as float32.
        config: Its shapes must fit the tables.
        tokenizer: The bytes of `tokenizer.json`.
        seen: Fingerprints of the training prompts; None for none.

    Returns:
        Bytes written.

    Raises:
        ValueError: The target holds something else, or a weight is not finite in float16.
    """
    check_target(directory)
    arrays = _arrays(tables) | ({} if seen is None else {SEEN: seen})
    files = {
        TABLES_FILE: save(arrays, metadata={"format": FORMAT}),
        CONFIG_FILE: (config.model_dump_json(indent=2) + "\n").encode(),
        TOKENIZER_FILE: tokenizer,
    }
    _replace(directory, files)
    return sum(map(len, files.values()))


def _arrays(tables: Tables) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of the file, without `seen`."""
    found = {name: _half(table) for name in _TABLES if (table := getattr(tables, name)) is not None}
    return {**found, "bias": tables.bias.astype(np.float32)}


def _replace(directory: Path, files: dict[str, bytes]) -> None:
    """Write a directory's files; it appears complete or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        # A sub-directory, because a temporary directory itself is closed to other users.
        fresh = Path(scratch, "new")
        fresh.mkdir()
        for name, data in files.items():
            _write(fresh / name, data)
        if directory.exists():
            shutil.move(directory, Path(scratch, "old"))
        os.replace(fresh, directory)  # noqa: PTH105 - the rename is the commit; say so


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); {len(data):,} bytes are needed there"
        ) from error


def load_artifact(directory: Path) -> tuple[RouterConfig, Tables]:
    """Read configuration and tables, and check them against each other.

    Raises:
        FileNotFoundError: The directory or one of the two files is missing.
        ValueError: A file is truncated, of another kind or version, or they do not fit together.
    """
    config_path, tables_path = directory / CONFIG_FILE, directory / TABLES_FILE
    for path, most in ((config_path, MOST_CONFIG_BYTES), (tables_path, MOST_TABLES_BYTES)):
        # is_file: a pipe would block whoever opens it, a device never end.
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {directory}; fit a router there first")
        if path.stat().st_size > most:
            raise ValueError(f"{path} has more than {most:,} bytes; fit the router again")
    config = parse_config(config_path.read_text(encoding="utf-8"), config_path)
    arrays = _read_tables(tables_path)
    num_domains = len(config.labels)
    shapes = {
        "tokens": (config.vocab_size, num_domains),
        "pairs": (config.buckets, num_domains),
        "bias": (num_domains,),
    }
    if config.encoder is not None:
        shapes["meaning"] = (SENTENCE_WIDTH, num_domains)
    # Both or neither: a router that was fitted before they were made has neither.
    if not {"words", "trust"}.isdisjoint(arrays):
        shapes |= {"words": (config.vocab_size, num_domains), "trust": (config.vocab_size, 2)}
    for name, shape in shapes.items():
        got = arrays[name].shape if name in arrays else "no such tensor"
        if got != shape:
            raise ValueError(
                f"{tables_path}: {name!r} must have shape {shape} to fit {CONFIG_FILE}, got {got}; "
                "fit the router again"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{tables_path}: {name!r} is not finite; fit the router again")
    return config, Tables(**{name: arrays[name] for name in shapes})


def load_seen(directory: Path) -> Fingerprints:
    """Return the fingerprints of a router's training prompts, uint64 [N]; empty where unknown."""
    with safe_open(directory / TABLES_FILE, framework="numpy") as file:
        if SEEN not in file.keys():  # noqa: SIM118 - not a mapping
            return np.zeros(0, dtype=np.uint64)
        found: Fingerprints = file.get_tensor(SEEN)
        return found


def _read_tables(path: Path) -> dict[str, Floats]:
    """All tensors of a file as float32."""
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} does not hold a router's tables")
            names = [name for name in file.keys() if name != SEEN]  # noqa: SIM118 - not a mapping
            return {name: file.get_tensor(name).astype(np.float32) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it again or fit the router again"
        ) from error


def _half(table: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """Round to float16."""
    largest = float(np.abs(table).max(initial=0.0))
    if not largest < float(np.finfo(np.float16).max):
        raise ValueError(f"weights must be finite in float16, got a magnitude of {largest}")
    return table.astype(np.float16)
