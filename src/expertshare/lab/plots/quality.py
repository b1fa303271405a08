"""Pictures of experts: quality against them in comparisons, sweeps over p and the block length, and tuning runs; and
what single blocks use, by step and by token, and lose with one of them. Each is drawn from the JSON form of its
results, so that a saved report can be drawn again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import BboxBase

from expertshare.lab.plots.style import (
    COLOURS,
    INK,
    SMALL,
    frame,
    legend_beside,
    new_figure,
    read_no_formulas,
    save,
    with_range,
)

Run = Mapping[str, Any]
VANILLA_COLOUR = "#222222"
# Offsets of a label from its point, in typographic points: beside it, then further below and above.
LABEL_OFFSETS = ((7, 5), (7, -12), (7, 17), (7, -24), (7, 29), (7, -36))
KEPT = {True: "accuracy kept, % (tasks capped at 100)", False: "tokens equal to vanilla's, %"}
COSTS = {
    "experts": ("unique_experts", "unique experts per block and layer, mean over denoising forwards", 1.0),
    "bytes": ("expert_bytes", "expert weights read per prompt, MB", 1e-6),
    "latency": ("seconds_per_block", "time per block, ms", 1e3),
}


def plot_comparison(comparison: Mapping[str, Any], path: str | Path) -> None:
    """Draw quality against unique experts per denoising forward to `path`: a colour for each policy, its settings
    joined by a line and labelled with their knobs, vanilla as a diamond.

    comparison: what Comparison.to_json gives. Quality is accuracy with its 95 % interval where the prompts can be
    judged, else token agreement with vanilla.
    """
    figure, (axes,) = new_figure(path, 8, 4.8)
    judged = comparison["reference"]["accuracy"] is not None
    grouped: dict[str, list[Run]] = {"vanilla": [comparison["reference"]]}
    for run in comparison["runs"]:
        if run["policy"] != "vanilla":
            grouped.setdefault(run["policy"], []).append(run)
    labels: list[Annotation] = []
    for index, (policy, runs) in enumerate(grouped.items()):
        colour = VANILLA_COLOUR if policy == "vanilla" else COLOURS[(index - 1) % len(COLOURS)]
        labels += _draw_policy(axes, policy, sorted(runs, key=_experts), colour, judged=judged)
    count = comparison["num_prompts"]
    frame(
        axes,
        title=f"Quality against experts, {count} {'prompt' if count == 1 else 'prompts'}",
        x="unique experts per block and layer, mean over denoising forwards",
        y="right answers, % (bars: 95 % interval)" if judged else "tokens equal to vanilla's, %",
    )
    axes.margins(x=0.15, y=0.12)
    axes.set_xlim(left=0)
    legend_beside(axes)
    read_no_formulas(figure)
    figure.draw_without_rendering()
    _part_labels(labels)
    save(figure, path)


def _experts(run: Run) -> float:
    return float(run["unique_experts"]["denoise"])


def _draw_policy(axes: Axes, policy: str, runs: Sequence[Run], colour: str, *, judged: bool) -> list[Annotation]:
    x = [_experts(run) for run in runs]
    y = [100 * (run["accuracy"] if judged else run["agreement"]) for run in runs]
    marker = "D" if policy == "vanilla" else "o"
    axes.plot(x, y, marker, linestyle="-", linewidth=1, color=colour, markersize=6, label=policy, zorder=5)
    if judged:
        intervals = [[100 * end for end in run["accuracy_interval"]] for run in runs]
        with_range(axes, x, y, intervals, fmt="none", ecolor=colour, elinewidth=1, capsize=3, alpha=0.45)
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": colour, "zorder": 4}
    halo = [withStroke(linewidth=2, foreground="white")]
    return [
        axes.annotate(run["label"].partition(":")[2], point, xytext=LABEL_OFFSETS[0], path_effects=halo, **look)
        for run, point in zip(runs, zip(x, y, strict=True), strict=True)
        if ":" in run["label"]
    ]


def _part_labels(labels: Sequence[Annotation]) -> None:
    """Move every label to the first offset from its point where it covers none that was placed before it."""
    placed: list[BboxBase] = []
    for label in labels:
        for offset in LABEL_OFFSETS:
            label.set_position(offset)
            if not any(label.get_window_extent().overlaps(other) for other in placed):
                break
        placed.append(label.get_window_extent())


def plot_p_sweep(runs: Sequence[Run], reference: Run, path: str | Path) -> None:
    """Draw what block top-p keeps and uses against p to `path`; runs: of a comparison, ascending in p."""
    figure, (kept, experts) = new_figure(path, 10, 4, 2)
    judged = reference["accuracy"] is not None
    shares = [run["knobs"]["top_p_experts"] for run in runs]
    panels = (
        (kept, [_kept(run, judged=judged) for run in runs], 100, "Quality", KEPT[judged]),
        (experts, [_experts(run) for run in runs], _experts(reference), "Cost", "unique experts per block and layer"),
    )
    for (axes, values, level, title, y), colour in zip(panels, COLOURS, strict=False):
        _line(axes, shares, values, colour, "block top-p")
        axes.axhline(level, color=INK, linewidth=1, linestyle="--", label="vanilla")
        frame(axes, title=title, x="p, share of the votes that the coreset holds", y=y)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", **SMALL)
    save(figure, path)


def plot_block_lengths(comparisons: Mapping[int, Mapping[str, Any]], path: str | Path) -> None:
    """Draw what every policy saves and keeps against the block length to `path`; comparisons: by block length."""
    figure, (saved, kept) = new_figure(path, 10, 4.5, 2)
    lengths = sorted(comparisons)
    judged = all(comparison["reference"]["accuracy"] is not None for comparison in comparisons.values())
    for index, label in enumerate(common_labels(comparisons)):
        runs = [next(run for run in comparisons[length]["runs"] if run["label"] == label) for length in lengths]
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
    figure.legend(*kept.get_legend_handles_labels(), loc="outside lower center", ncols=3, **SMALL)
    save(figure, path)


def common_labels(comparisons: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Policies but vanilla that every comparison has, in the order of the first."""
    labels = [[run["label"] for run in comparison["runs"]] for comparison in comparisons.values()]
    return [label for label in labels[0] if label != "vanilla" and all(label in others for others in labels)]


