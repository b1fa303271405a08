"""`expertshare compare`: several policies on the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expertshare import api
from expertshare.cli.bars import Bars
from expertshare.cli.console import megabytes, people, percent, percent_within, print_json
from expertshare.cli.option_groups import DecodingFlags, StoreFlags, with_option_groups
from expertshare.cli.threads import ThreadsFlag, set_threads
from expertshare.errors import InputError
from expertshare.evaluation import Comparison, parse_policies
from expertshare.evaluation.prompts import read_prompts
from expertshare.evaluation.scoring import check_scorable
from expertshare.lab.plots import check_plot_path, plot_comparison
from expertshare.measure.memory import MemoryWatch
from expertshare.measure.report import check_writable
from expertshare.tuning import PolicyFile, read_policy_file
from expertshare.types import RoutingPolicy

EXAMPLE = (
    "Example: expertshare compare path/to/model --prompts prompts.jsonl "
    "--policies 'vanilla,des-vote:budget=16,des-vote:budget=0.4,block-top-p:top_p_experts=0.6' --plot quality.png"
)

MAX_LABEL_WIDTH = 40


@with_option_groups
def compare(
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='JSONL file of objects with "prompt" and, for accuracy, "reference", "task", "tests". Code that the '
            "model writes for code tasks is run, in a sandbox with limits that is no security boundary.",
        ),
    ],
    policies: Annotated[
        str | None, typer.Option(help="Policies, parted by commas, each with knobs if wanted. Default: all of them.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="One more policy; may be repeated.")] = None,
    policy_file: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also the policy of this file of `expertshare tune`; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many prompts only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's.")] = None,
    backend: Annotated[str, typer.Option(help="Expert computation: auto, cpu, grouped or reference.")] = "auto",
    threads: ThreadsFlag = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not. Default: if there is one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON line on stdout; everything else goes to stderr.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality against experts to this .png, .svg or .pdf file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report with every answer.")] = None,
    *,
    decoding: DecodingFlags,
    storage: StoreFlags,
) -> None:
    """Answer the same prompts under several policies: experts, bytes, speed, agreement with vanilla, accuracy.

    Vanilla is always run, as what the others are compared with. Intervals are at the 95 % level.
    """
    _check_outputs(plot, report)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    set_threads(threads)
    texts = [*([policies] if policies is not None else []), *(policy or [])]
    files = [read_policy_file(file) for file in policy_file or []]
    chosen: list[str | RoutingPolicy | PolicyFile] = [*parse_policies(texts), *files]
    records = read_prompts(prompts)[:limit]
    check_scorable(records)
    store = storage.options()
    with MemoryWatch() as memory, Bars() as bars:
        loaded = api.load(model, dtype=dtype, store=store)
        comparison = api.compare(
            loaded,
            records,
            chosen if texts or files else None,
            batch_size=batch_size,
            backend=backend,
            chat=chat,
            store=store,
            on_progress=bars.hear,
            memory=memory,
            **decoding.options(),
        )
    _print_tables(comparison, people(as_json=as_json))
    record = api.comparison_report(comparison, loaded.model.device)
    if plot is not None:
        plot_comparison(comparison.to_json(), plot)
    if report is not None:
        record.write(report)
    if as_json:
        print_json(
            {
                **comparison.to_json(),
                "environment": record.environment.to_json(),
                "config": record.config,
                "seeds": record.seeds,
            }
        )


def _check_outputs(plot: Path | None, report: Path | None) -> None:
    if plot is not None:
        check_plot_path(plot)
    for path in (plot, report):
        if path is not None:
            check_writable(path)


def _print_tables(comparison: Comparison, console: Console) -> None:
    runs = comparison.to_json()["runs"]
    console.print(_overview(runs))
    if any(run["tasks"] for run in runs):
        console.print(_accuracy_by_task(runs))


def _overview(runs: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "unique experts": lambda run: f"{run['unique_experts']['denoise']:.1f}",
        "saved %": lambda run: percent(run["unique_experts_reduction"]),
        "expert MB": lambda run: megabytes(sum(run["expert_bytes"].values())),
        "forwards": lambda run: str(run["forwards"]),
        "tokens/s": lambda run: f"{run['tokens_per_s']:.1f}",
        "agreement %": lambda run: percent(run["agreement"]),
        "accuracy %": lambda run: percent_within(run["accuracy"], run["accuracy_interval"]),
    }
    title = "Unique experts: per block and layer, in denoising forwards; saved: of vanilla's"
    table = _policy_table(title, runs, list(columns))
    for run in runs:
        table.add_row(run["label"], *(cell(run) for cell in columns.values()))
    return table


def _accuracy_by_task(runs: list[dict[str, Any]]) -> Table:
    tasks = sorted({task for run in runs for task in run["tasks"]})
    counts = {task: runs[0]["tasks"][task]["count"] for task in tasks}
    title = "Accuracy by task, %, and what is retained of vanilla's (mean over tasks; capped: none above 100)"
    table = _policy_table(title, runs, [*(f"{task} ({counts[task]})" for task in tasks), "retained", "capped"])
    for run in runs:
        shares = [percent_within(run["tasks"][t]["accuracy"], run["tasks"][t]["interval"]) for t in tasks]
        table.add_row(run["label"], *shares, percent(run["retained"]), percent(run["retained_capped"]))
    return table


def _policy_table(title: str, runs: list[dict[str, Any]], columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    widest = max(len(run["label"]) for run in runs)
    table.add_column("policy", overflow="fold", min_width=min(widest, MAX_LABEL_WIDTH))
    for column in columns:
        table.add_column(column, justify="right")
    return table
