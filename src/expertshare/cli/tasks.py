"""`expertshare tasks`: write prompts of the generated tasks, with what their answers are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertshare.cli.console import check_outputs
from expertshare.cli.options import check_at_least_one, option
from expertshare.evaluation.prompts import write_prompts
from expertshare.lab.tasks.generation import TASKS, generate_items

KNOWN = ", ".join(TASKS)


def tasks(
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="File to write.")],
    task: list[str] | None = option(f"Task ({KNOWN}); may be repeated. Default: all.", None),
    count: int = option("Prompts of each task.", 100),
    seed: int = option("Seed of the draw.", 0),
    split: str = option("test (never trained on) or train.", "test"),
) -> None:
    """Write prompts of the generated tasks as JSONL, for `expertshare compare` and `generate`.

    Example: expertshare tasks prompts.jsonl --task arith --task code --count 100 --seed 1
    """
    check_at_least_one("count", count)
    check_outputs(out)
    names = list(dict.fromkeys(task or TASKS))
    items = [item for name in names for item in generate_items(name, split=split, count=count, seed=seed)]  # type: ignore[arg-type]
    write_prompts(out, items)
    typer.echo(f"{len(items)} prompts in {out}: {', '.join(names)}; split {split}, seed {seed}")