def _kept(run: Run, *, judged: bool) -> float:
    share = run["retained_capped"] if judged else run["agreement"]
    return 100 * share if share is not None else float("nan")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    axes.plot(x, y, "o-", color=colour, markersize=5, linewidth=1.4, label=label)


def plot_tuning(tuned: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each verified policy retains against its cost to `path`, with one-sided bounds.

    tuned: what Tuned.to_json gives. Grey: tried on the prompts of the search, without a claim.
    """
    figure, (axes,) = new_figure(path, 8, 4.8)
    key, label, unit = COSTS[tuned["cost_kind"]]
    tried = [run for run in tuned["tried"] if run[key] is not None]  # latency is not measured in the search
    passed, failed = ([run for run in tuned["tested"] if run["passed"] == verdict] for verdict in (True, False))
    groups = (
        (tried, "#999999", "o", "tried in the search"),
        (passed, COLOURS[2], "o", "certified"),
        (failed, COLOURS[1], "X", "not certified"),
    )
    for runs, colour, marker, name in groups:
        if runs:
            x, y = [run[key] * unit for run in runs], [100 * run["retained"] for run in runs]
            bounds = [(100 * run["lower_bound"], share) for run, share in zip(runs, y, strict=True)]
            with_range(axes, x, y, bounds, fmt=marker, color=colour, capsize=3, elinewidth=1, label=name)
    axes.plot(tuned["vanilla"][key] * unit, 100, "D", color=VANILLA_COLOUR, label="vanilla")
    if tuned["certified"]:
        chosen = (tuned["chosen"][key] * unit, 100 * tuned["chosen"]["retained"])
        axes.plot(*chosen, "o", markersize=14, fillstyle="none", color=INK, label="chosen")
    promise, counts = 100 * tuned["options"]["retain"], tuned["num_prompts"]
    axes.axhline(promise, color=INK, linewidth=1, linestyle="--", label=f"promise, {promise:g} %")
    what = "accuracy, % of vanilla's" if tuned["quality"] == "accuracy" else "answers equal to vanilla's, %"
    frame(
        axes,
        title=f"Tuning: {counts['search']} prompts to search, {counts['certify']} to certify",
        x=label,
        y=f"{what} (bars: one-sided {100 * tuned['options']['confidence']:g} % bound)",
    )
    axes.margins(x=0.1, y=0.12)
    legend_beside(axes)
    save(figure, path)


def plot_steps(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw how unique experts are distributed over denoising steps, and their mean by step, to `path`.

    results: of benchmarks/steps_distribution.py.
    """
    figure, (spread, course) = new_figure(path, 10, 4.4, 2)
    for index, run in enumerate(results["runs"]):
        colour = COLOURS[index % len(COLOURS)]
        counts = np.sum(run["histogram_by_layer"], axis=0)
        label = f"{run['label']}\nmean {run['unique_experts']:.1f}, CV {100 * run['cv']:.1f} %"
        shares, edges = 100 * counts / counts.sum(), np.arange(len(counts) + 1) - 0.5
        spread.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
        spread.stairs(shares, edges, color=colour, label=label)
        steps = [point["step"] + 1 for point in run["by_step"]]
        mean = np.array([point["mean"] for point in run["by_step"]])
        std = np.array([point["std"] for point in run["by_step"]])
        course.plot(steps, mean, "o-", color=colour, markersize=4, linewidth=1.2)
        course.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    frame(spread, title="Distribution", x="unique experts of a block in a layer", y="share of steps and layers, %")
    frame(course, title="Course within a block", x="denoising step", y="mean over layers (band: deviation)")
    course.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3, **SMALL)
    save(figure, path)


