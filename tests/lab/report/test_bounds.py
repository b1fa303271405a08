"""Bounds of codes and of floats are told apart: each is of its own bytes."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from expertshare.lab.plots.bench import _draw_latency
from expertshare.lab.report.measured import latency_table
from lab.report.conftest import content

POINTS = content("experts-mini-1")["results"]["cases"]


def test_the_table_gives_the_bound_of_floats() -> None:
    bound = next(p["bound_ms"] for p in POINTS if (p["backend"], p["unique"]) == ("cpu", 70))
    row = next(row for row in latency_table(POINTS).rows if row[2].text == "70")
    assert row[3].text == f"{bound:.2f}"
    codes = [point for point in POINTS if point["quantisation"] == "int4"]
    assert latency_table(codes).rows[0][3].text == f"{codes[0]['bound_ms']:.2f}"


@pytest.mark.parametrize(("label", "backend"), [("bound", "cpu"), ("bound of int4", "cpu-int4")])
def test_the_picture_has_a_line_for_each(label: str, backend: str) -> None:
    axes = Figure().add_subplot()
    _draw_latency(axes, POINTS, {"cpu": ("red", "o"), "cpu-int4": ("blue", "s")})
    (line,) = (line for line in axes.lines if line.get_label() == label)
    mine = sorted((p["unique"], p["bound_ms"]) for p in POINTS if p["backend"] == backend)
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == mine
