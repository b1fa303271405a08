"""`expertshare generate`: answer prompts, and say what the answers cost in experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import check_outputs, megabytes, people, percent, print_json, table
from expertshare.cli.options import option
from expertshare.decoding import BlockResult, TextStream
from expertshare.errors import InputError
from expertshare.evaluation.prompts import read_prompts
from expertshare.experts import StoreStatistics
from expertshare.measure.cost import FORWARD_KINDS, ForwardKind
from expertshare.measure.memory import MemoryWatch
from expertshare.models import LoadedModel, decode_answer
from expertshare.models.tokenizer import byte_ids
from expertshare.routing import policy_label


class GenerationOptions(flags.Answering, flags.Device):
    """Options of `generate`: what is decoded, and how it is computed."""

    graphs: bool = option("On a GPU, with --backend triton: replay captured steps.", True, "--graphs/--no-graphs")


def generate(
    model: flags.Model,
    source: Annotated[str | None, typer.Argument(metavar="-", help="- reads one prompt from stdin.")] = None,
    prompt: str | None = option("The prompt.", None),
    prompts: str | None = option('JSONL file of objects with "prompt"; - reads it from stdin.', None, metavar="FILE"),
    policy: flags.Policy = None,
    policy_file: flags.PolicyFromFile = None,
    batch_size: flags.BatchSize = 1,
    *,
    compute: GenerationOptions,
    threads: flags.Threads = None,
    as_json: flags.Json = False,
    report: Path | None = option("Write a JSON report with the cost of every forward.", None),
    record_routing: Path | None = option(
        "Write the experts of every token, for --trace of `plan` and `simulate`.", None
    ),
    decoding: flags.Decoding,
    knobs: flags.Knobs,
    storage: flags.Storage,
) -> None:
    """Answer a prompt, a file of prompts, or stdin with a diffusion model, block by block.

    Example: expertshare generate path/to/model --prompt 'What is 7 plus 8?' --policy des-vote --budget 16   (a prompt
    from stdin: expertshare generate path/to/model - < prompt.txt)
    """
    check_outputs(report, record_routing)
    flags.set_threads(threads)
    texts = _read_texts(source, prompt, prompts)
    chosen, store = knobs.policy(policy, policy_file), storage.store()
    with MemoryWatch() as memory:
        loaded = api.load(model, dtype=compute.dtype, store=store, device=compute.device)
        result = api.generate(
            loaded,
            texts,
            policy=chosen,
            batch_size=batch_size,
            store=store,
            on_block=_printer(loaded, texts, as_json=as_json).hear,
            memory=memory,
            record_routing=record_routing,
            **compute.arguments(),
            **decoding.arguments(),
        )
    console = people(as_json=as_json)
    console.print(_table(result))
    console.print(_summary(result))
    if report is not None:
        result.report().write(report)
    if as_json:
        print_json(result.to_json())


@dataclass(slots=True)
class AnswerPrinter:
    """Writes answers in the order of their prompts, each under a heading if there are several.

    The first unfinished answer is written as it comes. Those behind it, decoded in the same batch, wait.
    """

    prompts: Sequence[str]
    decode: Callable[[Sequence[int]], str]
    write: Callable[[str], None]
    byte_ids: frozenset[int] = frozenset()
    _streams: dict[int, TextStream] = field(default_factory=dict)
    _waiting: dict[int, list[str]] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)
    _row: int = -1

    def hear(self, block: BlockResult) -> None:
        """Take the next block of any answer."""
        last = block.finish_reason is not None
        stream = self._streams.setdefault(block.row, TextStream(self.decode, self.byte_ids))
        text = stream.feed(block.token_ids, last=last)
        self._waiting.setdefault(block.row, []).append(text)
        if last:
            self._finished.add(block.row)
        if self._row < 0:
            self._open(0)
        self._write_ready()

    def _write_ready(self) -> None:
        while self._row < len(self.prompts):
            self.write("".join(self._waiting.pop(self._row, [])))
            if self._row not in self._finished:
                return
            self.write("\n")
            self._open(self._row + 1)

    def _open(self, row: int) -> None:
        self._row = row
        if len(self.prompts) > 1 and row < len(self.prompts):
            first_line = self.prompts[row].strip().splitlines()[0]
            shown = first_line if len(first_line) <= 70 else first_line[:69] + "…"
            self.write(f"{'' if row == 0 else chr(10)}[{row + 1}/{len(self.prompts)}] {shown}\n")


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
    tokenizer = loaded.tokenizer  # a model without one is refused before the first block

    def decode(token_ids: Sequence[int]) -> str:
        assert tokenizer is not None
        return decode_answer(tokenizer, token_ids)

    def write(text: str) -> None:
        print(text, end="", file=sys.stderr if as_json else sys.stdout, flush=True)

    return AnswerPrinter(texts, decode, write, byte_ids(tokenizer) if tokenizer else frozenset())


def _table(result: api.Generated) -> Table:
    cost = result.run.cost
    rows: dict[str, Callable[[ForwardKind], str]] = {
        "forwards": lambda kind: str(cost.forwards[kind]),
        "unique experts per block and layer": lambda kind: f"{cost.unique_experts[kind]:.1f}",
        "expert weights read, MB": lambda kind: megabytes(cost.expert_bytes[kind]),
    }
    lines = [{"": name, **{kind: cell(kind) for kind in FORWARD_KINDS}} for name, cell in rows.items()]
    return table(policy_label(result.run.policy), {heading: itemgetter(heading) for heading in lines[0]}, lines)


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
        lines.append(_store_summary(run.expert_store))
    return "\n".join(lines)


def _store_summary(statistics: StoreStatistics) -> str:
    """What was asked of an expert store, in a line."""
    total = statistics.total
    if statistics.kind == "mmap":
        return f"experts: mapped, {total.requests:,} borrowed"
    slots = f"{statistics.slots:,} slots of {megabytes(statistics.slot_bytes)} MB"
    copied = f", {megabytes(total.copies * statistics.slot_bytes)} MB copied to the GPU" if total.copies else ""
    read = f"{megabytes(total.reads * statistics.slot_bytes)} MB read{copied}, {total.stall_s:.2f} s waited"
    return f"experts: {slots}; {percent(total.hit_rate)} % of {total.requests:,} there; {read}"
