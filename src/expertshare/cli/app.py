"""The `expertshare` command: its verbs, and what happens to errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import expertshare
from expertshare.cli import (
    bench,
    compare,
    convert,
    distill,
    evaluate,
    generate,
    info,
    make_checkpoint,
    plan,
    report,
    serve,
    simulate,
    tasks,
    train,
    tune,
)
from expertshare.errors import ExpertShareError

app = typer.Typer(
    name="expertshare",
    help="Mixture-of-Experts diffusion language models under any expert-sharing policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.command("eval", epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("info", epilog=info.EXAMPLE)(info.info)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("make-checkpoint", epilog=make_checkpoint.EXAMPLE)(make_checkpoint.make_checkpoint)
app.command("serve", epilog=serve.EXAMPLE)(serve.serve)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("simulate", epilog=simulate.EXAMPLE)(simulate.simulate)
app.command("tasks", epilog=tasks.EXAMPLE)(tasks.tasks)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("distill", epilog=distill.EXAMPLE)(distill.distill)
app.command("tune", epilog=tune.EXAMPLE)(tune.tune)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.add_typer(bench.app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertshare {expertshare.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: expertshare generate path/to/model --prompt 'What is 7 plus 8?' --policy des-vote")
def _shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del version  # its callback has done everything


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, 2 for anything that the user can put right, 130 when interrupted."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="expertshare")
    except ExpertShareError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
