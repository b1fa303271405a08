"""`expertshare bench experts|forward|generate`: how fast, how near to what the machine can do, and against whom."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.bench_tables import case_table, experts_tables, forward_tables, generate_tables, machine_line
from expertshare.cli.console import check_outputs, people, print_json
from expertshare.cli.options import OptionGroup, check_at_least_one, expanded, option, split_names
from expertshare.decoding import DecodingOptions
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.evaluation.prompts import read_prompts
from expertshare.evaluation.runner import encode_prompts
from expertshare.lab.bench.cases import CASES, find_case
from expertshare.lab.bench.contenders import contenders
from expertshare.lab.bench.experts import bench_experts
from expertshare.lab.bench.forward import ForwardSettings, bench_forward
from expertshare.lab.bench.generate import Subject, bench_generate, random_subject
from expertshare.lab.bench.machine import (
    Machine,
    dtype_name,
    gpu_device,
    measure_gpu,
    measure_machine,
    memory_limit_bytes,
    yardstick_for,
)
from expertshare.lab.bench.stage import ExpertsSettings
from expertshare.lab.plots.bench import plot_bench
from expertshare.measure.report import Report, capture_environment
from expertshare.routing import RoutingPolicy, parse_policies, policy_label

DEFAULT_MODEL, DEFAULT_PROMPTS = "models/reference", Path("examples/prompts.jsonl")
POLICIES = "vanilla,des-vote"
VANILLA_UNIQUE = 70  # published for LLaDA2.0-mini
_REPEATS = "Timed calls of each contender, in turn with all others."
PoliciesFlag = Annotated[str, typer.Option(help="Policies, parted by commas, each with knobs if wanted.")]
DtypeFlag = Annotated[str, typer.Option(help="Of weights and activations: bfloat16 or float32.")]


def _list_cases(wanted: bool) -> None:
    if wanted:
        people(as_json=False).print(case_table(CASES))
        raise typer.Exit


class ListOption(OptionGroup):
    """What prints the registry and leaves; its callback does everything."""

    list_cases: bool = option("Print the cases and leave.", False, "--list", callback=_list_cases, is_eager=True)


class BenchOptions(ListOption):
    """How to measure, and where the outcome goes."""

    device: str = option("cpu, or cuda: the GPU, timed by its own events.", "cpu")
    backends: str | None = option("Contenders, parted by commas. Default: all that are there.", None)
    repeats: int = option(_REPEATS, 15)
    threads: int | None = option(
        "Threads of one operation. Default: OMP_NUM_THREADS if set, else one for each physical core.", None
    )
    memory: float | None = option("Gigabytes for weights. Default: 3/4 of what is free.", None)
    seed: int = option("Of weights, tokens and routing.", 0)
    as_json: bool = option("End with one JSON line on stdout; everything else goes to stderr.", False, "--json")
    report: Path | None = option("Write a JSON report with machine and commit.", None)
    plot: Path | None = option("Draw the results to this .png, .svg or .pdf file.", None)

    def prepare(self) -> torch.device:
        """Refuse what would fail only after minutes; set the threads once. The device to measure."""
        check_outputs(self.report, plot=self.plot)
        check_at_least_one("repeats", self.repeats)
        flags.set_threads(self.threads)
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"unknown device {self.device!r}. {nearest(self.device, ('cpu', 'cuda'))}")
        return gpu_device() if self.device == "cuda" else torch.device("cpu")

    def names(self) -> list[str] | None:
        """Contenders by name; None: all."""
        return _names(self.backends)

    def settings(self, dtype: str, device: torch.device) -> dict[str, Any]:
        """What the settings of every benchmark with random weights have. Raises ConfigError for an unknown dtype."""
        if dtype not in api.DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}. {nearest(dtype, api.DTYPES)}")
        memory_bytes = memory_limit_bytes(self.memory, device)
        return {"dtype": api.DTYPES[dtype], "seed": self.seed, "memory_bytes": memory_bytes, "device": device}

    def machine(self) -> Machine:
        """The machine, measured and told of."""
        _progress()("measuring bandwidth and peak")
        machine = measure_gpu(torch.device("cuda")) if self.device == "cuda" else measure_machine()
        people(as_json=self.as_json).print(machine_line(machine))
        return machine

    def finish(
        self,
        command: str,
        machine: Machine,
        found: Mapping[str, Any],
        tables: Sequence[Table],
        config: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Tell people, and write what was asked for."""
        console, numbers = people(as_json=self.as_json), dtype_name(dtype)
        for table in tables:
            console.print(table)
        for entry in found["left_out"]:
            where = f" at {entry['unique']} unique experts of {entry['case']}" if entry.get("unique") else ""
            console.print(f"not timed: {entry['backend']}{where}: {entry['reason']}", soft_wrap=True)
        results = {"machine": machine.to_json(), **machine.peaks(dtype).to_json(), **found}
        if self.report is not None:
            Report(
                command=command,
                environment=capture_environment(torch.device("cuda") if "gpu" in machine.facts else None),
                seeds={"bench": self.seed},
                config={**config, "dtype": numbers},
                results=results,
            ).write(self.report)
        if self.plot is not None:
            plot_bench(results, self.plot)
        if self.as_json:
            print_json(results)


