"""The compressed expert on disk: format_version 1.

A directory with `model.safetensors` (all tensors), `delta_config.json` (the manifest below),
`config.json` (the expert's, with `quantization_config.quant_method = "deltamux"`), `recipe.yaml`,
tokenizer files and a model card. Suffixes of the tensors behind the name of the weight they stand
for, with N output rows and K input channels:

| suffix | dtype, shape | meaning |
|---|---|---|
| `.codes` | int32 [R, words] or, ternary, uint8 [R, bytes] | codes at a fixed width (see `pack.py`) |
| `.deflated` | uint8 [bytes] | instead of `.codes`: the same under an entropy code (see `entropy.py`) |
| `.steps` | bfloat16 [R] or [1] | step of each row, or of all: Δ̂_ij = s_i (c_ij − z) |
| `.channels` | int32 [K'] | input channels that have codes, ascending; absent: all K |
| `.salient_channels` | int32 [C] | input channels with a 16-bit part, ascending |
| `.salient_values` | bfloat16 [N, C] | added to Δ̂ in those channels |
| `.rows` | uint8 [ceil(N / 8)] | bitmap of the R rows that have codes; absent: all N |
| `.left.…`, `.right.…` | as for a weight [N, r], [r, K] | Δ̂ as the product of two coded factors |
| `.inputs.…` | as for a weight [1 + k, K] | sketch of the inputs that the product is rounded under (see `noise_shaping.py`) |
| `.exact` | uint8 [bytes] | lossless: the weight itself relative to the base's (see `lossless.py`) |
| `.replacement` | as the expert's | a norm's own weight |
| `.delta` | float32 [N] | a bias's difference |

A weight that the manifest does not list is the base's own.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from deltamux.compression.artifact.entropy import deflate, inflate
from deltamux.compression.artifact.lossless import decode_exact
from deltamux.compression.artifact.pack import (
    pack_bitmap,
    pack_bits,
    pack_trits,
    unpack_bitmap,
    unpack_bits,
    unpack_trits,
)
from deltamux.compression.checkpoint.architecture import Role
from deltamux.compression.rounding.low_rank import FactoredDelta
from deltamux.compression.rounding.noise_shaping import InputSketch
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme

FORMAT = "deltamux"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "delta_config.json"
RECIPE_FILE = "recipe.yaml"
# Bits of a code at a fixed width; the other schemes have packings of their own.
SCHEME_BITS = {"int2": 2, "int3": 3, "int4": 4, "sign": 1}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseIdentity(_Model):
    """The base that a delta belongs to: its name, and a SHA-256 for each of its tensors."""

    source: str
    revision: str | None = None
    sha256: dict[str, str]


class ChannelClasses(_Model):
    """How many input channels are coded, have a 16-bit part, or are dropped."""

    coded: int
    salient: int
    dropped: int


class TensorEntry(_Model):
    """One weight that differs from the base.

    `error` is ‖(Δ − Δ̂) √h‖² / ‖Δ √h‖², with h the calibration energy of the input channels: the
    share of the delta's output energy that is lost. `bytes` counts every tensor of the weight.
    """

    name: str
    role: Role
    scheme: Scheme | None = None
    shape: tuple[int, ...]
    classes: ChannelClasses | None = None
    rows: int | None = None
    deflated: bool = False
    exact: bool = False
    rank: int | None = None
    input_directions: int | None = None
    folded_norm: str | None = None
    bytes: int
    error: float


class Totals(_Model):
    """Sums over the artifact; bytes of the weights file include its header."""

    linear_weights: int
    linear_bytes: int
    bits_per_weight: float
    embedding_bytes: int
    other_bytes: int
    weights_file_bytes: int
    expert_bytes: int


class Manifest(_Model):
    """`delta_config.json`."""

    format: Literal["deltamux"] = "deltamux"
    format_version: int = FORMAT_VERSION
    deltamux_version: str
    expert: str
    base: BaseIdentity
    tied_embeddings: bool
    weights_sha256: str
    tensors: list[TensorEntry]
    totals: Totals
    verification: dict[str, float] | None = Field(default=None)


def deltamux_version() -> str:
    """The installed version."""
    return version("deltamux")


def encode_matrix(name: str, quantized: QuantizedDelta | FactoredDelta) -> dict[str, torch.Tensor]:
    """The tensors that a quantized matrix is stored in, under the weight's name."""
    if isinstance(quantized, FactoredDelta):
        tensors = encode_matrix(f"{name}.left", quantized.left)
        tensors |= encode_matrix(f"{name}.right", quantized.right)
        if quantized.inputs is not None:
            tensors |= encode_matrix(f"{name}.inputs", quantized.inputs.coded)
        return tensors
    scheme, steps = quantized.scheme, quantized.steps_R
    suffix = "deflated" if quantized.deflated else "codes"
    same = len(steps) > 0 and bool((steps == steps[0]).all())
    tensors = {
        f"{name}.{suffix}": _encode_codes(quantized.codes_RC, scheme, quantized.deflated),
        f"{name}.steps": (steps[:1] if same else steps).clone(),
    }
    if quantized.rows_R is not None:
        changed = torch.zeros(quantized.shape[0], dtype=torch.bool)
        changed[quantized.rows_R] = True
        tensors[f"{name}.rows"] = pack_bitmap(changed)
    if quantized.channels_C is not None:
        tensors[f"{name}.channels"] = quantized.channels_C.to(torch.int32)
    if quantized.salient_channels_S is not None and quantized.salient_values_NS is not None:
        tensors[f"{name}.salient_channels"] = quantized.salient_channels_S.to(torch.int32)
        tensors[f"{name}.salient_values"] = quantized.salient_values_NS.contiguous()
    return tensors


