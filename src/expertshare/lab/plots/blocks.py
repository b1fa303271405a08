"""Pictures of what single blocks do: experts by step, by token, and what the loss of one expert costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from expertshare.lab.plots.style import COLOURS, INK, SMALL, frame, new_figure, save


def plot_steps(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw how unique experts are distributed over denoising steps, and their mean by step, to `path`.

    results: of benchmarks/steps_distribution.py.
    """
    figure = new_figure(path, 10, 4.4)
    spread, course = figure.subplots(1, 2)
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
    figure = new_figure(path, 10, 4)
    panels = figure.subplots(1, 2)
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
    figure = new_figure(path, 10, 4)
    union, intensity = figure.subplots(1, 2)
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
