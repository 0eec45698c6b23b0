"""What a threshold trades, as a picture: experts used on prompts in other words for strangers kept out.

python -m benchmarks.routing.curve benchmarks/results/routing-shifted_NAME.json

Reads a result of `shifted.py` and writes `results/routing-shifted.png`. Each point is a threshold; the
ring is the one that the fit chose. Routers without a curve of their own are left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

LINES = ("medical pubmedqa", "code humaneval")
ROUTERS = ("default", "encoder", "MiniLM + LR")


def kept_worst(sets: dict[str, dict[str, float]]) -> float:
    """The smallest share of prompts kept from experts among the sets that belong to none."""
    return min(figures["right"] for name, figures in sets.items() if name.startswith("none"))


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, line in zip(figure.subplots(1, 2, sharey=False), LINES, strict=True):
        for color, name in zip(("tab:blue", "tab:orange", "tab:gray"), ROUTERS, strict=True):
            router = result[name]
            points = [(kept_worst(sets), sets[line]["right"]) for sets in router["curve"].values()]
            axes.plot(*zip(*points, strict=True), marker=".", color=color, label=name)
            chosen = router["kept_worst"], router["sets"][line]["right"]
            axes.plot(*chosen, marker="o", markersize=11, fillstyle="none", color=color)
        axes.set(xlabel="kept from experts, worst set of no domain", ylabel=f"right: {line}")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    path = RESULTS / "routing-shifted.png"
    draw(json.loads(parser.parse_args().result.read_text())["result"], path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
