"""`expertshare tasks`: write prompts of the generated tasks, with what their answers are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertshare.cli.console import check_at_least_one, check_outputs
from expertshare.evaluation.prompts import write_prompts
from expertshare.lab.tasks.generation import TASKS, generate_items

EXAMPLE = "Example: expertshare tasks prompts.jsonl --task arith --task code --count 100 --seed 1"


def tasks(
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="File to write.")],
    task: Annotated[
        list[str] | None, typer.Option(help=f"Task ({', '.join(TASKS)}); may be repeated. Default: all.")
    ] = None,
    count: Annotated[int, typer.Option(help="Prompts of each task.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    split: Annotated[str, typer.Option(help="test (never trained on) or train.")] = "test",
) -> None:
    """Write prompts of the generated tasks as JSONL, for `expertshare compare` and `generate`."""
    check_at_least_one("count", count)
    check_outputs(out)
    names = list(dict.fromkeys(task or TASKS))
    items = [item for name in names for item in generate_items(name, split=split, count=count, seed=seed)]  # type: ignore[arg-type]
    write_prompts(out, items)
    typer.echo(f"{len(items)} prompts in {out}: {', '.join(names)}; split {split}, seed {seed}")
