"""The `expertshare` command: the table of its verbs, each imported when it is called, and what happens to errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

import expertshare
from expertshare.cli.options import expanded
from expertshare.errors import ExpertShareError

VERBS = {
    "generate": "Answer a prompt, a file of prompts, or stdin with a diffusion model, block by block.",
    "compare": (
        "Answer the same prompts under several policies: experts, bytes, speed, agreement with vanilla, accuracy."
    ),
    "eval": "Ask every item of the tasks under every policy; say what is right, what that costs, and how sure it is.",
    "info": "Show architecture, router rule, bytes per expert and the smallest coreset of a model.",
    "convert": (
        "Rewrite a checkpoint expert by expert, for --expert-memory. Run again, an interrupted conversion goes on."
    ),
    "make-checkpoint": (
        "Write a random checkpoint for benchmarks: real shapes, routers that agree as trained ones do, no knowledge."
    ),
    "serve": "Serve a model over HTTP, as OpenAI's API does, batching requests continuously.",
    "plan": "Say what fits: dense bytes, bytes per expert, smallest budget, recommended store, expected speed.",
    "simulate": (
        "Say what a cluster can serve with and without sharing: traffic, balance, memory, tokens/s, GPUs for a rate."
    ),
    "tasks": "Write prompts of the generated tasks as JSONL, for `expertshare compare` and `generate`.",
    "train": "Train a small model (8 experts per token) on the generated tasks, from recorded seeds.",
    "distill": "Train a model on its own answers with an expert-sharing policy in the forward pass.",
    "tune": (
        "Find the cheapest policy that keeps a share of vanilla's quality on your prompts, and certify it on others."
    ),
    "report": "Draw stored results as one HTML page that loads nothing, and as PNG files. Nothing is measured.",
    "bench": "Speed: a layer's experts, a forward, whole answers, each beside what people would use instead.",
}
"""Verb: its line in the program's help. Its module is expertshare.cli.<verb>, but for `eval` and those of _BESIDE."""
_BESIDE = {"info": "plan", "make-checkpoint": "convert"}


def load_verb(name: str) -> Any:
    """The command of a verb, with its options; imports its module and what that needs.

    A module holds a function called as the verb is, whose docstring is its help and ends with an example, or `app`
    where the verb has verbs of its own.
    """
    function_name = "evaluate" if name == "eval" else name.replace("-", "_")
    module = import_module(f"expertshare.cli.{_BESIDE.get(name, function_name)}")
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    function = getattr(module, function_name)
    told, _, example = inspect.cleandoc(function.__doc__ or "").partition("\n\nExample: ")
    program = typer.Typer(add_completion=False)
    epilog = f"Example: {example}".replace("\n", " ") if example else None
    program.command(name, help=told, epilog=epilog)(expanded(function))
    return typer.main.get_command(program)


class _Program(typer.core.TyperGroup):
    """Knows names and lines of its verbs; imports the one that is called."""

    def resolve_command(self, context: Any, words: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(context, words)
        return name, None if name is None else load_verb(name), rest


app = typer.Typer(
    name="expertshare",
    cls=_Program,
    help="Mixture-of-Experts diffusion language models under any expert-sharing policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _line in VERBS.items():
    app.command(_name, help=_line)(lambda: None)


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
