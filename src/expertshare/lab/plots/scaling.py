"""Picture of a capacity simulation, drawn from its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from expertshare.lab.plots.style import COLOURS, SMALL, check_plot_path, frame, new_figure, save

_PARTS = (("dense_s", "dense", "#999999"), ("experts_s", "experts", COLOURS[0]), ("exchange_s", "exchange", COLOURS[1]))


def plot_scaling(simulated: Mapping[str, Any], path: str | Path) -> None:
    """Draw tokens per second against GPUs, and the parts of a step at every expert-parallel degree, to `path`.

    simulated: what `expertshare simulate --json` prints. Raises InputError for a path that cannot be written.
    """
    check_plot_path(path)
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    _sweep(left, simulated)
    _parts(right, simulated)
    save(figure, path)


def _sweep(axes: Axes, simulated: Mapping[str, Any]) -> None:
    for trace, colour, marker in zip(simulated["traces"], COLOURS, "osD^vPX", strict=False):
        points = [point for point in trace["sweep"] if point["tokens_per_s"] > 0]
        x, y = [point["gpus"] for point in points], [point["tokens_per_s"] for point in points]
        axes.plot(x, y, marker=marker, markersize=4, color=colour, label=trace["label"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    card = simulated["cluster"]["card"]["name"]
    frame(axes, title=f"{simulated['model']} on {card}", x="GPUs", y="tokens per second")
    axes.legend(**SMALL)


def _parts(axes: Axes, simulated: Mapping[str, Any]) -> None:
    """Bars side by side: one for each trace at each degree."""
    traces = simulated["traces"]
    degrees = [each["replica"]["num_gpus"] for each in traces[0]["degrees"]]
    width = 0.8 / len(traces)
    for turn, trace in enumerate(traces):
        places = [index + (turn - (len(traces) - 1) / 2) * width for index in range(len(degrees))]
        below = [0.0] * len(degrees)
        for key, name, colour in _PARTS:
            heights = [1e3 * each["replica"][key] for each in trace["degrees"]]
            look: dict[str, Any] = {"color": colour, "alpha": 1.0 if turn == 0 else 0.55}
            axes.bar(places, heights, 0.9 * width, bottom=below, label=f"{name}, {trace['label']}", **look)
            below = [low + high for low, high in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(degrees)), [str(degree) for degree in degrees])
    frame(axes, title="Parts of a step", x="expert-parallel degree (GPUs of a replica)", y="ms")
    axes.legend(**{**SMALL, "fontsize": 7})
