"""A Hugging Face checkpoint, read tensor by tensor.

A checkpoint is a directory (or a hub id) with `config.json` and safetensors weights, in one file or
sharded by `model.safetensors.index.json`. Nothing is read until it is asked for, so that memory
stays near the largest tensor in use.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltamux.compression.checkpoint.architecture import EMBEDDING, LM_HEAD
from deltamux.compression.errors import naming
from deltamux.compression.names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

# What a tokenizer, a chat template and generation defaults are kept in.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# What is fetched of a hub's repository.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Attributes:
        root: The directory.
        source: What the user named: the directory or the hub id.
        revision: The hub revision asked for, if any.
        files: Tensor name to the file that holds it.
        spare_head: The file with an lm_head that the configuration ties to the embedding.
    """

    root: Path
    source: str
    revision: str | None
    files: dict[str, Path]
    spare_head: Path | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        path = self.root / CONFIG_FILE
        with naming(path):
            config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{str(path)!r} is no configuration: fetch or save it again")
        return config

    @property
    def tied(self) -> bool:
        """Whether lm_head shares the embedding's weight."""
        return LM_HEAD not in self.files

    def as_tied(self) -> "Checkpoint":
        """The same without an lm_head of its own."""
        files = {name: path for name, path in self.files.items() if name != LM_HEAD}
        return replace(self, files=files)

    def head_is_embedding(self) -> bool:
        """Whether the lm_head in the files, if there is one, is the embedding once more."""
        path = self.spare_head or self.files.get(LM_HEAD)
        if path is None:
            return True
        with _open_safetensors(path) as file:
            head = file.get_tensor(LM_HEAD)
        return torch.equal(head, self.load(EMBEDDING))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading its values."""
        with self._open(name) as file:
            values = file.get_slice(name)
            # A single number has nothing to cut.
            empty = values[:0] if values.get_shape() else file.get_tensor(name)
            dtype: torch.dtype = empty.dtype
        return dtype

    def load(self, name: str) -> torch.Tensor:
        """The tensor as stored, on the CPU.

        Raises:
            ValueError: The checkpoint has no such tensor.
        """
        with self._open(name) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def sha256(self, name: str) -> str:
        """SHA-256 of a tensor's bytes as stored, with its dtype and shape in front."""
        tensor = self.load(name)
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tensor_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def side_files(self) -> Iterator[Path]:
        """Tokenizer, chat template and generation defaults, as far as present."""
        for name in SIDE_FILES:
            if (self.root / name).is_file():
                yield self.root / name

    def total_bytes(self) -> int:
        """Bytes of weights, configuration, tokenizer and template together."""
        side = sum(path.stat().st_size for path in self.side_files())
        return self.tensor_bytes() + side + (self.root / CONFIG_FILE).stat().st_size

    def _open(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"tensor {name!r} is missing from {self.source!r}")
        file = _open_safetensors(self.files[name])
        if name not in file.keys():  # noqa: SIM118 - a file handle, not a mapping
            raise ValueError(
                f"{str(self.files[name])!r} lacks the tensor {name!r}, which the index of "
                f"{self.source!r} places there: fetch or save the checkpoint again"
            )
        return file


def _open_safetensors(path: Path) -> Any:
    # A pipe or device would block or never end.
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file: fetch or save the checkpoint again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is not a complete safetensors file ({error}); fetch or save it again"
        ) from error


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint directory or hub id; reads headers only.

    Args:
        source: A directory, or a hub id that is fetched to (or found in) the local cache.
        revision: Hub revision; ignored for a directory.

    Raises:
        ValueError: No safetensors weights, no configuration, or an incomplete shard.
    """
    root = resolve_directory(str(source), revision)
    if not (root / CONFIG_FILE).is_file():
        raise ValueError(f"{str(source)!r} has no {CONFIG_FILE}: name a Hugging Face checkpoint")
    files = _tensor_files(root, str(source))
    checkpoint = Checkpoint(root=root, source=str(source), revision=revision, files=files)
    if checkpoint.config.get("tie_word_embeddings"):
        # Some savers write the shared weight twice.
        return replace(checkpoint, spare_head=files.pop(LM_HEAD, None))
    return checkpoint


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that other users may read, such as a container's.

    safetensors itself gives it to its owner alone, whatever the umask.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with naming(path, f"{needed:,} bytes are needed there"):
        save_file(tensors, path, metadata=metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def resolve_directory(source: str, revision: str | None = None) -> Path:
    """The local directory of a checkpoint; a hub id is fetched unless it is cached."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source!r} is neither a directory nor a hub id like 'org/name'")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES))


def _tensor_files(root: Path, source: str) -> dict[str, Path]:
    index = root / INDEX_FILE
    if index.is_file():
        with naming(index):
            weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
            missing = sorted({file for file in weight_map.values() if not (root / file).is_file()})
        if missing:
            raise ValueError(f"{source!r} names the shard {missing[0]!r}, which is not there")
        return {name: root / file for name, file in weight_map.items()}
    single = root / WEIGHTS_FILE
    if not single.is_file():
        raise ValueError(
            f"{source!r} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: save it as safetensors first"
        )
    with _open_safetensors(single) as file:
        return dict.fromkeys(file.keys(), single)
