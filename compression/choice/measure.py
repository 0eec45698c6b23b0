"""Layer by layer: second moments of the inputs, then every rung of every linear's ladder."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from deltamux.compression.artifact.manifest import deltamux_version
from deltamux.compression.artifact.matrices import Coded, Factored
from deltamux.compression.artifact.stored import Encoded, LinearDelta
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.workspace import ENTRIES, Ladder, Workspace
from deltamux.compression.recipe import Recipe
from deltamux.compression.rounding.gptq import Curvature, curvature
from deltamux.compression.rounding.ladder import (
    Linear,
    coded_rungs,
    fixed_rung,
    low_rank_rungs,
    pruned_rungs,
)
from deltamux.compression.rounding.low_rank import has_few_directions
from deltamux.compression.rounding.quantize import quantize
from deltamux.compression.streaming.moments import second_moments
from deltamux.compression.streaming.text import Sample


def measure(
    difference: Difference,
    recipe: Recipe,
    calibration: list[Sample],
    work: Workspace,
    progress: bool = True,
) -> list[Ladder]:
    """Measure the ladder of every linear whose delta is not zero.

    Args:
        difference: Base and expert.
        recipe: Schemes, or scores and patterns, of the rungs.
        calibration: Conversations the second moments are collected on.
        work: Where finished layers are kept; those it has are not measured again.
        progress: Show a bar.
    """
    by_layer: dict[int, list[TensorSpec]] = {}
    for spec in difference.specs:
        if spec.role is Role.LINEAR and spec.layer is not None:
            by_layer.setdefault(spec.layer, []).append(spec)
    missing = [layer for layer in by_layer if not work.has(layer)]
    if missing:
        bar = tqdm(total=len(by_layer), desc="compress", unit="layer", disable=not progress)
        with bar:
            for layer, moments in second_moments(difference.expert, calibration, work.has):
                if moments:
                    measure_layer(difference, recipe, by_layer[layer], moments, work)
                bar.update()
                if layer == missing[-1]:
                    break
    return [ladder for layer in by_layer for ladder in work.ladders(layer)]


def measure_key(
    difference: Difference, recipe: Recipe, calibration: list[Sample]
) -> dict[str, object]:
    """What measured layers depend on: weights, text, and the rungs asked for."""
    digest = hashlib.sha256()
    for sample in calibration:
        digest.update(len(sample.ids).to_bytes(8, "little"))
        digest.update(sample.ids.numpy().tobytes())
    return {
        "deltamux": deltamux_version(),
        "base": difference.base_hashes,
        "expert": {spec.name: difference.expert.sha256(spec.name) for spec in difference.specs},
        "linear": recipe.linear.model_dump(mode="json"),
        "low_rank": recipe.measures_low_rank,
        "calibration": digest.hexdigest(),
    }


def measure_layer(
    difference: Difference,
    recipe: Recipe,
    specs: list[TensorSpec],
    moments: dict[str, torch.Tensor],
    work: Workspace,
) -> None:
    """Measure the linears of one layer and keep them.

    Args:
        difference: Base and expert.
        recipe: The rungs asked for.
        specs: The layer's linears.
        moments: E[x xᵀ] of their inputs in the expert, by name.
        work: Where the layer is kept.
    """
    linears = _changed(difference, specs, moments)
    few = recipe.linear.may_factor and all(
        has_few_directions(linear.delta_NK, linear.curvature) for linear in linears.values()
    )
    ladders: list[Ladder] = []
    kept: dict[str, list[Encoded]] = {}
    layer = specs[0].layer
    assert layer is not None
    for spec in specs:
        # Popped: what a linear caches is as large as its delta.
        linear = linears.pop(spec.name, None)
        if linear is None:
            continue
        folded = spec.norm if spec.norm in difference.folded else None
        rungs = measure_linear(spec, linear, recipe, folded_norm=folded, few_directions=few)
        if rungs:
            kept[spec.name] = rungs
            entries = ENTRIES.validate_python(tuple(rung.entry for rung in rungs))
            ladders.append(Ladder(spec.name, layer, linear.energy, entries))
    work.save(layer, ladders, kept)


def _changed(
    difference: Difference, specs: list[TensorSpec], moments: dict[str, torch.Tensor]
) -> dict[str, Linear]:
    """The linears of a layer that changed, by name; those that read the same inputs share their curvature."""
    inputs: dict[str, tuple[torch.Tensor, Curvature]] = {}
    found = {}
    for spec in specs:
        moment_KK = moments[spec.name]
        delta_NK = difference.delta(spec).to(moment_KK.device)
        if not delta_NK.any():
            continue
        reader = spec.reader or spec.name
        if reader not in inputs:
            served_KK = difference.served_moment(spec, moment_KK)
            inputs[reader] = served_KK, curvature(served_KK, spec.name)
        found[spec.name] = Linear(delta_NK, *inputs[reader])
    return found


def measure_linear(
    spec: TensorSpec,
    linear: Linear,
    recipe: Recipe,
    *,
    folded_norm: str | None = None,
    few_directions: bool = False,
) -> list[Encoded]:
    """Every rung of one linear as it would be written, by bytes.

    Rungs are encoded beside the rounding of the next ones, on as many threads as torch has.

    Args:
        spec: The linear.
        linear: Its delta and inputs.
        recipe: The rungs asked for.
        folded_norm: Name of the norm whose change is folded into the delta.
        few_directions: Whether the layer is that of a merged adapter: low-rank rungs pay at any rate.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as encoders:
        pending = []
        for rung in _rungs(linear, recipe, few_directions):
            error = linear.lost(rung.delta.dequantize().to(linear.delta_NK.device))
            pending.append(
                encoders.submit(Encoded.of, spec, rung, error=error, folded_norm=folded_norm)
            )
    rungs = [encoded.result() for encoded in pending]
    return sorted(rungs, key=lambda rung: rung.entry.bytes)


def _rungs(linear: Linear, whole: Recipe, few_directions: bool) -> Iterator[LinearDelta]:
    recipe = whole.linear
    scheme = recipe.fixed_scheme
    if scheme is None and recipe.pruning is None:
        yield from map(Coded, coded_rungs(linear))
        if whole.measures_low_rank or few_directions:
            yield from map(Factored, low_rank_rungs(linear, few_directions=few_directions))
    elif scheme is None:
        assert recipe.pruning is not None
        yield from map(Coded, pruned_rungs(linear, recipe.pruning.score, recipe.pruning.pattern))
    elif recipe.feedback:
        yield Coded(fixed_rung(linear, scheme, recipe.salient_channels))
    else:
        energy_K = linear.moment_KK.diagonal().cpu()
        yield Coded(quantize(linear.delta_NK.cpu(), scheme, energy_K, recipe.salient_channels))
