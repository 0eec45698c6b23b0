"""The compressed expert on disk, opened for reading.

A directory with `model.safetensors` (all tensors, see `stored.py`), `delta_config.json` (`manifest.py`),
`config.json` (the expert's, with `quantization_config.quant_method = "deltamux"`), `recipe.yaml`, tokenizer files
and a model card. A weight that the manifest does not list is the base's own.
"""

from math import prod
from pathlib import Path
from typing import Any

import torch

from deltamux.compression.artifact.entry import Form
from deltamux.compression.artifact.manifest import check_manifest, read_manifest, refuse_newer
from deltamux.compression.artifact.stored import Entry, Stored
from deltamux.compression.files import open_tensors, sha256
from deltamux.compression.names import FORMAT, WEIGHTS_FILE

# As safetensors names the dtypes of stored tensors.
DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


class Artifact:
    """A compressed expert opened for reading; tensors are read when asked for.

    The file's header is held against the manifest first: every tensor belongs to a weight, and has the dtype, shape
    and bytes that the weight's entry asks for.

    Raises:
        ValueError: Not an artifact, a newer format, or a truncated or inconsistent one.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.entries = {entry.name: entry for entry in self.manifest.tensors}
        self._weights = _open_weights(self.root / WEIGHTS_FILE)
        unclaimed = set(self._weights.keys())
        for entry in self.manifest.tensors:
            self._claim(entry, unclaimed)
        if unclaimed:
            raise self._inconsistent(f"holds {min(unclaimed)!r}, which its manifest does not list")

    def stored(self, name: str) -> Stored:
        """A weight, read from its tensors.

        Raises:
            ValueError: They are damaged, or not finite.
        """
        entry = self.entries[name]
        return entry.read({suffix: self._get(name, suffix) for suffix in entry.forms()})

    def check_servable(self) -> None:
        """Refuse what slots cannot hold.

        Raises:
            ValueError: The artifact was compressed losslessly, or changes a mixture of experts.
        """
        outside = next((e for e in self.manifest.tensors if e.slot_bytes is None), None)
        if outside is not None and outside.kind != "exact":
            raise ValueError(
                f"{str(self.root)!r} changes {outside.name!r} of a mixture of experts, which vLLM multiplies in one "
                "kernel that takes no delta a token: `deltamux merge` it and serve that checkpoint"
            )
        if outside is not None:
            raise ValueError(
                f"{str(self.root)!r} was compressed with --lossless, which no slot holds: compress "
                "the expert again without it, or `deltamux merge` it and serve that checkpoint"
            )

    def check_content(self) -> None:
        """Compare manifest and weights file with their hashes.

        Raises:
            ValueError: One was altered or damaged.
        """
        check_manifest(self.root)
        path = self.root / WEIGHTS_FILE
        size, told = path.stat().st_size, self.manifest.totals.weights_file_bytes
        if size != told:
            raise self._inconsistent(f"has {size:,} bytes of weights, its manifest says {told:,}")
        found = sha256(path)
        if found != self.manifest.weights_sha256:
            raise ValueError(
                f"{str(path)!r} has SHA-256 {found[:16]}…, its manifest says "
                f"{self.manifest.weights_sha256[:16]}…: copy or compress it again"
            )

    def total_bytes(self) -> int:
        """Bytes of every file of the artifact."""
        return sum(path.stat().st_size for path in self.root.iterdir() if path.is_file())

    def _get(self, name: str, suffix: str) -> torch.Tensor:
        tensor: torch.Tensor = self._weights.get_tensor(f"{name}.{suffix}")
        return tensor

    def _claim(self, entry: Entry, unclaimed: set[str]) -> None:
        """Hold a weight's tensors against its entry, and take them out of those that are unclaimed."""
        num_bytes = 0
        for suffix, form in entry.forms().items():
            name = f"{entry.name}.{suffix}"
            if name not in unclaimed:
                raise self._inconsistent(f"lists {entry.name!r} but holds no {suffix} for it")
            num_bytes += self._checked_bytes(name, form)
            unclaimed.remove(name)
        if num_bytes != entry.bytes:
            raise self._inconsistent(
                f"holds {num_bytes} bytes for {entry.name!r}, its manifest says {entry.bytes}"
            )

    def _checked_bytes(self, name: str, form: Form) -> int:
        """Bytes of a tensor of the form asked for, from the file's header alone."""
        header = self._weights.get_slice(name)
        shape, dtype = tuple(header.get_shape()), DTYPES.get(header.get_dtype())
        if dtype is None or not form.allows(dtype, shape):
            raise self._inconsistent(
                f"holds {name!r} as {header.get_dtype()} {list(shape)}, which is not what its "
                "manifest says"
            )
        return int(prod(shape)) * dtype.itemsize

    def _inconsistent(self, finding: str) -> ValueError:
        return ValueError(f"{str(self.root)!r} {finding}: copy or compress the expert again")


def _open_weights(path: Path) -> Any:
    weights = open_tensors(path, "copy or compress the expert again")
    metadata = weights.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a deltamux artifact: its format is not {FORMAT!r}")
    version = metadata.get("format_version", "")
    refuse_newer(path, int(version) if version.isdigit() else version)
    return weights
