"""A Hugging Face checkpoint, read tensor by tensor.

A checkpoint is a directory (or a hub id) with `config.json` and safetensors weights, in one file or
sharded by `model.safetensors.index.json`. Nothing is read until it is asked for, so that memory
stays near the largest tensor in use.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltamux.compression.checkpoint.architecture import (
    EMBEDDING,
    LM_HEAD,
    Role,
    architecture,
    is_tied,
)
from deltamux.compression.checkpoint.as_served import BaseQuantization, as_served
from deltamux.compression.checkpoint.weights_files import (
    check_file,
    open_safetensors,
    tensor_files,
    what_else,
)
from deltamux.compression.errors import naming
from deltamux.compression.files import read_json
from deltamux.compression.names import CONFIG_FILE
from deltamux.compression.paths import resolve_directory
from deltamux.compression.saving import make_folder

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
# Chat templates beside the default one, each in a file.
TEMPLATES_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Attributes:
        root: The directory.
        source: What the user named: the directory or the hub id.
        revision: The hub revision asked for, if any.
        files: Tensor name to the file that holds it.
        spare_head: The file with an lm_head that the configuration ties to the embedding.
        head_shared: Whether lm_head is listed, and is the embedding's weight.
        longer: The checkpoint that rows of the vocabulary which this one lacks are taken from.
        quantization: How the server quantizes the linears, which are read as it has them; hashes are of what is stored.
    """

    root: Path
    source: str
    revision: str | None
    files: dict[str, Path]
    spare_head: Path | None = None
    head_shared: bool = False
    longer: "Checkpoint | None" = None
    quantization: BaseQuantization | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        path = self.root / CONFIG_FILE
        config = read_json(path)
        if not isinstance(config, dict):
            raise ValueError(f"{str(path)!r} is no configuration: fetch or save it again")
        if self.longer is not None:
            config["vocab_size"] = self.shape(EMBEDDING)[0]
        return config

    @property
    def tied(self) -> bool:
        """Whether lm_head shares the embedding's weight."""
        return LM_HEAD not in self.files

    def as_tied(self) -> "Checkpoint":
        """The same without an lm_head of its own."""
        files = {name: path for name, path in self.files.items() if name != LM_HEAD}
        return replace(self, files=files)

    def with_head(self) -> "Checkpoint":
        """A tied checkpoint with an lm_head of its own, which is the embedding's weight."""
        files = self.files | {LM_HEAD: self.files[EMBEDDING]}
        return replace(self, files=files, head_shared=True)

    def filled_up(self, longer: "Checkpoint") -> "Checkpoint":
        """The same with as many rows of vocabulary as another one, whose rows stand where this one has none.

        Checkpoints whose vocabulary was resized to their tokenizer's tokens lack the rows that a base has beyond.
        """
        return replace(self, longer=longer)

    def as_served(self, quantization: BaseQuantization | None) -> "Checkpoint":
        """The same, its linears as a server has them that quantizes them."""
        return replace(self, quantization=quantization)

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """Names of the weights that the server quantizes."""
        if self.quantization is None:
            return frozenset()
        specs = architecture(self.config).specs
        return frozenset(spec.name for spec in specs if spec.role is Role.LINEAR)

    def head_is_embedding(self) -> bool:
        """Whether the lm_head in the files, if there is one, is the embedding once more."""
        path = self.spare_head or self.files.get(LM_HEAD)
        if path is None:
            return True
        with open_safetensors(path) as file:
            head = file.get_tensor(LM_HEAD)
        return torch.equal(head, self.load(EMBEDDING))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        stored = self._stored_name(name)
        if stored not in self._shapes:
            with self._open(stored):
                pass  # which says what is wrong
        if self._is_filled_up(name):
            assert self.longer is not None
            return self.longer.shape(name)
        return self._shapes[stored]

    def _is_filled_up(self, name: str) -> bool:
        return self.longer is not None and name in (EMBEDDING, LM_HEAD)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all stored tensors: opening a file reads all of its header."""
        found: dict[str, tuple[int, ...]] = {}
        for path in set(self.files.values()):
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118 - a file handle, not a mapping
                    if self.files.get(name) == path:
                        found[name] = tuple(file.get_slice(name).get_shape())
        return found

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading its values."""
        name = self._stored_name(name)
        with self._open(name) as file:
            values = file.get_slice(name)
            # A single number has nothing to cut.
            empty = values[:0] if values.get_shape() else file.get_tensor(name)
            dtype: torch.dtype = empty.dtype
        return dtype

    def load(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU: as stored, but for rows from `longer`, and float32 where the server quantizes it.

        Raises:
            ValueError: The checkpoint has no such tensor.
        """
        tensor = self._stored(name)
        if self._is_filled_up(name):
            assert self.longer is not None
            rest = self.longer.load(name)[len(tensor) :].to(tensor.dtype)
            tensor = torch.cat([tensor, rest])
        if name in self._quantized:
            assert self.quantization is not None
            tensor = as_served(tensor, self.quantization)
        return tensor

    def _stored(self, name: str) -> torch.Tensor:
        name = self._stored_name(name)
        with self._open(name) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def sha256(self, name: str) -> str:
        """SHA-256 of a tensor's bytes as stored, with its dtype and shape in front."""
        tensor = self._stored(name)
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tensor_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def side_files(self) -> Iterator[Path]:
        """Tokenizer, chat templates and generation defaults, as far as present."""
        for name in SIDE_FILES:
            if (self.root / name).is_file():
                yield self.root / name
        yield from sorted((self.root / TEMPLATES_FOLDER).glob("*.jinja"))

    def copy_side_files(self, target: Path) -> None:
        """Copy them into a directory."""
        for path in self.side_files():
            copy = target / path.relative_to(self.root)
            make_folder(copy.parent)
            with naming(copy, f"{path.stat().st_size:,} bytes are needed there"):
                shutil.copy2(path, copy)

    def total_bytes(self) -> int:
        """Bytes of weights, configuration, tokenizer and template together."""
        side = sum(path.stat().st_size for path in self.side_files())
        return self.tensor_bytes() + side + (self.root / CONFIG_FILE).stat().st_size

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if self.head_shared and name == LM_HEAD else name

    def _open(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"tensor {name!r} is missing from {self.source!r}")
        file = open_safetensors(self.files[name])
        if name not in file.keys():  # noqa: SIM118 - a file handle, not a mapping
            raise ValueError(
                f"{str(self.files[name])!r} lacks the tensor {name!r}, which the index of "
                f"{self.source!r} places there: fetch or save the checkpoint again"
            )
        return file


def open_checkpoint(
    source: str | Path, revision: str | None = None, cache: str | Path | None = None
) -> Checkpoint:
    """Open a checkpoint directory or hub id; reads headers only.

    Args:
        source: A directory, or a hub id that is fetched to (or found in) the local cache.
        revision: Hub revision; ignored for a directory.
        cache: Where hub ids are kept; None: where huggingface_hub keeps them.

    Raises:
        ValueError: No safetensors weights, no configuration, or an incomplete shard.
    """
    root = resolve_directory(str(source), revision, cache)
    config = root / CONFIG_FILE
    if not config.exists() and not config.is_symlink():
        raise ValueError(f"{str(source)!r} {what_else(root)}")
    check_file(config)
    files = tensor_files(root, str(source))
    checkpoint = Checkpoint(root=root, source=str(source), revision=revision, files=files)
    if LM_HEAD in files and is_tied(checkpoint.config):
        # Some savers write the shared weight twice.
        return replace(checkpoint, spare_head=files.pop(LM_HEAD, None))
    return checkpoint
