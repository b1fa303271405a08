"""Tokens per second and memory, from the results of full_size_memory.py: a bar for every model and policy.

python benchmarks/memory_plot.py benchmarks/results/memory-mini-bf16.json benchmarks/results/memory-mini-int4.json \\
    --names "bfloat16,4 bit (embeddings in int8)" --out docs/images/memory-mini.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from expertshare.lab.plots.style import COLOURS, INK, check_plot_path, frame, new_figure, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of full_size_memory.py")
    parser.add_argument("--names", help="of the results, in their order, parted by commas")
    parser.add_argument("--title", default="A model of LLaDA2.0-mini's shape (16 B parameters) on 2 CPU cores")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    check_plot_path(options.out)
    names = options.names.split(",") if options.names else [path.stem for path in options.results]
    figure, (axes,) = new_figure(options.out, 7.2, 3.6)
    labels: list[str] = []
    places: list[float] = []
    for index, (name, path) in enumerate(zip(names, options.results, strict=True)):
        try:
            points = json.loads(path.read_text(encoding="utf-8"))["points"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"expected a result of full_size_memory.py, got {path}: {error!r}; make it again")
        rows = _rows([point["budget"] for point in points], after=places)
        places += rows
        speeds = [point["tokens_per_s"] for point in points]
        axes.barh(rows, speeds, color=COLOURS[index], label=name)
        for row, point in zip(rows, points, strict=True):
            faster = point["faster_than_vanilla"]  # None where vanilla was not measured
            told = f" {point['tokens_per_s']:.2f}" + ("" if faster is None else f"  ({faster:.1f}x)")
            axes.text(point["tokens_per_s"], row, told, va="center", fontsize=9, color=INK)
        labels += [f"{point['policy']}, {point['peak_anonymous_bytes'] / 2**30:.1f} GiB" for point in points]
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    frame(axes, title=options.title, x="tokens per second (and against vanilla in the same memory)", y="")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    save(figure, options.out)


def _rows(budgets: list[str], *, after: list[float]) -> list[float]:
    """A place for each bar below those there are, with half a row between budgets."""
    rows: list[float] = []
    for index, budget in enumerate(budgets):
        above = (rows or after or [-1.5])[-1]
        rows.append(above + (1.0 if index and budget == budgets[index - 1] else 1.5))
    return rows


if __name__ == "__main__":
    main()
