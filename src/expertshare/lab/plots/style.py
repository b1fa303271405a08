"""What all pictures share: formats, colours, frames, legends, error bars, stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expertshare.errors import InputError

FORMATS = (".png", ".svg", ".pdf")
INK, GRID = "#333333", "#e3e3e3"
# Told apart by colour-blind readers too (Okabe and Ito), then repeated.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
SMALL: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK}
"""Of every legend."""


def check_plot_path(path: str | Path) -> None:
    """Raise InputError unless the name ends like a format that can be drawn."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"expected a picture name ending in {', '.join(FORMATS)}, got {path}")


def new_figure(path: str | Path, width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty picture of a size in inches for `path`, and its panels, side by side. Raises InputError where the name
    has no known ending."""
    check_plot_path(path)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def frame(axes: Axes, *, title: str, x: str, y: str) -> None:
    """Title, axis labels, a quiet grid, and no box."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def legend_beside(axes: Axes) -> None:
    """A legend to the right of the axes, where it covers nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **SMALL)


def with_range(
    axes: Axes, x: Sequence[float], y: Sequence[float], ranges: Sequence[Sequence[float]], **look: Any
) -> None:
    """Points with an error bar each; ranges: its low and high end, which never lies on the other side of the point."""
    below = [max(0.0, value - low) for value, (low, _) in zip(y, ranges, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(y, ranges, strict=True)]
    axes.errorbar(x, y, yerr=[below, above], **look)


def stacked_bars(axes: Axes, labels: Sequence[str], parts: Sequence[str], runs: Sequence[Mapping[str, float]]) -> None:
    """A horizontal bar for each run, put together from its parts in the order given; the first run at the top."""
    left = [0.0] * len(runs)
    for part, colour in zip(parts, COLOURS, strict=False):
        widths = [run.get(part, 0.0) for run in runs]
        axes.barh([literal(label) for label in labels], widths, left=left, color=colour, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()


def literal(text: str) -> str:
    """The text as a tick label, where a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def read_no_formulas(figure: Figure) -> None:
    """Take names as they are: from here on only tick labels can be formulas. To be called before anything is drawn."""
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()) is not None)]
    found = [text for legend in legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    for text in found:
        text.set_parse_math(False)


def save(figure: Figure, path: str | Path) -> None:
    """Write the picture. Raises InputError for a path that cannot be written."""
    read_no_formulas(figure)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"expected a picture path that can be written, got {path}: {error.strerror}") from error
