"""Layer by layer: second moments of the inputs, then rungs of every linear's ladder."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from tqdm import tqdm

from deltamux.compression.artifact.manifest import deltamux_version
from deltamux.compression.artifact.matrices import Coded, Factored
from deltamux.compression.artifact.stored import Encoded, Entry, LinearDelta
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.workspace import ENTRIES, Ladder, Wanted, Workspace
from deltamux.compression.recipe import Recipe
from deltamux.compression.rounding.gptq import Curvature, curvature
from deltamux.compression.rounding.ladder import (
    Linear,
    Rung,
    coded_rungs,
    coded_steps,
    fixed_rung,
    low_rank_rungs,
    pruned_rungs,
)
from deltamux.compression.rounding.low_rank import FactoredDelta, has_few_directions
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme, quantize
from deltamux.compression.streaming.moments import InputMoments
from deltamux.compression.streaming.text import Sample

# Number of a rung, its delta, and the share of the delta's output energy that it loses.
Way = tuple[int, LinearDelta, float]


def measure(
    difference: Difference,
    recipe: Recipe,
    inputs: InputMoments,
    work: Workspace,
    *,
    progress: bool = True,
    wanted: Wanted | None = None,
) -> list[Ladder]:
    """Measure the ladder of every linear whose delta is not zero.

    Args:
        difference: Base and expert.
        recipe: Schemes, or scores and patterns, of the rungs.
        inputs: Second moments of the linears' inputs.
        work: Where finished layers are kept; those it has are not measured again.
        progress: Show a bar.
        wanted: Which steps; None: all ways.
    """

    def look(_layer: int, specs: list[TensorSpec], linears: dict[str, Linear]) -> None:
        measure_layer(difference, recipe, specs, linears, work, wanted=wanted)

    layers = linears_by_layer(difference)
    has = partial(work.has, wanted=wanted)
    through(difference, inputs, has, look, ("compress", progress))
    return [ladder for layer in layers for ladder in work.ladders(layer)]


def linears_by_layer(difference: Difference) -> dict[int, list[TensorSpec]]:
    """The decoder's linears, those of a layer together."""
    by_layer: dict[int, list[TensorSpec]] = {}
    for spec in difference.specs:
        if spec.role is Role.LINEAR and spec.layer is not None:
            by_layer.setdefault(spec.layer, []).append(spec)
    return by_layer


def through(
    difference: Difference,
    inputs: InputMoments,
    has: Callable[[int], bool],
    look: Callable[[int, list[TensorSpec], dict[str, Linear]], None],
    shown: tuple[str, bool],
) -> None:
    """Look at every layer that is missing: its linears, and those of them that changed, by name."""
    by_layer = linears_by_layer(difference)
    missing = [layer for layer in by_layer if not has(layer)]
    if not missing:
        return
    label, progress = shown
    with tqdm(total=len(by_layer), desc=label, unit="layer", disable=not progress) as bar:
        bar.update(len(by_layer) - len(missing))
        for layer, moments in inputs.of(missing):
            specs = by_layer[layer]
            look(layer, specs, changed_linears(difference, specs, moments))
            bar.update()


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
        "base_quantization": difference.base.quantization,
        "expert": {spec.name: difference.expert.sha256(spec.name) for spec in difference.specs},
        "linear": recipe.linear.model_dump(mode="json"),
        "low_rank": recipe.measures_low_rank,
        "calibration": digest.hexdigest(),
    }


def measure_layer(
    difference: Difference,
    recipe: Recipe,
    specs: list[TensorSpec],
    linears: dict[str, Linear],
    work: Workspace,
    *,
    wanted: Wanted | None = None,
) -> None:
    """Measure the linears of one layer and keep them.

    Args:
        difference: Base and expert.
        recipe: The rungs asked for.
        specs: The layer's linears.
        linears: Those that changed, by name; taken out one by one.
        work: Where the layer is kept.
        wanted: Which steps; None: all ways.
    """
    few = wanted is None and few_directions_in(recipe, linears)
    ladders: list[Ladder] = []
    kept: dict[str, list[Encoded]] = {}
    layer = specs[0].layer
    assert layer is not None
    for spec in specs:
        if spec.name not in linears:
            continue
        linear = linears.pop(spec.name)  # what it caches is as large as its delta
        if wanted is None:
            ways = all_ways(linear, recipe, few)
        else:
            ways = ways_of_steps(linear, wanted.get(spec.name))
        folded = spec.norm if spec.norm in difference.folded else None
        rungs = measure_linear(spec, ways, folded)
        if rungs:
            kept[spec.name] = [rung for _, rung in rungs]
            steps = () if wanted is None else tuple(step for step, _ in rungs)
            entries = [rung.entry for _, rung in rungs]
            ladders.append(ladder_of(spec, linear.energy, entries, steps))
    work.save(layer, ladders, kept)