def plot_weight_against_loss(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw loss increase against router weight, a panel for each way of taking an expert out, to `path`.

    results: of benchmarks/weight_against_loss.py.
    """
    figure, panels = new_figure(path, 10, 4, 2)
    titles = {"replaced": "Tokens take their next expert", "dropped": "Tokens run one expert less"}
    for axes, (way, title) in zip(panels, titles.items(), strict=True):
        found = results[way]
        x = [100 * weight for _, weight, _ in found["sample"]]
        y = [increase for _, _, increase in found["sample"]]
        axes.plot(x, y, ".", color=COLOURS[5], markersize=3, alpha=0.6, label=f"sample of {len(x):,}")
        tenths = found["tenths"]
        means = [100 * tenth["weight"] for tenth in tenths], [tenth["increase"] for tenth in tenths]
        axes.plot(*means, "o-", color=COLOURS[1], markersize=5, label="means by tenths of all")
        r = found["weights"]["sum"]["pearson_r"]
        x_label = "router weight in the block, % of the layer's sum"
        frame(axes, title=f"{title}: r = {r:.2f}", x=x_label, y="loss increase, nats")
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.legend(**SMALL)
    save(figure, path)


def plot_growth(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the union of experts against the tokens of a block, and products per byte of weights, to `path`.

    results: of benchmarks/expert_growth.py.
    """
    figure, (union, intensity) = new_figure(path, 10, 4, 2)
    points = results["points"]
    tokens = [point["tokens"] for point in points]
    linear = [min(results["num_experts"], results["experts_per_token"] * count) for count in tokens]
    union.plot(tokens, [point["unique_experts"] for point in points], "o-", color=COLOURS[0], label="measured")
    union.plot(tokens, [point["independent"] for point in points], "--", color=COLOURS[1], label="independent tokens")
    union.plot(tokens, linear, ":", color=INK, label="linear, up to all experts")
    frame(union, title="Union", x="tokens of the block", y="unique experts of a layer")
    names = {"dense_macs_per_byte": "dense layer", "macs_per_byte": "MoE layer"}
    for (key, name), colour in zip(names.items(), (COLOURS[2], COLOURS[0]), strict=True):
        intensity.plot(tokens, [point[key] for point in points], "o-", color=colour, label=name)
    frame(intensity, title="Work for each byte", x="tokens of the block", y="multiply-accumulates per byte of weights")
    for axes in (union, intensity):
        axes.set_ylim(bottom=0)
        axes.legend(**SMALL)
    save(figure, path)
