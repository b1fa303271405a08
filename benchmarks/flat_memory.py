"""Anonymous memory over many blocks under a tight expert budget: it must stay flat.

expertshare convert models/reference build/reference-experts
python benchmarks/flat_memory.py build/reference-experts --blocks 1000 --plot docs/images/flat-memory.png
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from expertshare.api import generate, load
from expertshare.lab.plots.style import COLOURS, check_plot_path, frame, new_figure, save
from expertshare.lab.tasks.generation import generate_items
from expertshare.measure.memory import anonymous_bytes
from expertshare.measure.report import capture_environment, write_json


class EnoughBlocks(Exception):
    """The listener has heard of as many blocks as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the expert layout")
    parser.add_argument("--budget", default="2MB", help="memory for experts")
    parser.add_argument("--blocks", default=1000, type=int)
    parser.add_argument("--plot", required=True, type=Path)
    parser.add_argument("--json", type=Path, help="write the memory after every block there")
    options = parser.parse_args()
    check_plot_path(options.plot)
    memory: list[int] = []

    def hear(_: object) -> None:
        now = anonymous_bytes()
        if now is None:
            raise SystemExit("this kernel does not say how much anonymous memory a process has (RssAnon): run on Linux")
        memory.append(now)
        if len(memory) == options.blocks:
            raise EnoughBlocks

    items = generate_items("arith", split="test", count=options.blocks, seed=1)
    loaded = load(options.model, store=options.budget)
    with suppress(EnoughBlocks):
        generate(loaded, [item.prompt for item in items], policy="vanilla", store=options.budget, on_block=hear)
    settled = memory[len(memory) // 10]
    print(f"{len(memory)} blocks; after a tenth {settled / 1e6:.1f} MB, at the end {memory[-1] / 1e6:.1f} MB")
    if options.json:
        told = {"model": options.model.name, "budget": options.budget, "blocks": len(memory)}
        told |= {"settled_bytes": settled, "end_bytes": memory[-1], "anonymous_bytes": memory}
        write_json(options.json, {**told, "environment": capture_environment().to_json()})
    figure, (axes,) = new_figure(options.plot, 7.2, 3.0)
    axes.plot(range(1, len(memory) + 1), [m / 1e6 for m in memory], color=COLOURS[0])
    axes.set_ylim(0, 1.25e-6 * max(memory))
    frame(axes, title=f"{options.model.name}, {options.budget} for experts", x="blocks", y="anonymous memory, MB")
    save(figure, options.plot)


if __name__ == "__main__":
    main()
