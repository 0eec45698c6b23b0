"""What compressing costs on a real-size layer: Mistral-7B's shapes, random weights.

    python -m benchmarks.layer_cost [--tokens 8192] [--hidden 4096] [--intermediate 14336]

One decoder layer with a random delta and correlated random inputs goes through the same steps as in
`deltamux compress`: second moments and one factorization for every distinct input, twice; all rungs of all
seven linears from some of their rows; two rungs of each in full, encoded. Prints seconds and peak memory of each step, on
the GPU if there is one.
"""

import argparse
import resource
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.record import record
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.choice.measure import measure_linear, ways_of_steps
from deltamux.compression.choice.predict import predict_linear
from deltamux.compression.choice.workspace import Ladder
from deltamux.compression.rounding.gptq import Grid, curvature, round_with_feedback
from deltamux.compression.rounding.ladder import Linear
from deltamux.compression.rounding.quantize import Scheme
from deltamux.compression.streaming.forward import best_device, release_memory

LAYERS = 32
SPEC = TensorSpec("model.layers.0.linear.weight", Role.LINEAR, layer=0)
DELTA_SCALE = 1e-3
# Bits a weight of the rung that is measured, with the next coarser one.
BITS = 1.0


@dataclass(frozen=True)
class Group:
    """Linears that read one input: its channels, and each linear's output rows."""

    name: str
    columns: int
    rows: tuple[int, ...]


def groups(hidden: int, intermediate: int) -> list[Group]:
    return [
        Group("q, k, v", hidden, (hidden, hidden // 4, hidden // 4)),
        Group("o", hidden, (hidden,)),
        Group("gate, up", hidden, (intermediate, intermediate)),
        Group("down", intermediate, (hidden,)),
    ]


def inputs(tokens: int, columns: int, device: torch.device) -> torch.Tensor:
    """Activations whose channels are correlated and differ in energy, float32 [T, K]."""
    shared = torch.randn(tokens, 64, device=device) @ torch.randn(64, columns, device=device)
    energy = torch.exp(0.5 * torch.randn(columns, device=device))
    return (torch.randn(tokens, columns, device=device) + 0.1 * shared) * energy


def run(group: Group, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of every step for one group of linears."""
    spent = {"moments": 0.0, "factor": 0.0, "predict": 0.0, "measure": 0.0}
    started, cpu = time.perf_counter(), time.process_time()
    moment_KK = torch.zeros(group.columns, group.columns, device=device)
    for start in range(0, tokens, 8192):
        x_TK = inputs(min(8192, tokens - start), group.columns, device)
        before = time.perf_counter()
        moment_KK.addmm_(x_TK.T, x_TK, alpha=1 / tokens)
        _wait(device)
        spent["moments"] += time.perf_counter() - before
    before = time.perf_counter()
    factored = curvature(moment_KK)
    _wait(device)
    spent["factor"] = time.perf_counter() - before
    num_bytes, num_rungs = 0, 0
    for rows in group.rows:
        delta_NK = torch.randn(rows, group.columns, device=device) * DELTA_SCALE
        before = time.perf_counter()
        linear = Linear(delta_NK, moment_KK, factored)
        predicted = predict_linear(SPEC, linear)
        assert predicted is not None
        middle = time.perf_counter()
        place = min(range(len(predicted.steps)), key=lambda i: abs(bits(predicted, i) - BITS))
        chosen = predicted.steps[max(place - 1, 0) : place + 1]
        rungs = measure_linear(SPEC, ways_of_steps(linear, chosen), None)
        num_bytes += max(rung.entry.bytes for _, rung in rungs)
        num_rungs += len(predicted.steps)
        spent["predict"] += middle - before
        spent["measure"] += time.perf_counter() - middle
        release_memory()
    # The model runs twice, unless it is so small that second moments are kept.
    spent["total"] = sum(spent.values()) + spent["moments"] + spent["factor"]
    spent |= {"elapsed": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    return spent | {"rung_bytes": num_bytes, "rungs": num_rungs, **_peaks(device)}


def check_rounding(device: torch.device) -> None:
    """Round a small delta on the device and on the CPU; end where more than single levels on borders differ."""
    group = Group("check", 300, (70,))
    x_TK = inputs(2000, group.columns, torch.device("cpu"))
    here = curvature(x_TK.T @ x_TK / len(x_TK))
    parts = {name: getattr(here, name).to(device) for name in ("order_K", "factor_KK", "root_KK")}
    there = replace(here, **parts)
    delta_NK = torch.randn(*group.rows, group.columns)
    grids = [Grid(scheme, torch.full(group.rows, 0.7)) for scheme in (Scheme.INT4, Scheme.INT2)]
    moved = [Grid(grid.scheme, grid.steps_N.to(device)) for grid in grids]
    wanted = round_with_feedback(delta_NK, here, grids)
    for found, each in zip(
        round_with_feedback(delta_NK.to(device), there, moved), wanted, strict=True
    ):
        same = float((found.codes_NK.cpu() == each.codes_NK).float().mean())
        print(f"rounding on {device}: {same:.2%} of the codes as on the CPU")
        if same < 0.99 or abs(found.lost / each.lost - 1) > 0.01:
            raise SystemExit("rounding on the device is wrong")


def bits(ladder: Ladder, place: int) -> float:
    """Of a weight, at a predicted rung."""
    return ladder.entries[place].bytes * 8 / ladder.num_weights


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peaks(device: torch.device) -> dict[str, float]:
    peaks = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def layer(tokens: int, hidden: int = 4096, intermediate: int = 14336) -> dict[str, object]:
    """Seconds and bytes of one layer's groups, printed as they come, and of 32 such layers."""
    torch.manual_seed(0)
    device = best_device()
    if device.type != "cpu":
        check_rounding(device)
    result: dict[str, object] = {"tokens": tokens, "threads": torch.get_num_threads()}
    total = cpu = 0.0
    for group in groups(hidden, intermediate):
        found = run(group, tokens, device)
        total, cpu = total + found["total"], cpu + found["cpu"]
        result[group.name] = found
        print(
            f"{group.name:<10} moments {found['moments']:>7.1f} s  factor {found['factor']:>6.1f} s  "
            f"predict {found['predict']:>6.1f} s  measure {found['measure']:>6.1f} s  peak {found['peak_bytes'] / 1e9:.1f} GB",
            flush=True,
        )
    print(
        f"one layer {total:.0f} s ({cpu:.0f} s of all cores), "
        f"{LAYERS} layers {total * LAYERS / 60:.0f} min"
    )
    seconds = {"layer_seconds": total, "layer_cpu_seconds": cpu, "model_seconds": total * LAYERS}
    return result | seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    arguments = parser.parse_args()
    record("layer-cost", layer(arguments.tokens, arguments.hidden, arguments.intermediate))


if __name__ == "__main__":
    main()