def _encode_codes(codes: torch.Tensor, scheme: Scheme, deflated: bool) -> torch.Tensor:
    if deflated:
        return deflate(codes)
    if scheme is Scheme.TERNARY:
        return pack_trits(codes)
    return pack_bits(codes, SCHEME_BITS[scheme])


class Artifact:
    """A compressed expert opened for reading; tensors are read when asked for.

    Raises:
        ValueError: Not an artifact, a newer format, or a truncated or inconsistent one.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.entries = {entry.name: entry for entry in self.manifest.tensors}
        self._weights = _open_weights(self.root / WEIGHTS_FILE)
        self._keys = set(self._weights.keys())
        for entry in self.manifest.tensors:
            self._check(entry)

    def quantized(self, name: str) -> QuantizedDelta | FactoredDelta:
        """A matrix, unpacked from its tensors."""
        entry = self.entries[name]
        assert entry.scheme is not None
        rows, columns = entry.shape
        if entry.rank is not None:
            sketch = None
            if entry.input_directions is not None:
                shape = 1 + entry.input_directions, columns
                sketch = InputSketch(self._factor(f"{name}.inputs", entry.scheme, shape))
            return FactoredDelta(
                left=self._factor(f"{name}.left", entry.scheme, (rows, entry.rank)),
                right=self._factor(f"{name}.right", entry.scheme, (entry.rank, columns)),
                inputs=sketch,
            )
        salient = self._find(f"{name}.salient_channels")
        channels = self._find(f"{name}.channels")
        bitmap = self._find(f"{name}.rows")
        coded_rows = rows if entry.rows is None else entry.rows
        return QuantizedDelta(
            scheme=entry.scheme,
            shape=(rows, columns),
            codes_RC=self._codes(entry, coded_rows, columns if channels is None else len(channels)),
            steps_R=self._get(f"{name}.steps").expand(coded_rows),
            rows_R=None if bitmap is None else unpack_bitmap(bitmap, rows).nonzero().squeeze(1),
            channels_C=None if channels is None else channels.long(),
            salient_channels_S=None if salient is None else salient.long(),
            salient_values_NS=self._find(f"{name}.salient_values"),
            deflated=entry.deflated,
        )

    def _factor(self, name: str, scheme: Scheme, shape: tuple[int, ...]) -> QuantizedDelta:
        rows, columns = shape
        codes = inflate(self._get(f"{name}.deflated"), scheme.levels, rows, columns)
        steps_R = self._get(f"{name}.steps").expand(rows)
        return QuantizedDelta(scheme, (rows, columns), codes, steps_R, deflated=True)

    def _codes(self, entry: TensorEntry, rows: int, columns: int) -> torch.Tensor:
        assert entry.scheme is not None
        if entry.deflated:
            stream = self._get(f"{entry.name}.deflated")
            return inflate(stream, entry.scheme.levels, rows, columns)
        packed = self._get(f"{entry.name}.codes")
        if entry.scheme is Scheme.TERNARY:
            return unpack_trits(packed, columns)
        return unpack_bits(packed, SCHEME_BITS[entry.scheme], columns)

    def vector(self, name: str) -> torch.Tensor:
        """A norm's replacement or a bias's delta."""
        suffix = "replacement" if self.entries[name].role is Role.NORM else "delta"
        return self._get(f"{name}.{suffix}")

    def exact(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """A weight that was stored losslessly, in the base's dtype and shape."""
        return decode_exact(self._get(f"{name}.exact"), base)

    def check_servable(self) -> None:
        """Refuse what slots cannot hold.

        Raises:
            ValueError: The artifact was compressed losslessly.
        """
        if any(entry.exact for entry in self.manifest.tensors):
            raise ValueError(
                f"{str(self.root)!r} was compressed with --lossless, which no slot holds: compress "
                "the expert again without it, or `deltamux merge` it and serve that checkpoint"
            )

    def check_content(self) -> None:
        """Compare the weights file with the hash in the manifest.

        Raises:
            ValueError: The file was altered or damaged.
        """
        found = file_sha256(self.root / WEIGHTS_FILE)
        if found != self.manifest.weights_sha256:
            raise ValueError(
                f"{str(self.root / WEIGHTS_FILE)!r} has SHA-256 {found[:16]}…, its manifest says "
                f"{self.manifest.weights_sha256[:16]}…: copy or compress it again"
            )

    def total_bytes(self) -> int:
        """Bytes of every file of the artifact."""
        return sum(path.stat().st_size for path in self.root.iterdir() if path.is_file())

    def _get(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._weights.get_tensor(key)
        return tensor

    def _find(self, key: str) -> torch.Tensor | None:
        return self._get(key) if key in self._keys else None

    def _check(self, entry: TensorEntry) -> None:
        for suffix in _stored(entry):
            if f"{entry.name}.{suffix}" not in self._keys:
                raise ValueError(
                    f"{str(self.root)!r} lists {entry.name!r} but holds no {suffix} for it: "
                    "compress the expert again"
                )


def _stored(entry: TensorEntry) -> Iterator[str]:
    """Suffixes of the tensors that a weight must have."""
    if entry.exact:
        yield "exact"
    elif entry.rank is not None:
        yield from ("left.deflated", "left.steps", "right.deflated", "right.steps")
        if entry.input_directions is not None:
            yield from ("inputs.deflated", "inputs.steps")
    elif entry.role is Role.NORM:
        yield "replacement"
    elif entry.role is Role.BIAS:
        yield "delta"
    else:
        yield from ("deflated" if entry.deflated else "codes", "steps")
        if entry.rows is not None:
            yield "rows"
        if entry.classes and entry.classes.dropped:
            yield "channels"
        if entry.classes and entry.classes.salient:
            yield from ("salient_channels", "salient_values")


def _open_weights(path: Path) -> Any:
    try:
        weights = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is missing or truncated ({error}); copy or compress it again"
        ) from error
    metadata = weights.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a deltamux artifact: its format is not {FORMAT!r}")
    _refuse_newer(path, int(metadata.get("format_version", "0")))
    return weights


def read_manifest(root: Path) -> Manifest:
    """Read and check `delta_config.json`.

    Raises:
        ValueError: It is missing, newer than this version, or not a manifest.
    """
    path = root / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{str(root)!r} has no {MANIFEST_FILE}: it is not a compressed expert")
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            _refuse_newer(path, int(content.get("format_version", 0)))
        return Manifest.model_validate(content)
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{str(path)!r} is not a manifest: {error}") from error


def _refuse_newer(path: Path, found: int) -> None:
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version {found}, this deltamux reads up to {FORMAT_VERSION}: "
            "pip install --upgrade deltamux"
        )


def content_hash(root: Path) -> str:
    """The identity of an expert's content, 16 hex digits.

    It is the SHA-256 of the manifest, which itself carries the SHA-256 of the weights file.
    """
    return hashlib.sha256((root / MANIFEST_FILE).read_bytes()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def linear_entries(manifest: Manifest) -> Iterator[TensorEntry]:
    """The decoder's linears among the changed weights."""
    return (entry for entry in manifest.tensors if entry.role is Role.LINEAR)
