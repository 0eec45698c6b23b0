"""Draw the dashboard's panels from a Prometheus, one image a row, as Grafana would lay them out.

    python docker/tools/preview.py --prometheus http://127.0.0.1:9090 --minutes 10

Each panel asks the range query that Grafana would ask. Timeseries are lines or stacked areas, the
timeline shows mapped states, heatmaps show the increase of each bucket. Needs matplotlib.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

mpl.use("Agg")

DOCKER = Path(__file__).parent.parent
COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#5195ce", "#ba43a9", "#b7dbab")
BACKGROUND, PANEL, TEXT, GRID = "#111217", "#181b1f", "#ccccdc", "#2c3235"
# The scales of Grafana's units, largest first.
UNITS = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")),
    "percentunit": ((0.01, "%"),),
}
# A column of Grafana's grid of 24, and a unit of its height, in inches.
COLUMN, UNIT = 0.62, 0.36


class Source:
    """A Prometheus and the range to ask for.

    Args:
        url: Prometheus.
        end: Unix time of the right edge.
        seconds: Length of the range.
        variables: What stands for Grafana's variables.
    """

    def __init__(self, url: str, end: float, seconds: float, variables: dict[str, str]) -> None:
        self.url = url
        self.end = end
        self.seconds = seconds
        self.step = max(seconds / 240, 1.0)
        self._variables = variables

    def ask(self, target: dict[str, Any]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Legend, minutes before the end, and values of each series."""
        expression = target["expr"]
        for name, value in self._variables.items():
            expression = expression.replace(name, value)
        answer = httpx.get(
            f"{self.url}/api/v1/query_range",
            params={
                "query": expression,
                "start": self.end - self.seconds,
                "end": self.end,
                "step": self.step,
            },
            timeout=60,
        )
        answer.raise_for_status()
        found = []
        for series in answer.json()["data"]["result"]:
            legend = target["legendFormat"]
            for label, value in series["metric"].items():
                legend = legend.replace("{{" + label + "}}", value)
            times, values = np.array(series["values"], dtype=float).T
            found.append((legend, (times - self.end) / 60, values))
        return sorted(found, key=lambda each: each[0])


def scale(panel: dict[str, Any], largest: float) -> tuple[float, str]:
    """What to divide a panel's values by, and the unit that this makes."""
    scales = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], ((1.0, ""),))
    return next((each for each in scales if largest >= each[0]), scales[-1])


def draw_lines(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """A timeseries panel."""
    custom = panel["fieldConfig"]["defaults"]["custom"]
    stacked = custom["stacking"]["mode"] == "normal"
    series = [each for target in panel["targets"] for each in source.ask(target)]
    series = [each for each in series if np.isfinite(each[2]).any()]
    divisor, unit = scale(panel, max(float(np.nanmax(values)) for _, _, values in series))
    grid = np.arange(-source.seconds, 1, source.step) / 60
    below = np.zeros_like(grid)
    for number, (legend, times, values) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        own_divisor, own_unit = scale(panel, float(np.nanmax(values)))
        largest = float(np.nanmax(values)) / own_divisor
        number_text = f"{largest:,.0f}" if largest >= 100 else f"{largest:.3g}"
        label = f"{legend}  {number_text} {own_unit}".rstrip()
        if stacked:
            filled = np.interp(grid, times, np.nan_to_num(values) / divisor, left=0, right=0)
            axes.fill_between(grid, below, below + filled, color=colour, alpha=0.6, lw=0)
            below = below + filled
            axes.plot(grid, below, color=colour, lw=0.8, label=label)
        else:
            dashed = "--" if "fit" in legend or legend.endswith("p50") else "-"
            # A series that is absent for a while leaves a gap.
            shown = np.interp(grid, times, values, left=np.nan, right=np.nan)
            shown[np.abs(grid[:, None] - times[None]).min(axis=1) > source.step / 60] = np.nan
            axes.plot(grid, shown / divisor, color=colour, lw=1.1, ls=dashed, label=label)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}".rstrip())
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, -0.12),
        ncols=2 if len(series) > 3 else 1,
        fontsize=7,
        frameon=False,
        labelcolor=TEXT,
        borderaxespad=0.2,
    )


