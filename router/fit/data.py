"""Labelled prompts from JSON lines.

Accepted layouts:

- a file: every row has `domain`, and `prompt` or `messages`;
- a folder of files `NAME.jsonl`: a row without `domain` belongs to NAME. Of `NAME-train.jsonl` and
  `NAME-test.jsonl`, or plain `train.jsonl` and `test.jsonl`, one is read: they are splits of one
  set, and no name of a domain;
- a folder of folders, each with `train.jsonl` (and `test.jsonl` to evaluate): a row without `domain`
  belongs to the folder's name. Folders without such a file are left out, as are names that begin
  with a dot.
"""

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltamux.router.decide.artifact import Fingerprints, fingerprint
from deltamux.router.decide.messages import user_turns


@dataclass(frozen=True)
class Prompt:
    """The user's turns of one row, oldest first, and its domain."""

    turns: tuple[str, ...]
    domain: str


@dataclass(frozen=True)
class Dataset:
    """Labelled prompts and what was noticed while reading them.

    Attributes:
        prompts: Without exact duplicates within a domain.
        files: The files that were read.
        num_duplicates: Rows dropped because their domain already had the same prompt.
        conflicts: Prompts that occur under more than one domain; they are kept.
        pinned: The first so many prompts are fitted on, however many there are.
    """

    prompts: list[Prompt]
    files: list[Path]
    num_duplicates: int
    conflicts: list[tuple[str, ...]]
    pinned: int = 0


def read_dataset(path: Path, splits: Sequence[str] = ("train",)) -> Dataset:
    """Read labelled prompts.

    Args:
        path: A file or a folder, as above.
        splits: In a folder of folders, the file stems to look for; the first one found is read.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: No file or no row is there, or a row is malformed (named by file and line).
    """
    sources = _sources(path, splits)
    prompts: dict[Prompt, None] = {}
    num_rows = 0
    for file, domain in sources:
        for prompt in _rows(file, domain):
            prompts[prompt] = None
            num_rows += 1
    if not prompts:
        raise ValueError(
            f"no prompts in {path}; give a .jsonl file, or a folder with one .jsonl file or one "
            f"sub-folder with {splits[0]}.jsonl for each domain"
        )
    files = [file for file, _ in sources]
    return Dataset(list(prompts), files, num_rows - len(prompts), _conflicts(list(prompts)))


def _conflicts(prompts: Sequence[Prompt]) -> list[tuple[str, ...]]:
    """Prompts under more than one domain."""
    domains: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for prompt in prompts:
        domains[prompt.turns].add(prompt.domain)
    return [turns for turns, names in domains.items() if len(names) > 1]


def read_of(file: Path, domain: str) -> Dataset:
    """Read the prompts of one domain, whatever domain the rows name: an expert's calibration file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: No row is there, or a row is malformed (named by file and line).
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; give the expert's calibration rows")
    rows = [Prompt(prompt.turns, domain) for prompt in _rows(file, domain)]
    if not rows:
        raise ValueError(f"no prompts in {file}")
    prompts = list(dict.fromkeys(rows))
    return Dataset(prompts, [file], len(rows) - len(prompts), [])


def join(datasets: Sequence[Dataset]) -> Dataset:
    """Return several data sets as one."""
    everything = [prompt for dataset in datasets for prompt in dataset.prompts]
    prompts = list(dict.fromkeys(everything))
    return Dataset(
        prompts,
        [file for dataset in datasets for file in dataset.files],
        sum(d.num_duplicates for d in datasets) + len(everything) - len(prompts),
        _conflicts(prompts),
    )


def read_unlabelled(file: Path) -> list[tuple[str, ...]]:
    """Read the different prompts of a JSONL file, a decision log among them; no labels are needed.

    Rows without a prompt (feedback, hashed decisions) are left out.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not JSON, named by file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; give a log or JSON lines of prompts")
    found: dict[tuple[str, ...], None] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                check_encoding(line, str(file))
            try:
                row = parse_json(line) if line.strip() else None
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            if not isinstance(row, dict):
                continue
            turns = user_turns(row.get("messages") or row.get("prompt") or [])
            if turns:
                found[tuple(turns)] = None
    return list(found)


def fingerprints(prompts: Sequence[Prompt]) -> Fingerprints:
    """Return 64 bits of a hash of each prompt's words, uint64 [N]; case and spaces do not count."""
    return np.array([fingerprint(prompt.turns) for prompt in prompts], dtype=np.uint64)


def parse_turns(row: object) -> list[str]:
    """Return the user turns of one row.

    Raises:
        ValueError: The row is not an object with a string `prompt` or a list `messages`.
    """
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    if isinstance(row.get("prompt"), str):
        return user_turns(row["prompt"])
    if isinstance(row.get("messages"), list):
        return user_turns(row["messages"])
    raise ValueError("a row needs 'prompt' (a string) or 'messages' (a list)")


def check_encoding(first_line: bytes, source: str) -> None:
    """Refuse a file in UTF-16 by its first bytes.

    Raises:
        ValueError: Names the file and the way out.
    """
    if first_line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{source} is in UTF-16; save it as UTF-8")


def parse_json(line: bytes) -> object:
    """Read one JSON value.

    Raises:
        ValueError: It is not valid UTF-8 or JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("the value is nested too deeply") from error


def _sources(path: Path, splits: Sequence[str]) -> list[tuple[Path, str | None]]:
    """Files to read, each with the domain of rows that name none."""
    if path.is_file():
        return [(path, None)]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}; give the labelled prompts")
    shown = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    by_domain: defaultdict[str | None, dict[str | None, Path]] = defaultdict(dict)
    for file in shown:
        if file.suffix == ".jsonl":
            domain, split = _split_name(file.stem)
            by_domain[domain][split] = file
    files: list[tuple[Path, str | None]] = []
    for domain, found in by_domain.items():
        # A file without a split is read in any case; of the splits, the first that is wanted.
        wanted = [found[split] for split in splits if split in found][:1]
        files += [(file, domain) for file in ([found[None]] if None in found else wanted)]
    for folder in filter(Path.is_dir, shown):
        inside = [folder / f"{split}.jsonl" for split in splits]
        files += [(file, folder.name) for file in inside if file.is_file()][:1]
    return sorted(files)


def _split_name(stem: str) -> tuple[str | None, str | None]:
    """The domain and the split that a file's name tells, None for what it does not tell."""
    match = re.fullmatch(r"(?:(.+)[-_.])?(train|test|validation|valid|val|dev|eval)", stem, re.I)
    return (match[1], match[2].lower()) if match else (stem, None)


def _rows(file: Path, default_domain: str | None) -> Iterator[Prompt]:
    """Prompts of one file; blank lines are skipped."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                check_encoding(line, str(file))
            if not line.strip():
                continue
            try:
                yield _prompt(parse_json(line), default_domain)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error


def _prompt(row: object, default_domain: str | None) -> Prompt:
    """One row, checked."""
    turns = parse_turns(row)
    if not turns:
        raise ValueError("the row holds no text of a user")
    domain = row.get("domain", default_domain) if isinstance(row, dict) else None
    if not isinstance(domain, str) or not domain.strip():
        raise ValueError(f"'domain' must be a non-empty string, got {domain!r}")
    return Prompt(tuple(turns), domain.strip())
