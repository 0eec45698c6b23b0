"""The model card of a compressed expert (Hugging Face `README.md` with front matter)."""

from pathlib import Path

from deltamux.compression.artifact.manifest import Manifest
from deltamux.compression.recipe import CODED, Recipe

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}, compressed by deltamux

The delta of a full fine-tune against its base, at {{ bits }} bits per linear weight
({{ method }}). {% if servable %}Serve it together with its base and other experts of that
base by deltamux, or turn{% else %}Turn{% endif %} it back into a checkpoint with `deltamux merge`.

| | |
|---|---|
| base | {{ base }} |
| checkpoint | {{ full_mb }} MB |
| this delta | {{ delta_mb }} MB |
{% if servable %}| in a slot | {{ slot_mb }} MB |
{% endif -%}
{% for key, value in verification.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
"""


def write_card(manifest: Manifest, recipe: Recipe, target: Path) -> None:
    """Write `README.md` into an artifact."""
    from huggingface_hub import ModelCard, ModelCardData

    totals = manifest.totals
    card = ModelCard.from_template(
        ModelCardData(
            base_model=manifest.base.source,
            base_model_relation="quantized",
            library_name="deltamux",
            tags=["deltamux", "delta-compression"],
        ),
        template_str=_TEMPLATE,
        name=Path(manifest.expert).name,
        base=manifest.base.source,
        bits=f"{totals.bits_per_weight:.3f}",
        method=_method(recipe),
        servable=totals.slot_bytes is not None,
        slot_mb=f"{(totals.slot_bytes or 0) / 1e6:.1f}",
        full_mb=f"{totals.expert_bytes / 1e6:.1f}",
        delta_mb=f"{totals.weights_file_bytes / 1e6:.1f}",
        verification={k: f"{v:.5g}" for k, v in (manifest.verification or {}).items()},
    )
    card.save(target / "README.md")


def _method(recipe: Recipe) -> str:
    if recipe.lossless:
        return "lossless"
    if recipe.linear.scheme == CODED:
        return "one step a matrix under an entropy code"
    return (
        f"{recipe.linear.scheme}, {recipe.linear.salient_channels} input channels of each matrix "
        "in 16 bit"
    )
