"""`expertshare tune`: the cheapest policy that keeps a promised share of vanilla's quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli.bars import Bars
from expertshare.cli.console import megabytes, people, percent, print_json
from expertshare.cli.option_groups import DecodingFlags, StoreFlags, with_option_groups
from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord, read_prompts
from expertshare.lab.plots import check_plot_path, plot_tuning
from expertshare.measure.report import check_writable
from expertshare.tuning import Tuned, TuningOptions
from expertshare.tuning.search import check_optuna

EXAMPLE = (
    "Example: expertshare tune path/to/model --prompts prompts.jsonl --retain 0.99 --out policy.json, "
    "then: expertshare generate path/to/model --prompt 'What is 7 plus 8?' --policy-file policy.json"
)
_DEFAULTS = TuningOptions()
NOT_CERTIFIED = 1


@with_option_groups
def tune(
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='JSONL file of objects with "prompt" and, for accuracy, "reference", "task", "tests". Code that the '
            "model writes for code tasks is run, in a sandbox with limits that is no security boundary.",
        ),
    ],
    retain: Annotated[float, typer.Option(help="Share of vanilla's quality to keep.")] = _DEFAULTS.retain,
    confidence: Annotated[float, typer.Option(help="Confidence of that promise.")] = _DEFAULTS.confidence,
    task: Annotated[list[str] | None, typer.Option(help="Only prompts of this task; may be repeated.")] = None,
    cost: Annotated[
        str, typer.Option(help="What to make small: experts, bytes or latency (close everything else first).")
    ] = _DEFAULTS.cost,
    quality: Annotated[
        str, typer.Option(help="Keep accuracy, agreement with vanilla, or (auto) accuracy where it can be judged.")
    ] = _DEFAULTS.quality,
    policies: Annotated[str | None, typer.Option(help="Policies to choose from (commas). Default: all.")] = None,
    trials: Annotated[int, typer.Option(help="Proposals of the search.")] = _DEFAULTS.trials,
    recorded_prompts: Annotated[
        int, typer.Option(help="Prompts whose denoising steps the search replays.")
    ] = _DEFAULTS.recorded_prompts,
    search_share: Annotated[
        float, typer.Option(help="Share of the prompts that the search sees; the others certify.")
    ] = _DEFAULTS.search_share,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's.")] = None,
    backend: Annotated[str, typer.Option(help="Expert computation: auto, cpu, grouped or reference.")] = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not. Default: if there is one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the policy file here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against cost to this .png, .svg or .pdf.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON line on stdout; everything else goes to stderr.")
    ] = False,
    require_certified: Annotated[
        bool, typer.Option(help="Exit with status 1 where no policy could be certified.")
    ] = False,
    *,
    decoding: DecodingFlags,
    storage: StoreFlags,
) -> None:
    """Find the cheapest policy that keeps a share of vanilla's quality on your prompts, and certify it on others.

    Needs the extra expertshare[tune]. It never claims more than the prompts support: where they are too few it says how
    many would do. --seed also decides which prompts the search sees, and the search itself.
    """
    check_optuna()
    _check_outputs(out, plot)
    options = TuningOptions(
        retain=retain,
        confidence=confidence,
        cost=cost,  # type: ignore[arg-type]  # checked there
        quality=quality,  # type: ignore[arg-type]
        policies=tuple(name.strip() for name in policies.split(",")) if policies is not None else None,
        trials=trials,
        recorded_prompts=recorded_prompts,
        search_share=search_share,
        seed=decoding.seed,
    )
    records = _of_tasks(read_prompts(prompts), task)
    store = storage.options()
    loaded = api.load(model, dtype=dtype, store=store)
    with Bars() as bars:
        tuned = api.tune(
            loaded,
            records,
            tuning=options,
            batch_size=batch_size,
            backend=backend,
            chat=chat,
            store=store,
            on_progress=bars.hear,
            **decoding.options(),
        )
    results = tuned.to_json()
    console = people(as_json=as_json)
    console.print(_table(results))
    console.print(tuned.sentence(), soft_wrap=True)
    _write(tuned, out, plot)
    if as_json:
        print_json({**results, "policy_file": tuned.policy_file().to_json()})
    if require_certified and not tuned.certified:
        raise typer.Exit(NOT_CERTIFIED)


def _check_outputs(out: Path | None, plot: Path | None) -> None:
    if plot is not None:
        check_plot_path(plot)
    for path in (out, plot):
        if path is not None:
            check_writable(path)


def _write(tuned: Tuned, out: Path | None, plot: Path | None) -> None:
    if out is not None:
        tuned.policy_file().write(out)
    if plot is not None:
        plot_tuning(tuned.to_json(), plot)


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
    what = "accuracy" if results["quality"] == "accuracy" else "agreement"
    bound = f"{100 * results['options']['confidence']:g} % bound"
    table = Table(title=f"Tested on {results['num_prompts']['certify']} prompts that the search did not see")
    table.add_column("policy", overflow="fold", min_width=30)
    cost = {"experts": "unique experts", "bytes": "expert MB / prompt", "latency": "ms / block"}
    shown = ["experts", *([kind] if (kind := results["cost_kind"]) != "experts" else [])]
    for column in (*(cost[kind] for kind in shown), f"{what} kept, %", bound, "lost", "gained", "certified"):
        table.add_column(column, justify="right")
    for run in (results["vanilla"], *results["tested"]):
        verdict = run.get("passed")
        figures = {
            "experts": f"{run['unique_experts']:.1f}",
            "bytes": megabytes(run["expert_bytes"]),
            "latency": f"{1e3 * (run['seconds_per_block'] or 0.0):.2f}",
        }
        table.add_row(
            run["label"],
            *(figures[kind] for kind in shown),
            percent(run["retained"]),
            "-" if verdict is None else percent(run["lower_bound"]),
            str(run["counts"]["lost"]),
            str(run["counts"]["gained"]),
            {None: "-", True: "yes", False: "no"}[verdict],
        )
    return table
