"""Finished layers of a compression on disk, so that an interrupted run goes on where it stopped.

One safetensors file and one JSON file a layer hold every rung of every matrix: the JSON file is
written last, so that a layer without it counts as not begun. `key.json` says what the layers were
made from; layers of anything else are deleted. Because every rung is kept, another budget needs no new
calibration either.
"""

import json
import shutil
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
    """

    name: str
    layer: int
    energy: float
    entries: tuple[LinearEntry, ...]

    @property
    def num_weights(self) -> int:
        """Weights of the matrix."""
        rows, columns = self.entries[0].shape
        return rows * columns


ENTRIES = TypeAdapter(tuple[LinearEntry, ...])


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

    def has(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return self._index(layer).is_file()

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
        save_tensors(tensors, self._weights(layer), {})
        content = [
            {
                "name": ladder.name,
                "energy": ladder.energy,
                "entries": ENTRIES.dump_python(ladder.entries, mode="json"),
            }
            for ladder in ladders
        ]
        scratch = self._index(layer).with_suffix(".part")
        save_text(json.dumps(content), scratch)
        scratch.replace(self._index(layer))

    def ladders(self, layer: int) -> list[Ladder]:
        """The linears of a finished layer."""
        return [
            Ladder(
                name=found["name"],
                layer=layer,
                energy=found["energy"],
                entries=ENTRIES.validate_python(found["entries"]),
            )
            for found in json.loads(self._index(layer).read_text())
        ]

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

    def _weights(self, layer: int) -> Path:
        return self.root / f"layer-{layer:04d}.safetensors"


def _same_key(path: Path, key: dict[str, object]) -> bool:
    try:
        found: object = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return bool(found == json.loads(json.dumps(key)))
