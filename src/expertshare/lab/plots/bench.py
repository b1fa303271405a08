"""Pictures of time: latency against unique experts, roofline, time by part, throughput, what many GPUs deliver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from expertshare.errors import InputError
from expertshare.lab.plots.style import (
    COLOURS,
    INK,
    SMALL,
    frame,
    legend_beside,
    literal,
    new_figure,
    save,
    stacked_bars,
    with_range,
)

PANEL_WIDTH, PANEL_HEIGHT = 6.4, 4.4
MARKERS = "osv"  # the next one where all colours are used
BOUND_STYLES = ("--", ":", "-.")
STEP_PARTS = {"dense": "#999999", "experts": COLOURS[0], "exchange": COLOURS[1]}
Point = Mapping[str, Any]
Look = tuple[str, str]  # colour, marker


def plot_bench(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw what `expertshare bench` measured: `results` is its JSON line, or "results" of its report.

    experts: a panel of latency for each case, and one roofline of all. forward: time by part. generate: tokens per
    second. Raises InputError for results without any measurement.
    """
    if results.get("cases"):
        _plot_experts(results, path)
    elif results.get("forwards"):
        _plot_forwards(results["forwards"], path)
    elif results.get("generations"):
        _plot_generations(results["generations"], path)
    else:
        raise InputError("expected measurements to draw, got none: see why contenders were left out")


