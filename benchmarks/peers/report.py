"""What a result of `quality.py` says: means, bars, the best peer at every budget, and the plot.

python -m benchmarks.peers.report benchmarks/results/quality_*.json [-o benchmarks/results/quality.png]

A row's KL is given as a share of the base's, KL(expert ‖ compressed) / KL(expert ‖ base). Means are over
draws first and over experts then, so that every expert counts the same.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

OURS = "deltamux@"
DISTILLED = "+distil"
MARKERS = "osD^vP*Xhp<>8d"
# Bits a linear weight, the least gain kept, the largest KL.
BARS = ((2.1, 0.993, 0.002), (1.6, 0.985, 0.004), (1.05, 0.96, 0.02), (0.5, 0.88, 0.10))
Row = dict


def kl(row: Row) -> float:
    """KL as a share of the base's."""
    return row["evaluation"]["kl"] / row["evaluation"]["kl_base"]


def gain(row: Row) -> float:
    return row["evaluation"]["gain_kept"]


def bits(row: Row) -> float:
    return row["bits_per_weight"]


def mean(rows: list[Row], value: Callable[[Row], float]) -> float:
    """Over draws, then over experts."""
    experts: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        experts[row["expert"]].append(value(row))
    return sum(sum(found) / len(found) for found in experts.values()) / len(experts)


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Most bits first."""
    methods: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        methods[row["method"]].append(row)
    return dict(sorted(methods.items(), key=lambda item: -mean(item[1], bits)))


def print_means(rows: list[Row]) -> None:
    print(f"{'method':<20}{'bits':>7}{'gain':>9}{'KL/base':>9}{'top-1':>8}{'exact':>7}{'s':>6}")
    for method, group in by_method(rows).items():
        agreed = mean(group, lambda row: row["evaluation"]["top1_agreement"])
        exact = mean(group, lambda row: row["evaluation"]["exact_match"])
        seconds = mean(group, lambda row: row["seconds"])
        experts = len({row["expert"] for row in group})
        print(
            f"{method:<20}{mean(group, bits):>7.3f}{mean(group, gain):>9.2%}{mean(group, kl):>9.4%}"
            f"{agreed:>8.2%}{exact:>7.1%}{seconds:>6.0f}  ({experts} experts, {len(group)} rows)"
        )


def print_bars(rows: list[Row]) -> None:
    """The bars, and for every expert ours beside the best of the peers within the same bits."""
    methods = by_method(rows)
    for budget, least, largest in BARS:
        own = methods.get(f"{OURS}{budget:g}", [])
        if not own:
            continue
        kept, lost = mean(own, gain), mean(own, kl)
        print(
            f"\n{budget:g} bits: gain {kept:.2%} (bar {least:.1%}: {_held(kept >= least)}), "
            f"KL {lost:.4%} (bar {largest:.1%}: {_held(lost <= largest)})"
        )
        for expert in dict.fromkeys(row["expert"] for row in own):
            mine = mean([row for row in own if row["expert"] == expert], kl)
            peers = [
                row
                for row in rows
                if row["expert"] == expert
                and not row["method"].startswith(OURS)
                and bits(row) <= budget
            ]
            line = f"  {expert:<12}{mine:>9.4%}"
            if peers:
                best = min(peers, key=kl)
                standing = "ahead of" if mine < kl(best) else "BEHIND"
                line += f"  {standing} {best['method']} at {bits(best):.2f}: {kl(best):.4%}"
            print(line)


def _held(held: bool) -> str:
    return "met" if held else "MISSED"


LABELS = ("KL to the expert, share of the base's", "share of the gain lost, or added")


def draw(rows: list[Row], target: Path) -> None:
    """The rate-distortion plot."""
    import matplotlib.pyplot as plt

    points = {
        method: (mean(group, bits), mean(group, kl), mean(group, lambda row: abs(1 - gain(row))))
        for method, group in by_method(rows).items()
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    ours = [v for k, v in points.items() if k.startswith(OURS) and DISTILLED not in k]
    peers = {k: v for k, v in sorted(points.items()) if not k.startswith(OURS)}
    for column, (axis, label) in enumerate(zip(axes, LABELS, strict=True), 1):
        rates, losses = zip(*((point[0], max(point[column], 1e-6)) for point in ours), strict=True)
        axis.plot(rates, losses, "o-", color="black", label="deltamux", zorder=3)
        for index, (method, point) in enumerate(peers.items()):
            marker, color = MARKERS[index % len(MARKERS)], plt.cm.tab20(index % 20)
            axis.plot(point[0], max(point[column], 1e-6), marker, color=color, label=method)
        axis.set(xscale="log", yscale="log", xlabel="bits per linear weight", ylabel=label)
        axis.set_xticks([0.1, 0.25, 0.5, 1, 2, 4], ["0.1", "0.25", "0.5", "1", "2", "4"])
        axis.minorticks_off()
        axis.grid(True, which="major", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle("Mean over the experts, held-out text; lower left is better", fontsize=10)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="where the plot goes")
    arguments = parser.parse_args()
    rows = json.loads(arguments.result.read_text())["result"]["rows"]
    print_means(rows)
    print_bars(rows)
    if arguments.output:
        draw(rows, arguments.output)


if __name__ == "__main__":
    main()
