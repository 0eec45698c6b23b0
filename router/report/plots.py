"""Figures of an evaluation: confusion matrix, reliability diagram, risk-coverage curve, as PNG.

Matplotlib draws, without a display; it comes with the extra `bench`.
"""

from pathlib import Path
from typing import Any

from deltamux.router.fit.metrics import NUM_BINS
from deltamux.router.report.curves import Curves

CONFUSION, RELIABILITY, RISK = "confusion.png", "reliability.png", "risk_coverage.png"


def require_matplotlib() -> None:
    """Say how to get matplotlib, before any work.

    Raises:
        ValueError: It is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "drawing figures needs matplotlib; run: pip install 'deltamux[bench]'"
        ) from error


def draw(curves: Curves, directory: Path) -> list[Path]:
    """Write the three figures into a directory and return their paths."""
    return [
        _confusion(curves, directory / CONFUSION),
        _reliability(curves, directory / RELIABILITY),
        _risk(curves, directory / RISK),
    ]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that no display is needed for, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _confusion(curves: Curves, path: Path) -> Path:
    """Rows: domains; columns: who answers; shades: share of the row."""
    rows = [[count / max(1, sum(row)) for count in row] for row in curves.confusion]
    figure, axes = _figure(1.6 + 0.75 * len(curves.answers), 1.4 + 0.5 * len(curves.labels))
    axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, counts in enumerate(curves.confusion):
        for column, count in enumerate(counts):
            color = "white" if rows[row][column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    axes.set_xticks(range(len(curves.answers)), curves.answers, rotation=30, ha="right")
    axes.set_yticks(range(len(curves.labels)), curves.labels)
    axes.set_xlabel("answered by")
    axes.set_ylabel("domain of the prompt")
    return _save(figure, path)


def _reliability(curves: Curves, path: Path) -> Path:
    """Accuracy by confidence; the size of a point is the number of its prompts."""
    figure, axes = _figure(5, 4.5)
    points = [point for point in curves.reliability if point is not None]
    total = max(1, sum(count for _, _, count in points))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="calibrated")
    axes.plot(
        [p[0] for p in points],
        [p[1] for p in points],
        color="tab:blue",
        linewidth=1,
        label="router",
    )
    sizes = [15 + 400 * count / total for _, _, count in points]
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=sizes)
    for confidence, accuracy, count in points:
        axes.annotate(
            str(count),
            (confidence, accuracy),
            xytext=(6, -12),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(
        xlabel=f"confidence ({NUM_BINS} bins)", ylabel="accuracy", xlim=(0, 1.1), ylim=(0, 1.03)
    )
    axes.legend(loc="upper left")
    return _save(figure, path)


def _risk(curves: Curves, path: Path) -> Path:
    """Share of wrong experts by the share of prompts that get one."""
    figure, axes = _figure(5.5, 4.5)
    coverage = [point[1] for point in curves.risk_coverage]
    risk = [point[2] for point in curves.risk_coverage]
    axes.plot(coverage, risk, marker=".", color="tab:blue")
    near = min(
        curves.risk_coverage, key=lambda point: abs(point[0] - curves.threshold), default=None
    )
    if near is not None:
        axes.plot(near[1], near[2], marker="o", color="tab:red", linestyle="none",
                  label=f"threshold {curves.threshold:.2f}")  # fmt: skip
        axes.legend(loc="upper left")
    axes.set(
        xlabel="share of prompts that an expert answers", ylabel="share of these by a wrong expert"
    )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, max(0.01, 1.1 * max(risk, default=0.0)))
    return _save(figure, path)