def _plot_experts(results: Mapping[str, Any], path: str | Path) -> None:
    points: Sequence[Point] = results["cases"]
    cases = list(dict.fromkeys((point["case"], point["tokens"]) for point in points))
    looks = _looks(point["backend"] for point in points)
    figure, panels = new_figure(path, PANEL_WIDTH * (len(cases) + 1), PANEL_HEIGHT, len(cases) + 1)
    for axes, (case, tokens) in zip(panels, cases, strict=False):
        mine = [point for point in points if (point["case"], point["tokens"]) == (case, tokens)]
        _draw_latency(axes, mine, looks)
        frame(axes, title=f"{case}, {tokens} tokens", x="unique experts", y="ms per layer (bars: quartiles)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    _draw_roofline(panels[-1], points, looks, results["bandwidth_gb_per_s"], results["peak_gmac_per_s"])
    panels[0].legend(**SMALL)
    save(figure, path)


def _draw_latency(axes: Axes, points: Sequence[Point], looks: Mapping[str, Look]) -> None:
    for backend, (colour, marker) in looks.items():
        mine = [point for point in points if point["backend"] == backend]
        if mine:
            look: dict[str, Any] = {"marker": marker, "markersize": 4, "color": colour, "label": backend}
            _line(axes, mine, ("unique", "ms", "ms_quartiles"), **look)
    forms = sorted({point.get("quantisation") or "" for point in points})
    for index, form in enumerate(forms):
        mine = [point for point in points if (point.get("quantisation") or "") == form]
        bound = sorted({(point["unique"], point["bound_ms"]) for point in mine})
        label, style = f"bound of {form}" if form else "bound", BOUND_STYLES[index % len(BOUND_STYLES)]
        axes.plot([x for x, _ in bound], [y for _, y in bound], style, color=INK, linewidth=1.2, label=label)


def _line(axes: Axes, points: Sequence[Point], keys: tuple[str, str, str], **look: Any) -> None:
    """Points joined from left to right; keys: of what stands on both axes, and of its range."""
    x, y, ranges = zip(
        *([point[key] for key in keys] for point in sorted(points, key=itemgetter(keys[0]))), strict=True
    )
    with_range(axes, x, y, ranges, capsize=2, linewidth=1.2, **look)


def _draw_roofline(
    axes: Axes, points: Sequence[Point], looks: Mapping[str, Look], bandwidth: float, peak: float
) -> None:
    intensity, corner = [point["macs"] / point["bytes"] for point in points], peak / bandwidth
    edges = [min(intensity) / 2, max(*intensity, corner) * 2]
    axes.plot([edges[0], corner, edges[1]], [edges[0] * bandwidth, peak, peak], "--", color=INK, linewidth=1.2)
    for backend, (colour, marker) in looks.items():
        mine = [point for point in points if point["backend"] == backend]
        x = [point["macs"] / point["bytes"] for point in mine]
        axes.plot(x, [point["gmac_per_s"] for point in mine], marker, markersize=4, color=colour, label=backend)
    axes.set_xscale("log")
    axes.set_yscale("log")
    title = f"Roofline: {bandwidth:.0f} GB/s, {peak:.0f} GMAC/s"
    frame(axes, title=title, x="multiply-accumulates per byte", y="GMAC/s")


def _plot_forwards(points: Sequence[Point], path: str | Path) -> None:
    figure, (axes,) = new_figure(path, PANEL_WIDTH * 1.4, 1.2 + 0.4 * len(points))
    labels = [f"{point['backend']}, {point['policy']}" for point in points]
    parts = next((list(point["ms_by_part"]) for point in points if "ms_by_part" in point), [])
    stacked_bars(axes, labels, parts, [point.get("ms_by_part", {}) for point in points])
    whole = [0.0 if "ms_by_part" in point else point["ms"] for point in points]
    if any(whole):
        axes.barh([literal(label) for label in labels], whole, color="#bbbbbb", label="not told apart", height=0.6)
    frame(axes, title=f"{points[0]['case']}: one denoising forward", x="ms (medians)", y="")
    legend_beside(axes)
    save(figure, path)


def plot_parts(runs: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw seconds by part of the model as one bar for each run to `path`; runs: of a comparison."""
    figure, (axes,) = new_figure(path, 9, 1.4 + 0.3 * len(runs))
    seconds = [run["seconds_by_part"] for run in runs]
    stacked_bars(axes, [run["label"] for run in runs], list(seconds[0]), seconds)
    frame(axes, title="Time by part of the model", x="seconds, all prompts", y="")
    legend_beside(axes)
    save(figure, path)


def _plot_generations(points: Sequence[Point], path: str | Path) -> None:
    figure, (axes,) = new_figure(path, PANEL_WIDTH * 1.4, PANEL_HEIGHT)
    lines = list(dict.fromkeys((point["backend"], point["policy"]) for point in points))
    for index, (backend, policy) in enumerate(lines):
        mine = [point for point in points if (point["backend"], point["policy"]) == (backend, policy)]
        look = {"marker": "o", "color": COLOURS[index % len(COLOURS)], "label": f"{backend}, {policy}"}
        _line(axes, mine, ("batch_size", "tokens_per_s", "tokens_per_s_range"), **look)
    frame(axes, title=f"{points[0]['model']}: whole answers", x="batch size", y="tokens/s (bars: range)")
    axes.set_xticks(sorted({point["batch_size"] for point in points}))
    axes.set_ylim(bottom=0)
    legend_beside(axes)
    save(figure, path)


def _looks(backends: Any) -> dict[str, Look]:
    """A colour and a marker for each contender, the same in every panel."""
    names, colours = list(dict.fromkeys(backends)), len(COLOURS)
    return {name: (COLOURS[i % colours], MARKERS[i // colours % len(MARKERS)]) for i, name in enumerate(names)}


def plot_scaling(simulated: Mapping[str, Any], path: str | Path) -> None:
    """Draw tokens per second against GPUs, and the parts of a step at every expert-parallel degree, to `path`.

    simulated: what `expertshare simulate --json` prints.
    """
    figure, (sweep, parts) = new_figure(path, 11, 4.4, 2)
    for trace, colour, marker in zip(simulated["traces"], COLOURS, "osD^vPX", strict=False):
        points = [point for point in trace["sweep"] if point["tokens_per_s"] > 0]
        x, y = [point["gpus"] for point in points], [point["tokens_per_s"] for point in points]
        sweep.plot(x, y, marker=marker, markersize=4, color=colour, label=trace["label"])
    sweep.set_xscale("log")
    sweep.set_yscale("log")
    card = simulated["cluster"]["card"]["name"]
    frame(sweep, title=f"{simulated['model']} on {card}", x="GPUs", y="tokens per second")
    sweep.legend(**SMALL)
    _draw_step_parts(parts, simulated["traces"])
    save(figure, path)


def _draw_step_parts(axes: Axes, traces: Sequence[Mapping[str, Any]]) -> None:
    """Bars side by side: one for each trace at each degree."""
    degrees = [each["replica"]["num_gpus"] for each in traces[0]["degrees"]]
    width = 0.8 / len(traces)
    for turn, trace in enumerate(traces):
        positions = [index + (turn - (len(traces) - 1) / 2) * width for index in range(len(degrees))]
        below = [0.0] * len(degrees)
        for name, colour in STEP_PARTS.items():
            heights = [1e3 * each["replica"][f"{name}_s"] for each in trace["degrees"]]
            look: dict[str, Any] = {"color": colour, "alpha": 1.0 if turn == 0 else 0.55}
            axes.bar(positions, heights, 0.9 * width, bottom=below, label=f"{name}, {trace['label']}", **look)
            below = [low + high for low, high in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(degrees)), [str(degree) for degree in degrees])
    frame(axes, title="Parts of a step", x="expert-parallel degree (GPUs of a replica)", y="ms")
    axes.legend(**{**SMALL, "fontsize": 7})
