"""Finished layers of a compression on disk, so that an interrupted run goes on where it stopped.

One safetensors file and one JSON file a layer hold the rungs of every matrix: the JSON file is
written last, so that a layer without it counts as not begun. Another JSON file holds what all rungs were
predicted to take and to lose, where only some are measured. `key.json` says what the layers were
made from; layers of anything else are deleted.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import safe_open

from deltamux.compression.artifact.stored import Encoded, LinearEntry
from deltamux.compression.saving import make_folder, save_tensors, save_text

KEY_FILE = "key.json"


@dataclass(frozen=True)
class Ladder:
    """One linear: what every rung would put into the manifest, and the delta's output energy.

    Attributes:
        name: The weight.
        layer: Decoder layer.
        energy: tr(Δ H Δᵀ), squared output units a token.
        entries: One for each rung, ascending in bytes.
        steps: Which of the linear's steps each rung has (`coded_steps`); empty where all its ways were measured.
    """

    name: str
    layer: int
    energy: float
    entries: tuple[LinearEntry, ...]
    steps: tuple[int, ...] = ()

    @property
    def num_weights(self) -> int:
        """Weights of the matrix."""
        rows, columns = self.entries[0].shape
        return rows * columns


ENTRIES = TypeAdapter(tuple[LinearEntry, ...])
LADDERS = TypeAdapter(list[Ladder])
# Steps that are to be measured, by the linear's name.
Wanted = Mapping[str, Sequence[int]]


class Workspace:
    """The layers finished so far.

    Args:
        root: A directory of its own.
        key: What the layers depend on; JSON values.
    """

    def __init__(self, root: Path, key: dict[str, object]) -> None:
        self.root = root
        if not _same_key(root / KEY_FILE, key):
            shutil.rmtree(root, ignore_errors=True)
            make_folder(root)
            save_text(json.dumps(key), root / KEY_FILE)

    def has(self, layer: int, wanted: Wanted | None = None) -> bool:
        """Whether a layer is finished: with these steps of its linears at least, or with all ways."""
        if not self._index(layer).is_file():
            return False
        ladders = self.ladders(layer)
        if wanted is None:
            return not any(ladder.steps for ladder in ladders)
        return all(
            not ladder.steps or set(wanted.get(ladder.name, ())) <= set(ladder.steps)
            for ladder in ladders
        )

    def has_predicted(self, layer: int) -> bool:
        """Whether a layer's rungs were predicted."""
        return self._predictions(layer).is_file()

    def save(self, layer: int, ladders: list[Ladder], rungs: dict[str, list[Encoded]]) -> None:
        """Keep a layer.

        Args:
            layer: Its index.
            ladders: Of its linears.
            rungs: Those of every ladder, by the linear's name.
        """
        tensors = {
            f"{index}/{name}": tensor
            for encoded in rungs.values()
            for index, each in enumerate(encoded)
            for name, tensor in each.named_tensors().items()
        }
        self._index(layer).unlink(missing_ok=True)
        save_tensors(tensors, self._weights(layer), {})
        _save_ladders(ladders, self._index(layer))

    def save_predicted(self, layer: int, ladders: list[Ladder]) -> None:
        """Keep what was predicted of a layer."""
        _save_ladders(ladders, self._predictions(layer))

    def ladders(self, layer: int) -> list[Ladder]:
        """The linears of a finished layer."""
        return LADDERS.validate_json(self._index(layer).read_bytes())

    def predicted(self, layer: int) -> list[Ladder]:
        """The linears of a layer as predicted."""
        return LADDERS.validate_json(self._predictions(layer).read_bytes())

    def rung(self, ladder: Ladder, index: int) -> Encoded:
        """One rung of a ladder."""
        entry = ladder.entries[index]
        with safe_open(self._weights(ladder.layer), framework="pt") as file:
            parts = {
                suffix: file.get_tensor(f"{index}/{ladder.name}.{suffix}")
                for suffix in entry.forms()
            }
        return Encoded(entry, parts)

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.root)

    def _index(self, layer: int) -> Path:
        return self.root / f"layer-{layer:04d}.json"

    def _predictions(self, layer: int) -> Path:
        return self.root / f"predicted-{layer:04d}.json"

    def _weights(self, layer: int) -> Path:
        return self.root / f"layer-{layer:04d}.safetensors"


def _save_ladders(ladders: list[Ladder], path: Path) -> None:
    scratch = path.with_suffix(".part")
    save_text(LADDERS.dump_json(ladders).decode(), scratch)
    scratch.replace(path)


def _same_key(path: Path, key: dict[str, object]) -> bool:
    try:
        found: object = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return bool(found == json.loads(json.dumps(key)))