class ForwardBenchOptions(BenchOptions):
    """As for the others, with fewer repeats by default."""

    repeats: int = option(_REPEATS, 10)


class AnswerBenchOptions(BenchOptions):
    """As for the others, with the fewest repeats by default."""

    repeats: int = option(_REPEATS, 3)


app = typer.Typer(
    help="Speed: a layer's experts, a forward, whole answers, each beside what people would use instead.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
)


@app.callback()
@expanded
def _shared(listing: ListOption) -> None:
    del listing  # its callback has done everything


@app.command(
    "experts", epilog="Example: expertshare bench experts --case llada2.0-mini --unique 16,70 --plot experts.png"
)
@expanded
def experts(
    case: str = option("Cases, parted by commas; --list shows them.", "llada2.0-mini", "--case"),
    unique: str | None = option("Unique experts per block, e.g. 16,70.", None),
    tokens: str | None = option("Tokens per block, e.g. 32 or 16,32,64.", None),
    num_experts: str | None = option(
        "Experts in the layer instead of the model's number, e.g. 64,512.", None, "--experts"
    ),
    dtype: DtypeFlag = "bfloat16",
    *,
    bench: BenchOptions,
) -> None:
    """Time one layer's experts by number of unique experts. Wrong results are reported, not timed."""
    device = bench.prepare()
    entrants = contenders(bench.names(), device)
    cases = {
        name if size is None else f"{name}/{size}-experts": find_case(name).with_experts(size)
        for name in _names(case) or ()
        for size in (_counts("--experts", num_experts) or (None,))
    }
    settings = ExpertsSettings(
        tokens=_counts("--tokens", tokens),
        unique=_counts("--unique", unique),
        repeats=bench.repeats,
        **bench.settings(dtype, device),
    )
    machine = bench.machine()
    found = bench_experts(cases, entrants, machine, settings, _progress())
    people(as_json=bench.as_json).print(_limits(found))
    config = {"cases": list(cases), "repeats": bench.repeats, "warmup": settings.warmup, "skew": settings.skew}
    bench.finish("bench experts", machine, found, experts_tables(found), config, settings.dtype)


@app.command(
    "forward",
    epilog="Example: expertshare bench forward --case llada2.0-mini --policies vanilla,des-vote:budget=16",
)
@expanded
def forward(
    case: str = option("One case; --list shows them.", "llada2.0-mini", "--case"),
    layers: int = option("Layers, leading dense ones included.", 4),
    policies: PoliciesFlag = POLICIES,
    unique: int | None = option(
        "Unique experts that vanilla routing should use; 0 leaves the random routers alone. Default: "
        f"{VANILLA_UNIQUE}, or as many as there can be.",
        None,
    ),
    tokens: int | None = option("Tokens of the block. Default: the case's.", None),
    masked: int | None = option("Rows that need the head. Default: all.", None),
    context: int = option("Positions in the cache.", 256),
    dtype: DtypeFlag = "bfloat16",
    *,
    bench: ForwardBenchOptions,
) -> None:
    """Time one denoising forward of a few full-width layers and the head, by part, under several policies."""
    device, picked = bench.prepare(), find_case(case)
    if unique is None:
        spec = picked.config.router
        unique = min(VANILLA_UNIQUE, spec.num_experts, (tokens or picked.tokens) * spec.top_k)
    settings = ForwardSettings(
        num_layers=layers,
        tokens=tokens,
        context=context,
        unique=unique or None,
        masked=masked,
        repeats=bench.repeats,
        **bench.settings(dtype, device),
    )
    chosen = _policies(policies)
    machine = bench.machine()
    yardstick = yardstick_for(settings.dtype, machine.cache_bytes, device) if device.type == "cpu" else None
    found = bench_forward(case, picked, chosen, bench.names(), settings, _progress(), yardstick)
    if yardstick is not None:
        people(as_json=bench.as_json).print(_limits(found))
    config = {**found["scene"], "case": case, "policies": list(chosen), "repeats": bench.repeats}
    bench.finish("bench forward", machine, found, forward_tables(found), config, settings.dtype)


