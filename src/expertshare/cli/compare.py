"""`expertshare compare`: several policies on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import Bars, check_outputs, megabytes, people, percent, percent_within, print_json, table
from expertshare.cli.options import check_at_least_one, option
from expertshare.evaluation.prompts import read_prompts
from expertshare.evaluation.scoring import check_scorable
from expertshare.measure.memory import MemoryWatch
from expertshare.routing import RoutingPolicy, parse_policies
from expertshare.tuning.policy_file import PolicyFile, read_policy_file

Run = Mapping[str, Any]


def compare(
    model: flags.Model,
    prompts: flags.JudgedPrompts,
    policies: str | None = option("Policies, parted by commas, each with knobs if wanted. Default: all of them.", None),
    policy: list[str] | None = option("One more policy; may be repeated.", None),
    policy_file: flags.PoliciesFromFiles = None,
    limit: int | None = option("Use the first so many prompts only.", None),
    batch_size: flags.BatchSize = 1,
    *,
    compute: flags.Answering,
    threads: flags.Threads = None,
    as_json: flags.Json = False,
    plot: Path | None = option("Draw quality against experts to this .png, .svg or .pdf file.", None),
    report: Path | None = option("Write a JSON report with every answer.", None),
    decoding: flags.Decoding,
    storage: flags.Storage,
) -> None:
    """Answer the same prompts under several policies: experts, bytes, speed, agreement with vanilla, accuracy.

    Vanilla is always run, as what the others are compared with. Intervals are at the 95 % level.

    Example: expertshare compare path/to/model --prompts prompts.jsonl --policies
    'vanilla,des-vote:budget=16,des-vote:budget=0.4,block-top-p:top_p_experts=0.6' --plot quality.png
    """
    check_outputs(report, plot=plot)
    check_at_least_one("limit", limit)
    flags.set_threads(threads)
    texts = [*([policies] if policies is not None else []), *(policy or [])]
    files = [read_policy_file(file) for file in policy_file or []]
    chosen: list[str | RoutingPolicy | PolicyFile] = [*parse_policies(texts), *files]
    records = read_prompts(prompts)[:limit]
    check_scorable(records)
    store = storage.store()
    with MemoryWatch() as memory, Bars() as bars:
        loaded = api.load(model, dtype=compute.dtype, store=store)
        comparison = api.compare(
            loaded,
            records,
            chosen if texts or files else None,
            batch_size=batch_size,
            store=store,
            on_progress=bars.hear,
            memory=memory,
            **compute.arguments(),
            **decoding.arguments(),
        )
    results = comparison.to_json()
    console = people(as_json=as_json)
    console.print(_overview(results["runs"]))
    if any(run["tasks"] for run in results["runs"]):
        console.print(_accuracy_by_task(results["runs"]))
    record = api.comparison_report(comparison, loaded.model.device)
    if plot is not None:
        from expertshare.lab.plots.quality import plot_comparison  # only here: a picture needs matplotlib

        plot_comparison(results, plot)
    if report is not None:
        record.write(report)
    if as_json:
        facts = {"environment": record.environment.to_json(), "config": record.config, "seeds": record.seeds}
        print_json({**results, **facts})


def _overview(runs: list[Run]) -> Table:
    columns: dict[str, Callable[[Run], str]] = {
        "policy": lambda run: run["label"],
        "unique experts": lambda run: f"{run['unique_experts']['denoise']:.1f}",
        "saved %": lambda run: percent(run["unique_experts_reduction"]),
        "expert MB": lambda run: megabytes(sum(run["expert_bytes"].values())),
        "forwards": lambda run: str(run["forwards"]),
        "tokens/s": lambda run: f"{run['tokens_per_s']:.1f}",
        "agreement %": lambda run: percent(run["agreement"]),
        "accuracy %": lambda run: percent_within(run["accuracy"], run["accuracy_interval"]),
    }
    return table("Unique experts: per block and layer, in denoising forwards; saved: of vanilla's", columns, runs)


def _accuracy_by_task(runs: list[Run]) -> Table:
    def accuracy(task: str, run: Run) -> str:
        return percent_within(run["tasks"][task]["accuracy"], run["tasks"][task]["interval"])

    tasks = sorted({task for run in runs for task in run["tasks"]})
    columns: dict[str, Callable[[Run], str]] = {
        "policy": lambda run: run["label"],
        **{f"{task} ({runs[0]['tasks'][task]['count']})": partial(accuracy, task) for task in tasks},
        "retained": lambda run: percent(run["retained"]),
        "capped": lambda run: percent(run["retained_capped"]),
    }
    title = "Accuracy by task, %, and what is retained of vanilla's (mean over tasks; capped: none above 100)"
    return table(title, columns, runs)
