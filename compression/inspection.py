"""What `deltamux inspect` says of a compressed expert."""

from typing import Any

from deltamux.compression.artifact.artifact import Artifact, TensorEntry
from deltamux.compression.console import table
from deltamux.compression.evaluate import summary


def as_dictionary(opened: Artifact) -> dict[str, Any]:
    """For programs."""
    manifest = opened.manifest
    return {
        "expert": manifest.expert,
        "base": manifest.base.source,
        "format_version": manifest.format_version,
        "bytes": opened.total_bytes(),
        "totals": manifest.totals.model_dump(),
        "verification": manifest.verification,
        "tensors": len(manifest.tensors),
    }


def as_text(opened: Artifact) -> str:
    """For people: the totals, then a line for every kind of weight."""
    manifest = opened.manifest
    header = ("weight", "scheme", "tensors", "MB", "error", "16-bit channels")
    rows = [
        (kind, scheme, count, f"{size / 1e6:.3f}", f"{error:.4f}", salient)
        for kind, scheme, count, size, error, salient in _by_kind(opened)
    ]
    head = f"expert  {manifest.expert}\nbase    {manifest.base.source}\n{summary(manifest)}"
    return f"{head}\n\n{table(header, rows)}"


def _by_kind(opened: Artifact) -> list[tuple[str, str, int, int, float, int]]:
    """Kind, scheme, number, bytes, mean error and most 16-bit channels of alike weights."""
    groups: dict[tuple[str, str], list[TensorEntry]] = {}
    for entry in opened.manifest.tensors:
        module, kind = entry.name.rsplit(".", 2)[-2:]
        label = module if kind == "weight" else f"{module}.{kind}"
        groups.setdefault((label, _label(entry)), []).append(entry)
    return [
        (
            kind,
            scheme,
            len(entries),
            sum(entry.bytes for entry in entries),
            sum(entry.error for entry in entries) / len(entries),
            max(entry.classes.salient if entry.classes else 0 for entry in entries),
        )
        for (kind, scheme), entries in groups.items()
    ]


def _label(entry: TensorEntry) -> str:
    if entry.rank is not None:
        return "factors"
    return entry.scheme or ("lossless" if entry.exact else "exact")
