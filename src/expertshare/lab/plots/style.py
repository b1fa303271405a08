"""What all pictures share: formats, colours, frames."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from expertshare.errors import InputError

FORMATS = (".png", ".svg", ".pdf")
INK, GRID = "#333333", "#e3e3e3"
# Told apart by colour-blind readers too (Okabe and Ito), then repeated.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")


def check_plot_path(path: str | Path) -> None:
    """Raise InputError unless the name ends like a format that can be drawn."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"expected a picture name ending in {', '.join(FORMATS)}, got {path}")


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes, *, title: str, x: str, y: str) -> None:
    """Title, axis labels, a quiet grid, and no box."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def literal(text: str) -> str:
    """The text as a tick label, where a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def read_no_formulas(figure: Figure) -> None:
    """Take names as they are: from here on only tick labels can be formulas. To be called before anything is drawn."""
    for text in _words(figure):
        text.set_parse_math(False)


def _words(figure: Figure) -> list[Text]:
    """Titles, labels of axes, legends and annotations."""
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()) is not None)]
    found = [text for legend in legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    return found


def save(figure: Figure, path: str | Path) -> None:
    """Write the picture. Raises InputError for a path that cannot be written."""
    read_no_formulas(figure)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"expected a picture path that can be written, got {path}: {error.strerror}") from error
