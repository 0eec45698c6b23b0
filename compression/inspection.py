"""What `deltamux inspect` says of a compressed expert."""

from math import prod
from typing import Any

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.stored import Entry
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
    """For people: the totals, then a line for every kind of weight, on disk and in a slot."""
    manifest = opened.manifest
    header = ("weight", "kind", "tensors", "MB", "bits", "slot MB", "slot bits", "error")
    rows = []
    for (weight, kind), entries in _by_kind(opened).items():
        weights = sum(prod(entry.shape) for entry in entries)
        sizes = sum(e.bytes for e in entries), sum(e.slot_bytes or 0 for e in entries)
        columns = [f"{value:.3f}" for size in sizes for value in (size / 1e6, size * 8 / weights)]
        error = sum(entry.error for entry in entries) / len(entries)
        rows.append((weight, kind, len(entries), *columns, f"{error:.4f}"))
    head = f"expert  {manifest.expert}\nbase    {manifest.base.source}\n{summary(manifest)}"
    return f"{head}\n\n{table(header, rows)}"


def _by_kind(opened: Artifact) -> dict[tuple[str, str], list[Entry]]:
    """Entries by module and kind."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in opened.manifest.tensors:
        module, kind = entry.name.rsplit(".", 2)[-2:]
        weight = module if kind == "weight" else f"{module}.{kind}"
        groups.setdefault((weight, entry.label), []).append(entry)
    return groups
