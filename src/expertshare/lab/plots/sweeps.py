"""Pictures of sweeps: over p of block top-p, and over the block length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from expertshare.lab.plots.style import COLOURS, INK, check_plot_path, frame, new_figure, save

Run = Mapping[str, Any]
KEPT = {True: "accuracy kept, % (tasks capped at 100)", False: "tokens equal to vanilla's, %"}


def plot_p_sweep(runs: Sequence[Run], reference: Run, path: str | Path) -> None:
    """Draw what block top-p keeps and uses against p to `path`; runs: of a comparison, ascending in p.

    Raises InputError for a path that cannot be written.
    """
    check_plot_path(path)
    figure = new_figure(10, 4)
    kept, experts = figure.subplots(1, 2)
    judged = reference["accuracy"] is not None
    shares = [run["knobs"]["top_p_experts"] for run in runs]
    _line(kept, shares, [_kept(run, judged=judged) for run in runs], COLOURS[0], "block top-p")
    kept.axhline(100, color=INK, linewidth=1, linestyle="--", label="vanilla")
    x_label = "p, share of the votes that the coreset holds"
    frame(kept, title="Quality", x=x_label, y=KEPT[judged])
    kept.set_ylim(bottom=0)
    _line(experts, shares, [run["unique_experts"]["denoise"] for run in runs], COLOURS[1], "block top-p")
    experts.axhline(reference["unique_experts"]["denoise"], color=INK, linewidth=1, linestyle="--", label="vanilla")
    frame(experts, title="Cost", x=x_label, y="unique experts per block and layer")
    experts.set_ylim(bottom=0)
    for axes in (kept, experts):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    save(figure, path)


def plot_block_lengths(comparisons: Mapping[int, Mapping[str, Any]], path: str | Path) -> None:
    """Draw what every policy saves and keeps against the block length to `path`; comparisons: by block length.

    Raises InputError for a path that cannot be written.
    """
    check_plot_path(path)
    figure = new_figure(10, 4.5)
    saved, kept = figure.subplots(1, 2)
    lengths = sorted(comparisons)
    judged = all(comparison["reference"]["accuracy"] is not None for comparison in comparisons.values())
    for index, label in enumerate(common_labels(comparisons)):
        runs = [_named(comparisons[length], label) for length in lengths]
        colour = COLOURS[index % len(COLOURS)]
        _line(saved, lengths, [100 * run["unique_experts_reduction"] for run in runs], colour, label)
        _line(kept, lengths, [_kept(run, judged=judged) for run in runs], colour, label)
    if judged:
        base = [100 * comparisons[length]["reference"]["accuracy"] for length in lengths]
        kept.plot(lengths, base, "D--", color=INK, markersize=5, linewidth=1, label="vanilla's own accuracy")
    frame(saved, title="Experts saved", x="block length", y="unique experts, % fewer than vanilla's")
    frame(kept, title="Quality", x="block length", y=KEPT[judged])
    for axes in (saved, kept):
        axes.set_xticks(lengths)
        axes.set_ylim(0, 103)
    handles, labels = kept.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)


def common_labels(comparisons: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Policies but vanilla that every comparison has, in the order of the first."""
    labels = [[run["label"] for run in comparison["runs"]] for comparison in comparisons.values()]
    return [label for label in labels[0] if label != "vanilla" and all(label in others for others in labels)]


def _named(comparison: Mapping[str, Any], label: str) -> Run:
    return next(run for run in comparison["runs"] if run["label"] == label)


def _kept(run: Run, *, judged: bool) -> float:
    share = run["retained_capped"] if judged else run["agreement"]
    return 100 * share if share is not None else float("nan")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    axes.plot(x, y, "o-", color=colour, markersize=5, linewidth=1.4, label=label)
