"""`expertshare generate`: answer prompts, and say what the answers cost in experts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli.backend_flags import BackendFlag, DeviceFlag
from expertshare.cli.console import megabytes, people, print_json, store_summary
from expertshare.cli.option_groups import DecodingFlags, KnobFlags, StoreFlags, with_option_groups
from expertshare.cli.streaming import AnswerPrinter
from expertshare.cli.threads import ThreadsFlag, set_threads
from expertshare.errors import InputError
from expertshare.evaluation import policy_label
from expertshare.evaluation.prompts import read_prompts
from expertshare.measure.cost import FORWARD_KINDS
from expertshare.measure.memory import MemoryWatch
from expertshare.measure.report import check_writable
from expertshare.models import LoadedModel, decode_answer

EXAMPLE = (
    "Example: expertshare generate path/to/model --prompt 'What is 7 plus 8?' --policy des-vote --budget 16   "
    "(a prompt from stdin: expertshare generate path/to/model - < prompt.txt)"
)


@with_option_groups
def generate(
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    source: Annotated[str | None, typer.Argument(metavar="-", help="- reads one prompt from stdin.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help='JSONL file of objects with "prompt"; - reads it from stdin.')
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy, or policy:knob=value,... Default: what the model was trained with.")
    ] = None,
    policy_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Policy file of `expertshare tune`, for this very model.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's.")] = None,
    device: DeviceFlag = "cpu",
    backend: BackendFlag = "auto",
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="On a GPU, with --backend triton: replay captured steps.")
    ] = True,
    threads: ThreadsFlag = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not. Default: if there is one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON line on stdout; everything else goes to stderr.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report with the cost of every forward.")] = None,
    record_routing: Annotated[
        Path | None, typer.Option(help="Write the experts of every token, for --trace of `plan` and `simulate`.")
    ] = None,
    *,
    decoding: DecodingFlags,
    knobs: KnobFlags,
    storage: StoreFlags,
) -> None:
    """Answer a prompt, a file of prompts, or stdin with a diffusion model, block by block."""
    if report is not None:
        check_writable(report)
    set_threads(threads)
    if record_routing is not None:
        check_writable(record_routing)
    texts = _read_texts(source, prompt, prompts)
    chosen = knobs.policy(policy, policy_file)
    store = storage.options()
    with MemoryWatch() as memory:
        loaded = api.load(model, dtype=dtype, store=store, device=device)
        result = api.generate(
            loaded,
            texts,
            policy=chosen,
            batch_size=batch_size,
            backend=backend,
            graphs=graphs,
            chat=chat,
            store=store,
            on_block=_printer(loaded, texts, as_json=as_json).hear,
            memory=memory,
            record_routing=record_routing,
            **decoding.options(),
        )
    console = people(as_json=as_json)
    console.print(_table(result))
    console.print(_summary(result))
    if report is not None:
        result.report().write(report)
    if as_json:
        print_json(result.to_json())


def _read_texts(source: str | None, prompt: str | None, prompts: str | None) -> list[str]:
    """Exactly one way of giving prompts; a pipe into a command without any of them counts as `-`."""
    if source not in (None, "-"):
        raise InputError(f"expected - (stdin) behind the model, got {source!r}: give text with --prompt")
    given = [name for name, value in (("-", source), ("--prompt", prompt), ("--prompts", prompts)) if value is not None]
    if len(given) > 1:
        raise InputError(f"expected one source of prompts, got {' and '.join(given)}: choose one")
    if prompt is not None:
        return [prompt]
    if prompts is not None:
        return [record.prompt for record in read_prompts(sys.stdin if prompts == "-" else prompts)]
    if source is None and sys.stdin.isatty():
        raise InputError("expected a prompt, got none: use --prompt TEXT, --prompts FILE, or - to type it")
    try:
        return [sys.stdin.read().removesuffix("\n")]
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text on stdin, got {error.reason}; re-encode it") from error


def _printer(loaded: LoadedModel, texts: list[str], *, as_json: bool) -> AnswerPrinter:
    def decode(token_ids: object) -> str:
        assert loaded.tokenizer is not None
        return decode_answer(loaded.tokenizer, token_ids)  # type: ignore[arg-type]

    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return AnswerPrinter(prompts=texts, decode=decode, write=write)


def _table(result: api.Generated) -> Table:
    run, cost = result.run, result.cost
    table = Table(title=policy_label(run.policy), title_justify="left", show_header=True)
    for column in ("", *FORWARD_KINDS):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("forwards", *(str(cost.forwards[kind]) for kind in FORWARD_KINDS))
    table.add_row("unique experts per block and layer", *(f"{cost.unique_experts[kind]:.1f}" for kind in FORWARD_KINDS))
    table.add_row("expert weights read, MB", *(megabytes(cost.expert_bytes[kind]) for kind in FORWARD_KINDS))
    return table


def _summary(result: api.Generated) -> str:
    run = result.run
    total = max(sum(run.seconds_by_part.values()), 1e-9)
    shares = ", ".join(f"{part} {100 * s / total:.0f} %" for part, s in run.seconds_by_part.items())
    tokens = sum(len(answer.token_ids) for answer in run.answers)
    speed = f"{tokens} tokens in {run.elapsed_s:.2f} s: {run.tokens_per_s:.1f} per second"
    memory = f"peak memory {megabytes(result.peak_memory_bytes)} MB"
    if result.peak_anonymous_bytes is not None:
        memory += f" ({megabytes(result.peak_anonymous_bytes)} without file pages)"
    lines = [f"{speed}; {run.steps} steps, {run.forwards} forwards; {memory}", f"time: {shares}"]
    if result.device.type != "cpu":
        why = run.uncaptured_because
        lines.append("steps: " + ("replayed from a graph" if why is None else f"launched one by one: {why}"))
    if run.expert_store is not None:
        lines.append(store_summary(run.expert_store))
    return "\n".join(lines)
