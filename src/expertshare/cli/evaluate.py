"""`expertshare eval`: accuracy of policies on tasks and benchmarks, resumable, one line per answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertshare import api
from expertshare.cli.bars import Bars
from expertshare.cli.console import people, print_json
from expertshare.cli.evaluation_tables import cost_table, summary_table, task_table
from expertshare.cli.option_groups import DecodingFlags, StoreFlags, with_option_groups
from expertshare.cli.ray_flags import RayAddressFlag, RayFlag
from expertshare.evaluation import PRESETS

EXAMPLE = (
    "Example: expertshare eval models/reference --tasks arith,code --policies vanilla,des-vote:budget=28 "
    "--limit 100 --allow-code --out runs/vote"
)


@with_option_groups
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    out: Annotated[
        Path, typer.Option(metavar="RUN_DIR", help="Directory of this evaluation; one that was interrupted goes on.")
    ],
    tasks: Annotated[
        str, typer.Option(help="Tasks, parted by commas: generated kinds (arith, ...) or benchmarks (gsm8k, ...).")
    ] = "arith,math,choice",
    policies: Annotated[str, typer.Option(help="Policies, parted by commas. Vanilla is always run.")] = "vanilla",
    policy_file: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also the policy of this file of `expertshare tune`; may be repeated."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Settings of a paper ({', '.join(PRESETS)}); given flags go before it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task. Default: all; of generated ones 100.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before a benchmark's question.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of benchmark files. Default: the hub.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that the model wrote, in a subprocess with limits.")
    ] = False,
    processes: Annotated[int, typer.Option(help="Processes that answer, each with the model loaded.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 1,
    ray: RayFlag = False,
    ray_address: RayAddressFlag = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's.")] = None,
    backend: Annotated[str, typer.Option(help="Expert computation: auto, cpu, grouped or reference.")] = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not. Default: if there is one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON line on stdout; everything else goes to stderr.")
    ] = False,
    *,
    decoding: DecodingFlags,
    storage: StoreFlags,
) -> None:
    """Ask every item of the tasks under every policy; say what is right, what that costs, and how sure it is.

    RUN_DIR gets run.json, items.jsonl (a line per answer) and report.json. --seed is of items, examples and sampling.
    """
    with Bars() as bars:
        evaluation = api.evaluate(
            model,
            [name.strip() for name in tasks.split(",") if name.strip()],
            [policies, *(api.load_policy(file) for file in policy_file or [])],
            out=out,
            preset=preset,
            limit=limit,
            shots=shots,
            data=data,
            allow_code=allow_code,
            processes=processes,
            threads=threads,
            ray=ray,
            ray_address=ray_address,
            dtype=dtype,
            backend=backend,
            chat=chat,
            store=storage.options(),
            on_progress=bars.hear,
            on_notice=lambda notice: typer.echo(notice, err=True),
            **_given(context, decoding),
        )
    results, console = evaluation.results, people(as_json=as_json)
    for table in (task_table(results), cost_table(results), summary_table(results)):
        console.print(table)
    if as_json:
        print_json({**results, "run_dir": str(out)})


def _given(context: typer.Context, decoding: DecodingFlags) -> dict[str, Any]:
    """Decoding flags that were on the command line; the others are left to the preset and the tasks."""
    flags = {"steps_per_block": "steps"}
    return {
        name: value
        for name, value in decoding.options().items()
        if _source(context, flags.get(name, name)) != "DEFAULT"
    }


def _source(context: typer.Context, parameter: str) -> str | None:
    """By name: typer may bring a click of its own, whose values are not equal to those of the installed one."""
    found = context.get_parameter_source(parameter)
    return found.name if found is not None else None
