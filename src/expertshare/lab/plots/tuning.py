"""Picture of a tuning run, drawn from its JSON form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from expertshare.lab.plots.style import COLOURS, INK, check_plot_path, frame, new_figure, save

_COSTS = {
    "experts": ("unique_experts", "unique experts per block and layer, mean over denoising forwards", 1.0),
    "bytes": ("expert_bytes", "expert weights read per prompt, MB", 1e-6),
    "latency": ("seconds_per_block", "time per block, ms", 1e3),
}
_GREY = "#999999"


def plot_tuning(tuned: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each verified policy retains against its cost to `path`, with one-sided bounds.

    tuned: what Tuned.to_json gives. Grey: tried on the prompts of the search, without a claim. Raises InputError for a
    path that cannot be written.
    """
    check_plot_path(path)
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    key, label, unit = _COSTS[tuned["cost_kind"]]
    tried = [run for run in tuned["tried"] if run[key] is not None]  # latency is not measured in the search
    _draw(axes, tried, key, unit, colour=_GREY, marker="o", name="tried in the search")
    passed = [run for run in tuned["tested"] if run["passed"]]
    failed = [run for run in tuned["tested"] if not run["passed"]]
    _draw(axes, passed, key, unit, colour=COLOURS[2], marker="o", name="certified")
    _draw(axes, failed, key, unit, colour=COLOURS[1], marker="X", name="not certified")
    axes.plot(tuned["vanilla"][key] * unit, 100, "D", color="#222222", label="vanilla")
    if tuned["certified"]:
        chosen = tuned["chosen"]
        place = (chosen[key] * unit, 100 * chosen["retained"])
        axes.plot(*place, "o", markersize=14, fillstyle="none", color=INK, label="chosen")
    promise = tuned["options"]["retain"]
    axes.axhline(100 * promise, color=INK, linewidth=1, linestyle="--", label=f"promise, {100 * promise:g} %")
    what = "accuracy, % of vanilla's" if tuned["quality"] == "accuracy" else "answers equal to vanilla's, %"
    counts, confidence = tuned["num_prompts"], 100 * tuned["options"]["confidence"]
    frame(
        axes,
        title=f"Tuning: {counts['search']} prompts to search, {counts['certify']} to certify",
        x=label,
        y=f"{what} (bars: one-sided {confidence:g} % bound)",
    )
    axes.margins(x=0.1, y=0.12)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)


def _draw(
    axes: Axes, runs: Sequence[Mapping[str, Any]], key: str, unit: float, *, colour: str, marker: str, name: str
) -> None:
    if not runs:
        return
    x, y = [run[key] * unit for run in runs], [100 * run["retained"] for run in runs]
    below = [max(0.0, share - 100 * run["lower_bound"]) for share, run in zip(y, runs, strict=True)]
    axes.errorbar(x, y, yerr=[below, [0.0] * len(y)], fmt=marker, color=colour, capsize=3, elinewidth=1, label=name)