@app.command("generate", epilog="Example: expertshare bench generate models/reference --limit 8 --batch-sizes 1,8")
@expanded
def generate(
    model: Annotated[
        str | None,
        typer.Argument(help=f"Directory of a model in Hugging Face layout, or a hub id. Default: {DEFAULT_MODEL}."),
    ] = None,
    case: str | None = option("Decode a random model of this case instead, transformers beside it.", None, "--case"),
    layers: int | None = option("With --case: layers, leading dense ones included. Default: 4.", None),
    prompt_blocks: int | None = option("With --case: length of the random prompts, in blocks. Default: 2.", None),
    prompts: Path | None = option(
        f"Without --case: JSONL file of prompts. Default: {DEFAULT_PROMPTS}.", None, metavar="FILE"
    ),
    limit: int = option("Prompts to answer.", 4),
    policies: PoliciesFlag = POLICIES,
    gen_length: int = option("Tokens to generate, at most.", 64),
    threshold: float = option("Commit tokens more probable than this.", 0.95),
    batch_sizes: str = option("Prompts decoded together, e.g. 1,4,16.", "1"),
    dtype: str | None = option("float32 or bfloat16. Default: the checkpoint's.", None),
    *,
    bench: AnswerBenchOptions,
) -> None:
    """Time whole answers, end to end: tokens per second, and whether every repetition says the same."""
    device = bench.prepare()
    check_at_least_one("limit", limit)
    of_case = {"--layers": layers, "--prompt-blocks": prompt_blocks, "--memory": bench.memory}
    given = [name for name, value in of_case.items() if value is not None]
    if case is None and given:
        raise InputError(f"{', '.join(given)} belong to a random model: name its --case, or leave them out")
    if case is not None and (model, prompts) != (None, None):
        raise InputError(f"--case {case} decodes random prompts with a random model: leave out MODEL and --prompts")
    chosen, sizes = _policies(policies), _counts("--batch-sizes", batch_sizes) or (1,)
    if case is None:
        records = read_prompts(prompts or DEFAULT_PROMPTS)[:limit]
        loaded = api.load(model or DEFAULT_MODEL, dtype=dtype, device=device)
        loaded.model.requires_grad_(False)
        subject = Subject(
            name=str(loaded.path),
            model=loaded.model,
            prompts=encode_prompts(loaded, [record.prompt for record in records], None),
            options=DecodingOptions(gen_length=gen_length, threshold=threshold, seed=bench.seed),
        )
    else:
        subject = random_subject(
            case,
            find_case(case),
            num_layers=4 if layers is None else layers,
            num_prompts=limit,
            prompt_blocks=2 if prompt_blocks is None else prompt_blocks,
            gen_length=gen_length,
            threshold=threshold,
            **bench.settings(dtype or "bfloat16", device),
        )
    machine = bench.machine()
    found = bench_generate(
        subject, chosen, bench.names(), batch_sizes=sizes, repeats=bench.repeats, on_progress=_progress()
    )
    config = {**found["subject"], "policies": list(chosen), "gen_length": gen_length, "threshold": threshold}
    bench.finish("bench generate", machine, found, generate_tables(found), config, subject.model.dtype)


def _names(listed: str | None) -> list[str] | None:
    """Names parted by commas."""
    found = None if listed is None else split_names(listed)
    if found == []:
        raise InputError(f"expected names parted by commas, got {listed!r}")
    return found


def _counts(flag: str, listed: str | None) -> tuple[int, ...] | None:
    """Whole numbers of at least 1, parted by commas."""
    found = _names(listed)
    if found is None:
        return None
    if not all(text.isdecimal() and int(text) >= 1 for text in found):
        raise InputError(f"{flag} takes whole numbers of at least 1 parted by commas, got {listed!r}")
    return tuple(int(text) for text in found)


def _policies(listed: str) -> dict[str, RoutingPolicy]:
    """Policies parted by commas, under the labels that name them in results."""
    return {policy_label(policy): policy for policy in parse_policies([listed])}


def _limits(found: Mapping[str, Any]) -> str:
    """Over the whole run; points of experts have limits of their own."""
    limits = f"{found['bandwidth_gb_per_s']:.1f} GB/s, {found['peak_gmac_per_s']:.0f} GMAC/s"
    return f"the machine between the calls, which bounds go by: {limits} (medians over the run)"


def _progress() -> Callable[[str], None]:
    """A line on stderr for each step, on a terminal only."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda text: typer.echo(f"  {text}", err=True)
