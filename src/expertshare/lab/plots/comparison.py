"""Pictures of comparisons, drawn from their JSON form: a saved report's results can be drawn again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import BboxBase

from expertshare.lab.plots.style import COLOURS, INK, check_plot_path, frame, new_figure, read_no_formulas, save

VANILLA_COLOUR = "#222222"
# Offsets of a label from its point, in typographic points: beside it, then further below and above.
LABEL_PLACES = ((7, 5), (7, -12), (7, 17), (7, -24), (7, 29), (7, -36))


def plot_comparison(comparison: Mapping[str, Any], path: str | Path) -> None:
    """Draw quality against unique experts per denoising forward to `path`: a colour for each policy, its settings
    joined by a line and labelled with their knobs, vanilla as a diamond.

    comparison: what Comparison.to_json gives. Quality is accuracy with its 95 % interval where the prompts can be
    judged, else token agreement with vanilla. Raises InputError for a path that cannot be written.
    """
    check_plot_path(path)
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    judged = comparison["reference"]["accuracy"] is not None
    labels: list[Annotation] = []
    for index, (policy, runs) in enumerate(_by_policy(comparison).items()):
        colour = VANILLA_COLOUR if policy == "vanilla" else COLOURS[(index - 1) % len(COLOURS)]
        labels += _draw_policy(axes, policy, runs, colour, judged=judged)
    _decorate(axes, comparison["num_prompts"], judged=judged)
    read_no_formulas(figure)
    figure.draw_without_rendering()
    _part_labels(labels)
    save(figure, path)


def _by_policy(comparison: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Vanilla first, the others in their order; the runs of one policy from few experts to many."""
    grouped: dict[str, list[Mapping[str, Any]]] = {"vanilla": [comparison["reference"]]}
    for run in comparison["runs"]:
        if run["policy"] != "vanilla":
            grouped.setdefault(run["policy"], []).append(run)
    return {policy: sorted(runs, key=_experts) for policy, runs in grouped.items()}


def _experts(run: Mapping[str, Any]) -> float:
    return float(run["unique_experts"]["denoise"])


def _draw_policy(
    axes: Axes, policy: str, runs: Sequence[Mapping[str, Any]], colour: str, *, judged: bool
) -> list[Annotation]:
    x = [_experts(run) for run in runs]
    y = [100 * (run["accuracy"] if judged else run["agreement"]) for run in runs]
    marker = "D" if policy == "vanilla" else "o"
    axes.plot(x, y, marker, linestyle="-", linewidth=1, color=colour, markersize=6, label=policy, zorder=5)
    if judged:
        low = [max(0.0, share - 100 * run["accuracy_interval"][0]) for share, run in zip(y, runs, strict=True)]
        high = [max(0.0, 100 * run["accuracy_interval"][1] - share) for share, run in zip(y, runs, strict=True)]
        axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1, capsize=3, alpha=0.45)
    halo = [withStroke(linewidth=2, foreground="white")]
    return [
        axes.annotate(
            run["label"].partition(":")[2],
            point,
            xytext=LABEL_PLACES[0],
            textcoords="offset points",
            fontsize=7,
            color=colour,
            path_effects=halo,
            zorder=4,
        )
        for run, point in zip(runs, zip(x, y, strict=True), strict=True)
        if ":" in run["label"]
    ]


def _part_labels(labels: Sequence[Annotation]) -> None:
    """Move every label to the first place beside its point where it covers none that was placed before it."""
    placed: list[BboxBase] = []
    for label in labels:
        for place in LABEL_PLACES:
            label.set_position(place)
            if not any(label.get_window_extent().overlaps(other) for other in placed):
                break
        placed.append(label.get_window_extent())


def _decorate(axes: Axes, num_prompts: int, *, judged: bool) -> None:
    noun = "prompt" if num_prompts == 1 else "prompts"
    frame(
        axes,
        title=f"Quality against experts, {num_prompts} {noun}",
        x="unique experts per block and layer, mean over denoising forwards",
        y="right answers, % (bars: 95 % interval)" if judged else "tokens equal to vanilla's, %",
    )
    axes.margins(x=0.15, y=0.12)
    axes.set_xlim(left=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelcolor=INK)
