"""Picture of where the time of a comparison goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertshare.lab.plots.style import COLOURS, INK, check_plot_path, frame, literal, new_figure, save


def plot_parts(runs: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw seconds by part of the model as one bar for each run to `path`; runs: of a comparison.

    Raises InputError for a path that cannot be written.
    """
    check_plot_path(path)
    figure = new_figure(9, 1.4 + 0.3 * len(runs))
    axes = figure.add_subplot()
    labels = [literal(run["label"]) for run in runs]
    left = [0.0] * len(runs)
    for part, colour in zip(runs[0]["seconds_by_part"], COLOURS, strict=False):
        widths = [run["seconds_by_part"].get(part, 0.0) for run in runs]
        axes.barh(labels, widths, left=left, color=colour, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    frame(axes, title="Time by part of the model", x="seconds, all prompts", y="")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)