def few_directions_in(recipe: Recipe, linears: dict[str, Linear]) -> bool:
    """Whether a layer is that of a merged adapter, so that low-rank rungs pay at any rate."""
    return recipe.linear.may_factor and all(
        has_few_directions(linear.delta_NK, linear.curvature) for linear in linears.values()
    )


def ladder_of(
    spec: TensorSpec, energy: float, entries: Sequence[Entry], steps: tuple[int, ...]
) -> Ladder:
    """The ladder of a decoder's linear; entries ascend in bytes."""
    assert spec.layer is not None
    checked = ENTRIES.validate_python(tuple(entries))
    return Ladder(spec.name, spec.layer, energy, checked, steps)


def changed_linears(
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
    spec: TensorSpec, ways: Iterable[Way], folded_norm: str | None
) -> list[tuple[int, Encoded]]:
    """The rungs of one linear as they would be written, each with its number, by bytes.

    They are encoded beside the rounding of the next ones, on as many threads as torch has.

    Args:
        spec: The linear.
        ways: Number, delta and error of each.
        folded_norm: Name of the norm whose change is folded into the delta.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as encoders:
        pending = [
            (number, encoders.submit(Encoded.of, spec, delta, error=error, folded_norm=folded_norm))
            for number, delta, error in ways
        ]
    rungs = [(number, encoded.result()) for number, encoded in pending]
    return sorted(rungs, key=lambda rung: rung[1].entry.bytes)


def all_ways(linear: Linear, recipe: Recipe, few_directions: bool = False) -> Iterator[Way]:
    """Every rung of a linear that a recipe asks for.

    Args:
        linear: Its delta and inputs.
        recipe: The rungs asked for.
        few_directions: Whether the layer is that of a merged adapter.
    """
    for number, (delta, error) in enumerate(_rungs(linear, recipe, few_directions)):
        yield number, delta, error


def ways_of_steps(
    linear: Linear,
    wanted: Sequence[int] | None,
    steps: Sequence[tuple[Scheme, float]] | None = None,
) -> Iterator[Way]:
    """The entropy-coded rungs of some steps, or of all."""
    every = steps or coded_steps(linear)
    numbers = range(len(every)) if wanted is None else wanted
    rungs = coded_rungs(linear, [every[number] for number in numbers])
    for number, rung in zip(numbers, rungs, strict=True):
        if rung is not None:
            yield number, Coded(rung.delta), rung.error


def _rungs(
    linear: Linear, whole: Recipe, few_directions: bool
) -> Iterator[tuple[LinearDelta, float]]:
    """Deltas and their errors."""
    recipe = whole.linear
    scheme = recipe.fixed_scheme
    if scheme is None and recipe.pruning is None:
        yield from _of_codes(coded_rungs(linear))
        if whole.measures_low_rank or few_directions:
            for factored in low_rank_rungs(linear, few_directions=few_directions):
                yield Factored(factored), _lost(linear, factored)
    elif scheme is None:
        assert recipe.pruning is not None
        yield from _of_codes(pruned_rungs(linear, recipe.pruning.score, recipe.pruning.pattern))
    elif recipe.feedback:
        fixed = fixed_rung(linear, scheme, recipe.salient_channels)
        yield Coded(fixed), _lost(linear, fixed)
    else:
        energy_K = linear.moment_KK.diagonal().cpu()
        plain = quantize(linear.delta_NK.cpu(), scheme, energy_K, recipe.salient_channels)
        yield Coded(plain), _lost(linear, plain)


def _of_codes(rungs: Iterable[Rung | None]) -> Iterator[tuple[LinearDelta, float]]:
    return ((Coded(rung.delta), rung.error) for rung in rungs if rung is not None)


def _lost(linear: Linear, delta: QuantizedDelta | FactoredDelta) -> float:
    return linear.lost(delta.dequantize().to(linear.delta_NK.device))
