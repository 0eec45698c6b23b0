"""Draw the rate-distortion plot of a result of `quality.py`.

python benchmarks/plot_quality.py benchmarks/results/quality_*.json -o benchmarks/results/quality.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

OURS = "deltamux@"
DISTILLED = "+distil"
MARKERS = "osD^vP*Xhp<>8d"


def means(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Method to mean bits, KL relative to the base's, and lost share of the gain."""
    groups: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        found = row["evaluation"]
        relative = found["kl"] / found["kl_base"]
        groups[row["method"]].append((row["bits_per_weight"], relative, 1 - found["gain_kept"]))
    return {
        method: tuple(sum(column) / len(points) for column in zip(*points, strict=True))
        for method, points in groups.items()
    }


def draw(rows: list[dict], target: Path) -> None:
    found = means(rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    ours = sorted(v for k, v in found.items() if k.startswith(OURS) and DISTILLED not in k)
    peers = {k: v for k, v in sorted(found.items()) if not k.startswith(OURS)}
    for column, (axis, label) in enumerate(
        zip(axes, ("KL to the expert, share of the base's", "share of the gain lost"), strict=True),
        1,
    ):
        axis.plot(
            [point[0] for point in ours],
            [max(point[column], 1e-6) for point in ours],
            "o-",
            color="black",
            label="deltamux",
            zorder=3,
        )
        for index, (method, point) in enumerate(peers.items()):
            axis.plot(
                point[0],
                max(point[column], 1e-6),
                MARKERS[index % len(MARKERS)],
                color=plt.cm.tab20(index % 20),
                label=method,
            )
        axis.set(xscale="log", yscale="log", xlabel="bits per linear weight", ylabel=label)
        axis.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axis.grid(True, which="major", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle("Mean over the experts, held-out text; lower left is better", fontsize=10)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw(json.loads(arguments.result.read_text())["result"]["rows"], arguments.output)


if __name__ == "__main__":
    main()