def draw_timeline(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """A state timeline: one bar a series, coloured by the mapped value."""
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    colours = {"dark-red": "#ad3c3c", "dark-yellow": "#c9a227", "dark-green": "#37872d"}
    series = source.ask(panel["targets"][0])
    for row, (_, times, values) in enumerate(series):
        shades = [to_rgba(colours[options[str(int(value))]["color"]]) for value in values]
        # A little wider than a step, so that no background shows between them.
        width = 1.1 * source.step / 60
        axes.bar(times, 0.8, width=width, bottom=row - 0.4, color=shades, align="edge", lw=0)
    axes.set_yticks(range(len(series)), [legend for legend, _, _ in series])
    axes.set_ylim(-0.6, len(series) - 0.4)
    for option in options.values():
        axes.bar([0], [0], color=colours[option["color"]], label=option["text"])
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, -0.12),
        ncols=3,
        fontsize=7,
        frameon=False,
        labelcolor=TEXT,
    )


def draw_heatmap(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """A heatmap of a histogram's buckets."""
    series = source.ask(panel["targets"][0])
    series = sorted(series, key=lambda each: float(each[0].replace("+Inf", "inf")))
    bounds = [legend for legend, _, _ in series]
    counts = np.array([values for _, _, values in series])
    counts = np.diff(counts, axis=0, prepend=0).clip(min=0)
    blues = LinearSegmentedColormap.from_list("blues", [PANEL, "#1f60c4", "#c0d8ff"])
    left = float(series[0][1][0])
    extent = (left, 0.0, -0.5, len(bounds) - 0.5)
    axes.imshow(counts, aspect="auto", origin="lower", extent=extent, cmap=blues)
    axes.set_yticks(range(len(bounds)), [f"≤ {bound}" for bound in bounds])
    axes.grid(visible=False)


def draw_stat(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    """A single value with the colour of its threshold, its course behind it."""
    _, times, values = source.ask(panel["targets"][0])[0]
    value = values[np.isfinite(values)][-1]
    divisor, unit = scale(panel, value)
    names = {"green": "#37872d", "red": "#ad3c3c", "orange": "#c4651b", "blue": "#1f60c4"}
    colour = "green"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    axes.set_facecolor(names[colour])
    axes.fill_between(times, 0, np.nan_to_num(values), color="white", alpha=0.15, lw=0)
    axes.set_ylim(0, max(float(np.nanmax(values)) * 2.5, 1e-9))
    axes.set_xticks([])
    axes.set_yticks([])
    text = f"{value / divisor:.3g} {unit}".strip()
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", size=17, color="w"
    )


DRAW = {
    "timeseries": draw_lines,
    "state-timeline": draw_timeline,
    "heatmap": draw_heatmap,
    "stat": draw_stat,
}


def draw_row(panels: list[dict[str, Any]], source: Source, path: Path) -> None:
    """One image of a dashboard row's panels."""
    top = min(panel["gridPos"]["y"] for panel in panels)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - top
    figure = Figure(figsize=(24 * COLUMN, height * UNIT + 0.1), facecolor=BACKGROUND, dpi=100)
    total = height * UNIT + 0.1
    for panel in panels:
        place = panel["gridPos"]
        stat = panel["type"] == "stat"
        # Margins in inches: title above, axis and legend below.
        left, right, above, below = (0.06, 0.06, 0.3, 0.05) if stat else (0.66, 0.28, 0.32, 0.78)
        x = place["x"] * COLUMN + left
        width = place["w"] * COLUMN - left - right
        bottom = total - (place["y"] - top + place["h"]) * UNIT + below
        tall = place["h"] * UNIT - above - below
        size = (x / (24 * COLUMN), bottom / total, width / (24 * COLUMN), tall / total)
        axes = figure.add_axes(size, facecolor=PANEL)
        axes.set_title(panel["title"], color=TEXT, fontsize=9, loc="left", fontweight="bold")
        axes.tick_params(colors=TEXT, labelsize=7, length=0)
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        DRAW[panel["type"]](axes, panel, source)
        if not stat:
            axes.set_xlim(-source.seconds / 60, 0)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    figure.savefig(path, facecolor=BACKGROUND)


def rows(dashboard: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The panels below each row's title; those above the first are `overview`."""
    found: dict[str, list[dict[str, Any]]] = {"overview": []}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            title = panel["title"].lower().replace(" ", "-")
            found[title] = []
        else:
            found[title if len(found) > 1 else "overview"].append(panel)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--end", type=float, default=math.nan, help="Unix time of the right edge")
    parser.add_argument("--rate-interval", default="1m")
    parser.add_argument("--output", type=Path, default=DOCKER / "preview")
    arguments = parser.parse_args()
    end = time.time() if math.isnan(arguments.end) else arguments.end
    variables = {"$__rate_interval": arguments.rate_interval, "$instance": ".*", "$expert": ".*"}
    source = Source(arguments.prometheus, end, arguments.minutes * 60, variables)
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "deltamux.json").read_text())
    arguments.output.mkdir(exist_ok=True)
    for name, panels in rows(dashboard).items():
        draw_row(panels, source, arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
