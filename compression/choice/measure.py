"""Layer by layer: second moments of the inputs, then every rung of every linear's ladder."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from deltamux.compression.artifact.artifact import (
    ChannelClasses,
    TensorEntry,
    deltamux_version,
    encode_matrix,
    tensor_bytes,
)
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.checkpoint.delta import Difference
from deltamux.compression.choice.workspace import Measured, Workspace, rung_name
from deltamux.compression.recipe import Recipe
from deltamux.compression.rounding.gptq import Curvature, curvature
from deltamux.compression.rounding.ladder import (
    Linear,
    coded_rungs,
    fixed_rung,
    low_rank_rungs,
    pruned_rungs,
)
from deltamux.compression.rounding.low_rank import FactoredDelta, has_few_directions
from deltamux.compression.rounding.quantize import QuantizedDelta, quantize
from deltamux.compression.streaming.moments import second_moments
from deltamux.compression.streaming.text import Sample


def measure(
    difference: Difference,
    recipe: Recipe,
    calibration: list[Sample],
    work: Workspace,
    progress: bool = True,
) -> list[Measured]:
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
    return [matrix for layer in by_layer for matrix in work.measured(layer)]


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


def matrix_entry(
    spec: TensorSpec,
    quantized: QuantizedDelta | FactoredDelta,
    tensors: dict[str, torch.Tensor],
    *,
    error: float,
    folded_norm: str | None = None,
) -> TensorEntry:
    """What the manifest says of a quantized matrix."""
    if isinstance(quantized, FactoredDelta):
        return TensorEntry(
            name=spec.name,
            role=spec.role,
            scheme=quantized.left.scheme,
            shape=quantized.shape,
            rank=quantized.rank,
            input_directions=None if quantized.inputs is None else quantized.inputs.count,
            deflated=True,
            folded_norm=folded_norm,
            bytes=tensor_bytes(tensors),
            error=error,
        )
    coded, salient = quantized.channels_C, quantized.salient_channels_S
    columns = quantized.shape[1]
    num_coded = columns if coded is None else len(coded)
    return TensorEntry(
        name=spec.name,
        role=spec.role,
        scheme=quantized.scheme,
        shape=quantized.shape,
        rows=None if quantized.rows_R is None else len(quantized.rows_R),
        deflated=quantized.deflated,
        classes=ChannelClasses(
            coded=num_coded,
            salient=0 if salient is None else len(salient),
            dropped=columns - num_coded,
        ),
        folded_norm=folded_norm,
        bytes=tensor_bytes(tensors),
        error=error,
    )


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
    measured: list[Measured] = []
    kept: dict[str, torch.Tensor] = {}
    factors: dict[int, tuple[torch.Tensor, Curvature]] = {}

    def opened(spec: TensorSpec) -> Linear | None:
        moment_KK = moments[spec.name]
        delta_NK = difference.delta(spec).to(moment_KK.device)
        if not delta_NK.any():
            return None
        # Linears that read the same activations share one factorization.
        if id(moment_KK) not in factors:
            served_KK = difference.served_moment(spec, moment_KK)
            factors[id(moment_KK)] = served_KK, curvature(served_KK, spec.name)
        return Linear(delta_NK, *factors[id(moment_KK)])

    few = recipe.linear.may_factor and all(
        has_few_directions(linear.delta_NK, linear.curvature)
        for linear in map(opened, specs)
        if linear is not None
    )
    for spec in specs:
        linear = opened(spec)
        if linear is None:
            continue
        folded = spec.norm if spec.norm in difference.folded else None
        rungs = measure_linear(spec, linear, recipe, folded_norm=folded, few_directions=few)
        for index, (_, tensors) in enumerate(rungs):
            kept |= {rung_name(key, index): value for key, value in tensors.items()}
        if rungs:
            assert spec.layer is not None
            entries = tuple(entry for entry, _ in rungs)
            measured.append(Measured(spec.name, spec.layer, linear.energy, entries))
    assert specs[0].layer is not None
    work.save(specs[0].layer, measured, kept)


def measure_linear(
    spec: TensorSpec,
    linear: Linear,
    recipe: Recipe,
    *,
    folded_norm: str | None = None,
    few_directions: bool = False,
) -> list[tuple[TensorEntry, dict[str, torch.Tensor]]]:
    """Every rung of one linear as it would be written, by bytes.

    Rungs are encoded beside the rounding of the next ones, on as many threads as torch has.

    Args:
        spec: The linear.
        linear: Its delta and inputs.
        recipe: The rungs asked for.
        folded_norm: Name of the norm whose change is folded into the delta.
        few_directions: Whether the layer is that of a merged adapter: low-rank rungs pay at any rate.
    """
    rungs = []
    with ThreadPoolExecutor(torch.get_num_threads()) as encoders:
        for quantized in _rungs(linear, recipe, few_directions):
            encoded = encoders.submit(encode_matrix, spec.name, quantized)
            error = linear.lost(quantized.dequantize().to(linear.delta_NK.device))
            rungs.append((quantized, encoded, error))
    entries = []
    for quantized, encoded, error in rungs:
        tensors = encoded.result()
        entry = matrix_entry(spec, quantized, tensors, error=error, folded_norm=folded_norm)
        entries.append((entry, tensors))
    return sorted(entries, key=lambda rung: rung[0].bytes)


def _rungs(
    linear: Linear, whole: Recipe, few_directions: bool
) -> Iterator[QuantizedDelta | FactoredDelta]:
    recipe = whole.linear
    scheme = recipe.fixed_scheme
    if scheme is None and recipe.pruning is None:
        yield from coded_rungs(linear)
        if whole.measures_low_rank or few_directions:
            yield from low_rank_rungs(linear, few_directions=few_directions)
    elif scheme is None:
        assert recipe.pruning is not None
        yield from pruned_rungs(linear, recipe.pruning.score, recipe.pruning.pattern)
    elif recipe.feedback:
        yield fixed_rung(linear, scheme, recipe.salient_channels)
    else:
        energy_K = linear.moment_KK.diagonal().cpu()
        yield quantize(linear.delta_NK.cpu(), scheme, energy_K, recipe.salient_channels)
