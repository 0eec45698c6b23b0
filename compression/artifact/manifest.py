"""`delta_config.json`: what an artifact is the delta of, what it holds, and what it was found to lose."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deltamux.compression.artifact.matrices import FactoredEntry
from deltamux.compression.artifact.stored import Entry, ReplacementEntry
from deltamux.compression.checkpoint.as_served import BaseQuantization
from deltamux.compression.files import MOST_SETTINGS_BYTES, open_regular, read_json
from deltamux.compression.names import FORMAT_VERSION, MANIFEST_FILE
from deltamux.compression.saving import save_text
from deltamux.compression.validation import problems


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseIdentity(_Model):
    """The base that a delta belongs to: its name, and a SHA-256 for each of its tensors.

    Attributes:
        quantization: How the server quantizes it, where the delta is from what that leaves; None: from what is stored.
    """

    source: str
    revision: str | None = None
    sha256: dict[str, str]
    quantization: BaseQuantization | None = None


class Totals(_Model):
    """Sums over the artifact.

    Attributes:
        linear_weights: Weights in the base's linears.
        linear_bytes: Bytes of their deltas in the file.
        bits_per_weight: The same in bits, for each of those weights.
        embedding_bytes: Bytes of embedding and lm_head.
        other_bytes: Bytes of norms and biases.
        weights_file_bytes: The weights file with its header.
        expert_bytes: The uncompressed expert.
        slot_bytes: The slot image with its head; None: no slot holds it.
        slot_bits_per_weight: Bits in the image for each weight of a linear, records included.
        slot_bits_overall: Bits of the whole image for each weight of the model.
    """

    linear_weights: int
    linear_bytes: int
    bits_per_weight: float
    embedding_bytes: int
    other_bytes: int
    weights_file_bytes: int
    expert_bytes: int
    slot_bytes: int | None = None
    slot_bits_per_weight: float | None = None
    slot_bits_overall: float | None = None


class Manifest(_Model):
    """The content of the file; `sha256` is that of all the rest (`manifest_sha256`)."""

    format: Literal["deltamux"] = "deltamux"
    format_version: int = FORMAT_VERSION
    deltamux_version: str
    expert: str
    base: BaseIdentity
    tied_embeddings: bool
    weights_sha256: str
    tensors: list[Entry]
    totals: Totals
    verification: dict[str, float] | None = None
    sha256: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of factors; 0: there are none."""
        ranks = [entry.rank for entry in self.tensors if isinstance(entry, FactoredEntry)]
        return max(ranks, default=0)

    @property
    def norms(self) -> frozenset[str]:
        """The norms whose weight is replaced."""
        return frozenset(e.name for e in self.tensors if isinstance(e, ReplacementEntry))

    @property
    def servable(self) -> bool:
        """Whether a slot can hold all of it."""
        return all(entry.slot_bytes is not None for entry in self.tensors)


def deltamux_version() -> str:
    """The installed version."""
    return version("deltamux")


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest of an artifact.

    Raises:
        ValueError: It is missing, newer than this version, or not a manifest.
    """
    path = root / MANIFEST_FILE
    if not root.is_dir():
        raise ValueError(
            f"{str(root)!r} is no directory: name one; what is on a hub has to be fetched first, with "
            "`hf download`"
        )
    if not path.exists():
        raise ValueError(f"{str(root)!r} has no {MANIFEST_FILE}: it is not a compressed expert")
    try:
        content = read_json(path)
        if isinstance(content, dict):
            refuse_newer(path, content.get("format_version", 0))
        manifest = Manifest.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        if "pip install" in str(error):
            raise
        raise ValueError(f"{str(path)!r} is not a manifest: {problems(error)}") from error
    names = [entry.name for entry in manifest.tensors]
    if len(set(names)) < len(names):
        raise ValueError(f"{str(path)!r} is not a manifest: it lists a weight twice")
    return manifest


def write_manifest(manifest: Manifest, root: Path) -> Manifest:
    """Write a manifest with the hash of its content; returns it."""
    content = json.loads(manifest.model_dump_json(exclude_none=True))
    sealed = manifest.model_copy(update={"sha256": manifest_sha256(content)})
    save_text(sealed.model_dump_json(indent=1, exclude_none=True), root / MANIFEST_FILE)
    return sealed


def check_manifest(root: Path) -> None:
    """Compare a manifest with the hash that it carries.

    Raises:
        ValueError: It was altered.
    """
    path = root / MANIFEST_FILE
    content = read_json(path)
    if content.get("sha256") != manifest_sha256(content):
        raise ValueError(
            f"{str(path)!r} was altered: its content has another SHA-256 than it says; copy or "
            "compress the expert again"
        )


def manifest_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content but for this hash itself, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(root: Path) -> str:
    """The identity of an expert's content, 16 hex digits.

    It is the SHA-256 of the manifest, which itself carries the SHA-256 of the weights file.
    """
    with open_regular(root / MANIFEST_FILE, MOST_SETTINGS_BYTES) as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def refuse_newer(path: Path, found: object) -> None:
    """Refuse a format version that this version does not read.

    Raises:
        ValueError: It is newer, or no version.
    """
    if not isinstance(found, int):
        raise ValueError(f"format_version is {found!r}")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version {found}, this deltamux reads up to {FORMAT_VERSION}: "
            "pip install --upgrade deltamux"
        )
