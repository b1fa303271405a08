"""`expertshare tune`: the cheapest policy that keeps a promised share of vanilla's quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import VERDICTS, Bars, check_outputs, figure, megabytes, people, percent, print_json, table
from expertshare.cli.options import OptionGroup, option
from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord, read_prompts
from expertshare.tuning.options import TuningOptions
from expertshare.tuning.search import check_optuna

NOT_CERTIFIED = 1


class TuningFlags(OptionGroup):
    """The promise and the work to spend on it; `arguments` are fields of TuningOptions."""

    defaults = TuningOptions()
    retain: float = option("Share of vanilla's quality to keep.")
    confidence: float = option("Confidence of that promise.")
    cost: str = option("What to make small: experts, bytes or latency (close everything else first).")
    quality: str = option("Keep accuracy, agreement with vanilla, or (auto) accuracy where it can be judged.")
    policies: str | None = option(
        "Policies to choose from (commas). Default: all.",
        read=lambda listed: tuple(name.strip() for name in listed.split(",")),
    )
    trials: int = option("Proposals of the search.")
    recorded_prompts: int = option("Prompts whose denoising steps the search replays.")
    search_share: float = option("Share of the prompts that the search sees; the others certify.")


def tune(
    model: flags.Model,
    prompts: flags.JudgedPrompts,
    tuning: TuningFlags,
    task: list[str] | None = option("Only prompts of this task; may be repeated.", None),
    batch_size: flags.BatchSize = 16,
    *,
    compute: flags.Answering,
    out: Path | None = option("Write the policy file here.", None, metavar="FILE"),
    plot: Path | None = option("Draw quality against cost to this .png, .svg or .pdf.", None),
    as_json: flags.Json = False,
    require_certified: bool = option("Exit with status 1 where no policy could be certified.", False),
    decoding: flags.Decoding,
    storage: flags.Storage,
) -> None:
    """Find the cheapest policy that keeps a share of vanilla's quality on your prompts, and certify it on others.

    Needs the extra expertshare[tune]. It never claims more than the prompts support: where they are too few it says how
    many would do. --seed also decides which prompts the search sees, and the search itself.

    Example: expertshare tune path/to/model --prompts prompts.jsonl --retain 0.99 --out policy.json, then: expertshare
    generate path/to/model --prompt 'What is 7 plus 8?' --policy-file policy.json
    """
    check_optuna()
    check_outputs(out, plot=plot)
    options = TuningOptions(**tuning.arguments(), seed=decoding.seed)
    records = _of_tasks(read_prompts(prompts), task)
    with Bars() as bars:
        tuned = api.tune(
            model,
            records,
            tuning=options,
            batch_size=batch_size,
            store=storage.store(),
            on_progress=bars.hear,
            **compute.arguments(),
            **decoding.arguments(),
        )
    results, policy_file = tuned.to_json(), tuned.policy_file()
    console = people(as_json=as_json)
    console.print(_table(results))
    console.print(tuned.sentence(), soft_wrap=True)
    if out is not None:
        policy_file.write(out)
    if plot is not None:
        from expertshare.lab.plots.quality import plot_tuning  # only here: a picture needs matplotlib

        plot_tuning(results, plot)
    if as_json:
        print_json({**results, "policy_file": policy_file.to_json()})
    if require_certified and not tuned.certified:
        raise typer.Exit(NOT_CERTIFIED)


def _of_tasks(records: list[PromptRecord], tasks: list[str] | None) -> list[PromptRecord]:
    if not tasks:
        return records
    there = sorted({record.task for record in records if record.task is not None})
    for name in tasks:
        if name not in there:
            known = ", ".join(there) or "none"
            raise InputError(f"expected prompts of the task {name!r}, got none; tasks in the file: {known}")
    return [record for record in records if record.task in tasks]


def _table(results: dict[str, Any]) -> Table:
    """Vanilla and every policy that was tested, in the order of testing."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "policy": lambda run: run["label"],
        "unique experts": lambda run: figure(run["unique_experts"]),
    }
    if results["cost_kind"] == "bytes":
        columns["expert MB / prompt"] = lambda run: megabytes(run["expert_bytes"])
    elif results["cost_kind"] == "latency":
        columns["ms / block"] = lambda run: figure(1e3 * (run["seconds_per_block"] or 0.0), 2)
    what = "accuracy" if results["quality"] == "accuracy" else "agreement"
    columns |= {
        f"{what} kept, %": lambda run: percent(run["retained"]),
        f"{100 * results['options']['confidence']:g} % bound": lambda run: (
            "-" if run.get("passed") is None else percent(run["lower_bound"])
        ),
        "lost": lambda run: str(run["counts"]["lost"]),
        "gained": lambda run: str(run["counts"]["gained"]),
        "certified": lambda run: VERDICTS[run.get("passed")],
    }
    title = f"Tested on {results['num_prompts']['certify']} prompts that the search did not see"
    return table(title, columns, [results["vanilla"], *results["tested"]], widest=30)
