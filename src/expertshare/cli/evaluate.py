"""`expertshare eval`: accuracy of policies on tasks and benchmarks, resumable, one line per answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import Bars, figure, people, percent, percent_within, print_json, table
from expertshare.cli.options import option, split_names
from expertshare.evaluation.items import PRESETS

LABEL_WIDTH = 18
Row = Mapping[str, Any]


def evaluate(
    context: typer.Context,
    model: flags.Model,
    out: Path = option("Directory of this evaluation; one that was interrupted goes on.", metavar="RUN_DIR"),
    tasks: str = option(
        "Tasks, parted by commas: generated kinds (arith, ...) or benchmarks (gsm8k, ...).", "arith,math,choice"
    ),
    policies: str = option("Policies, parted by commas. Vanilla is always run.", "vanilla"),
    policy_file: flags.PoliciesFromFiles = None,
    preset: str | None = option(f"Settings of a paper ({', '.join(PRESETS)}); given flags go before it.", None),
    limit: int | None = option("Items of each task. Default: all; of generated ones 100.", None),
    shots: int | None = option("Examples before a benchmark's question.", None),
    data: Path | None = option("Folder of benchmark files. Default: the hub.", None, metavar="DIR"),
    allow_code: bool = option("Run code that the model wrote, in a subprocess with limits.", False, "--allow-code"),
    processes: int = option("Processes that answer, each with the model loaded.", 1),
    threads: int = option("Threads of each process.", 1),
    *,
    compute: flags.Answering,
    as_json: flags.Json = False,
    scale: flags.Ray,
    decoding: flags.Decoding,
    storage: flags.Storage,
) -> None:
    """Ask every item of the tasks under every policy; say what is right, what that costs, and how sure it is.

    RUN_DIR gets run.json, items.jsonl (a line per answer) and report.json. --seed is of items, examples and sampling.

    Example: expertshare eval models/reference --tasks arith,code --policies vanilla,des-vote:budget=28 --limit 100
    --allow-code --out runs/vote
    """
    with Bars() as bars:
        evaluation = api.evaluate(
            model,
            split_names(tasks),
            [policies, *(api.load_policy(file) for file in policy_file or [])],
            out=out,
            preset=preset,
            limit=limit,
            shots=shots,
            data=data,
            allow_code=allow_code,
            processes=processes,
            threads=threads,
            store=storage.store(),
            on_progress=bars.hear,
            on_notice=lambda notice: typer.echo(notice, err=True),
            **scale.arguments(),
            **compute.arguments(),
            **decoding.given(context),
        )
    results, console = evaluation.results, people(as_json=as_json)
    for each in (_tasks(results["rows"]), _costs(results["rows"]), _summary(results["summary"])):
        console.print(each)
    if as_json:
        print_json({**results, "run_dir": str(out)})


def _tasks(rows: list[Row]) -> Table:
    """Accuracy of every policy at every task, beside vanilla's."""

    def difference(row: Row) -> str:
        found = row["difference"]
        return percent_within(found["value"], [found["low"], found["high"]]) if found else "-"

    columns: dict[str, Callable[[Row], str]] = {
        "policy": lambda row: row["policy"],
        "task": lambda row: row["task"],
        "right": lambda row: f"{row['correct']}/{row['judged']}" if row["judged"] else "-",
        "accuracy %": lambda row: percent_within(row["accuracy"], row["interval"]),
        "difference %": difference,
        "p": lambda row: figure(row["difference"]["p_value"], 3) if row["difference"] else "-",
        "retained": lambda row: percent(row["retained"]),
        "capped": lambda row: percent(row["retained_capped"]),
    }
    title = "Accuracy, %, with its 95 % interval; difference to vanilla on the same items; % retained of vanilla's"
    made = table(title, columns, rows, words=2, widest=LABEL_WIDTH)
    unjudged = sorted({reason for row in rows for reason in row["unjudged_because"]})
    made.caption = f"Not judged: {'; '.join(unjudged)}" if unjudged else None
    return made


def _costs(rows: list[Row]) -> Table:
    """Experts by kind of forward, and what an answer takes."""
    columns: dict[str, Callable[[Row], str]] = {
        "policy": lambda row: row["policy"],
        "task": lambda row: row["task"],
        "denoise": lambda row: figure(row["unique_experts"]["denoise"]),
        "prefill": lambda row: figure(row["unique_experts"]["prefill"]),
        "commit": lambda row: figure(row["unique_experts"]["commit"]),
        "saved %": lambda row: percent(row["unique_experts_reduction"]),
        "steps": lambda row: figure(row["steps"]),
        "tokens": lambda row: figure(row["tokens"]),
    }
    title = "Unique experts per block and layer, by kind of forward; saved: of vanilla's, denoising. Means per answer"
    return table(title, columns, rows, words=2, widest=LABEL_WIDTH)


def _summary(rows: list[Row]) -> Table:
    """Each policy over all tasks."""

    def tasks(row: Row) -> str:
        without = len(row["tasks_without_ratio"])
        return f"{len(row['tasks_counted'])}{f' (+{without} without a ratio)' if without else ''}"

    columns: dict[str, Callable[[Row], str]] = {
        "policy": lambda row: row["policy"],
        "tasks": tasks,
        "retained %": lambda row: percent(row["retained"]),
        "capped %": lambda row: percent_within(row["retained_capped"], row["retained_capped_interval"]),
        "unique experts": lambda row: figure(row["unique_experts"]["denoise"]),
        "saved %": lambda row: percent(row["unique_experts_reduction"]),
    }
    title = "Over tasks: retained of vanilla's accuracy, plain mean, and with no task above 100 %"
    return table(title, columns, rows, words=2, widest=LABEL_WIDTH)
