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

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltamux.compression.artifact.artifact import TensorEntry

KEY_FILE = "key.json"


@dataclass(frozen=True)
class Measured:
    """One matrix: what every rung would put into the manifest, and the delta's output energy.

    Attributes:
        name: The weight.
        layer: Decoder layer.
        energy: tr(Δ H Δᵀ), squared output units a token.
        entries: One for each rung, ascending in bytes.
    """

    name: str
    layer: int
    energy: float
    entries: tuple[TensorEntry, ...]


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
            root.mkdir(parents=True)
            (root / KEY_FILE).write_text(json.dumps(key))

    def has(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return self._index(layer).is_file()

    def save(self, layer: int, measured: list[Measured], tensors: dict[str, torch.Tensor]) -> None:
        """Keep a layer; tensor names are those of `rung_name`."""
        save_file(tensors, self._weights(layer))
        content = [
            {
                "name": matrix.name,
                "energy": matrix.energy,
                "entries": [entry.model_dump(mode="json") for entry in matrix.entries],
            }
            for matrix in measured
        ]
        scratch = self._index(layer).with_suffix(".part")
        scratch.write_text(json.dumps(content))
        scratch.replace(self._index(layer))

    def measured(self, layer: int) -> list[Measured]:
        """The matrices of a finished layer."""
        return [
            Measured(
                name=matrix["name"],
                layer=layer,
                energy=matrix["energy"],
                entries=tuple(TensorEntry.model_validate(entry) for entry in matrix["entries"]),
            )
            for matrix in json.loads(self._index(layer).read_text())
        ]

    def tensors(self, matrix: Measured, rung: int) -> dict[str, torch.Tensor]:
        """The stored tensors of one rung, under the weight's own name."""
        prefix = rung_name("", rung)
        with safe_open(self._weights(matrix.layer), framework="pt") as file:
            return {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - a file handle, not a mapping
                if key.startswith(f"{prefix}{matrix.name}.")
            }

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.root)

    def _index(self, layer: int) -> Path:
        return self.root / f"layer-{layer:04d}.json"

    def _weights(self, layer: int) -> Path:
        return self.root / f"layer-{layer:04d}.safetensors"


def rung_name(tensor: str, rung: int) -> str:
    """The name of a rung's tensor inside a layer's file."""
    return f"{rung}/{tensor}"


def _same_key(path: Path, key: dict[str, object]) -> bool:
    try:
        found: object = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return bool(found == json.loads(json.dumps(key)))
