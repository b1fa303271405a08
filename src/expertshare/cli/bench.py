"""`expertshare bench experts|forward|generate`: how fast, how near to what the machine can do, and against whom."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from expertshare.cli.bench_options import (
    BackendsFlag,
    CasesFlag,
    DeviceFlag,
    DtypeFlag,
    JsonFlag,
    ListFlag,
    MemoryFlag,
    PlotFlag,
    RepeatsFlag,
    ReportFlag,
    SeedFlag,
    counts,
    device_named,
    dtype_named,
    names,
    policies_by_label,
)
from expertshare.cli.bench_subject import loaded_subject
from expertshare.cli.bench_tables import experts_tables, forward_tables, generate_tables, machine_line
from expertshare.cli.console import people, print_json
from expertshare.cli.threads import ThreadsFlag, set_threads
from expertshare.convert.rates import CACHE_FACTOR
from expertshare.errors import InputError
from expertshare.lab.bench import (
    ExpertsSettings,
    ForwardSettings,
    Machine,
    bench_experts,
    bench_forward,
    bench_generate,
    contenders,
    find_case,
    gpu_memory_bytes,
    measure_gpu,
    measure_machine,
    random_subject,
)
from expertshare.lab.bench.machine import CpuYardstick, dtype_name
from expertshare.lab.bench.weights import memory_limit_bytes
from expertshare.lab.plots import check_plot_path, plot_bench
from expertshare.measure.environment import capture_environment
from expertshare.measure.report import Report, check_writable

DEFAULT_MODEL, DEFAULT_PROMPTS = "models/reference", Path("examples/prompts.jsonl")
POLICIES = "vanilla,des-vote"
CPU = torch.device("cpu")
EXPERTS_EXAMPLE = "Example: expertshare bench experts --case llada2.0-mini --unique 16,70 --plot experts.png"
VANILLA_UNIQUE = 70  # published for LLaDA2.0-mini
FORWARD_EXAMPLE = "Example: expertshare bench forward --case llada2.0-mini --policies vanilla,des-vote:budget=16"
GENERATE_EXAMPLE = "Example: expertshare bench generate models/reference --limit 8 --batch-sizes 1,8"

app = typer.Typer(
    help="Speed: a layer's experts, a forward, whole answers, each beside what people would use instead.",
    no_args_is_help=True,
    invoke_without_command=True,
)


@app.callback()
def _shared(list_cases: ListFlag = False) -> None:
    del list_cases  # its callback has done everything


@app.command("experts", epilog=EXPERTS_EXAMPLE)
def experts(
    case: CasesFlag = "llada2.0-mini",
    unique: Annotated[str | None, typer.Option(help="Unique experts per block, e.g. 16,70.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens per block, e.g. 32 or 16,32,64.")] = None,
    num_experts: Annotated[
        str | None, typer.Option("--experts", help="Experts in the layer instead of the model's number, e.g. 64,512.")
    ] = None,
    dtype: DtypeFlag = "bfloat16",
    device: DeviceFlag = "cpu",
    backends: BackendsFlag = None,
    repeats: RepeatsFlag = 15,
    threads: ThreadsFlag = None,
    memory: MemoryFlag = None,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
    report: ReportFlag = None,
    plot: PlotFlag = None,
    list_cases: ListFlag = False,
) -> None:
    """Time one layer's experts by number of unique experts. Wrong results are reported, not timed."""
    del list_cases
    _prepare(report, plot, threads, repeats)
    on = device_named(device)
    entrants = contenders(names(backends), on)
    cases = {
        name if size is None else f"{name}/{size}-experts": find_case(name).with_experts(size)
        for name in names(case) or ()
        for size in (counts("--experts", num_experts) or (None,))
    }
    settings = ExpertsSettings(
        tokens=counts("--tokens", tokens),
        unique=counts("--unique", unique),
        dtype=dtype_named(dtype),
        repeats=repeats,
        seed=seed,
        memory_bytes=gpu_memory_bytes(memory) if on.type == "cuda" else memory_limit_bytes(memory),
        device=on,
    )
    console = people(as_json=as_json)
    machine = _measure(console, on)
    found = bench_experts(cases, entrants, machine, settings, _progress())
    console.print(_limits(found))
    config = {"cases": list(cases), "repeats": repeats, "warmup": settings.warmup, "skew": settings.skew}
    _finish("bench experts", console, machine, found, experts_tables(found), config, seed, dtype, as_json, report, plot)


@app.command("forward", epilog=FORWARD_EXAMPLE)
def forward(
    case: Annotated[str, typer.Option("--case", help="One case; --list shows them.")] = "llada2.0-mini",
    layers: Annotated[int, typer.Option(help="Layers, leading dense ones included.")] = 4,
    policies: Annotated[str, typer.Option(help="Policies, parted by commas, each with knobs if wanted.")] = POLICIES,
    unique: Annotated[
        int | None,
        typer.Option(
            help="Unique experts that vanilla routing should use; 0 leaves the random routers alone. Default: "
            f"{VANILLA_UNIQUE}, or as many as there can be."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the block. Default: the case's.")] = None,
    masked: Annotated[int | None, typer.Option(help="Rows that need the head. Default: all.")] = None,
    context: Annotated[int, typer.Option(help="Positions in the cache.")] = 256,
    dtype: DtypeFlag = "bfloat16",
    device: DeviceFlag = "cpu",
    backends: BackendsFlag = None,
    repeats: RepeatsFlag = 10,
    threads: ThreadsFlag = None,
    memory: MemoryFlag = None,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
    report: ReportFlag = None,
    plot: PlotFlag = None,
    list_cases: ListFlag = False,
) -> None:
    """Time one denoising forward of a few full-width layers and the head, by part, under several policies."""
    del list_cases
    _prepare(report, plot, threads, repeats)
    on, picked = device_named(device), find_case(case)
    if unique is None:
        spec = picked.config.router
        unique = min(VANILLA_UNIQUE, spec.num_experts, (tokens or picked.tokens) * spec.top_k)
    settings = ForwardSettings(
        num_layers=layers,
        tokens=tokens,
        context=context,
        unique=unique or None,
        masked=masked,
        dtype=dtype_named(dtype),
        repeats=repeats,
        seed=seed,
        memory_bytes=gpu_memory_bytes(memory) if on.type == "cuda" else memory_limit_bytes(memory),
        device=on,
    )
    console = people(as_json=as_json)
    chosen = policies_by_label(policies)
    machine = _measure(console, on)
    size = 2 * CACHE_FACTOR * machine.cache_bytes
    yardstick = CpuYardstick(settings.dtype, buffer_bytes=size) if on.type == "cpu" else None
    found = bench_forward(case, picked, chosen, names(backends), settings, _progress(), yardstick)
    if yardstick is not None:
        console.print(_limits(found))
    config = {**found["scene"], "case": case, "policies": list(chosen), "repeats": repeats}
    _finish("bench forward", console, machine, found, forward_tables(found), config, seed, dtype, as_json, report, plot)


@app.command("generate", epilog=GENERATE_EXAMPLE)
def generate(
    model: Annotated[
        str | None,
        typer.Argument(help=f"Directory of a model in Hugging Face layout, or a hub id. Default: {DEFAULT_MODEL}."),
    ] = None,
    case: Annotated[
        str | None, typer.Option("--case", help="Decode a random model of this case instead, transformers beside it.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="With --case: layers, leading dense ones included. Default: 4.")
    ] = None,
    prompt_blocks: Annotated[
        int | None, typer.Option(help="With --case: length of the random prompts, in blocks. Default: 2.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Without --case: JSONL file of prompts. Default: {DEFAULT_PROMPTS}."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Prompts to answer.")] = 4,
    policies: Annotated[str, typer.Option(help="Policies, parted by commas, each with knobs if wanted.")] = POLICIES,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 64,
    threshold: Annotated[float, typer.Option(help="Commit tokens more probable than this.")] = 0.95,
    batch_sizes: Annotated[str, typer.Option(help="Prompts decoded together, e.g. 1,4,16.")] = "1",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: the checkpoint's.")] = None,
    device: DeviceFlag = "cpu",
    backends: BackendsFlag = None,
    repeats: RepeatsFlag = 3,
    threads: ThreadsFlag = None,
    memory: MemoryFlag = None,
    seed: SeedFlag = 0,
    as_json: JsonFlag = False,
    report: ReportFlag = None,
    plot: PlotFlag = None,
    list_cases: ListFlag = False,
) -> None:
    """Time whole answers, end to end: tokens per second, and whether every repetition says the same."""
    del list_cases
    _prepare(report, plot, threads, repeats)
    if limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    _check_subject(case, {"--layers": layers, "--prompt-blocks": prompt_blocks, "--memory": memory}, (model, prompts))
    on = device_named(device)
    chosen, sizes = policies_by_label(policies), counts("--batch-sizes", batch_sizes) or (1,)
    if case is None:
        where, asked = model or DEFAULT_MODEL, prompts or DEFAULT_PROMPTS
        subject = loaded_subject(where, asked, limit, dtype, gen_length, threshold, seed, on)
    else:
        subject = random_subject(
            case,
            find_case(case),
            num_layers=4 if layers is None else layers,
            num_prompts=limit,
            prompt_blocks=2 if prompt_blocks is None else prompt_blocks,
            gen_length=gen_length,
            threshold=threshold,
            dtype=dtype_named(dtype or "bfloat16"),
            seed=seed,
            memory_bytes=gpu_memory_bytes(memory) if on.type == "cuda" else memory_limit_bytes(memory),
            device=on,
        )
    console = people(as_json=as_json)
    machine = _measure(console, on)
    found = bench_generate(
        subject, chosen, names(backends), batch_sizes=sizes, repeats=repeats, on_progress=_progress()
    )
    config = {**found["subject"], "policies": list(chosen), "gen_length": gen_length, "threshold": threshold}
    told = dtype_name(subject.model.dtype)
    tables = generate_tables(found)
    _finish("bench generate", console, machine, found, tables, config, seed, told, as_json, report, plot)


def _check_subject(case: str | None, of_case: Mapping[str, object], of_model: tuple[str | None, Path | None]) -> None:
    """Refuse what would go unused: a random model has no directory and no prompts, a real one its own size."""
    given = [name for name, value in of_case.items() if value is not None]
    if case is None and given:
        raise InputError(f"{', '.join(given)} belong to a random model: name its --case, or leave them out")
    if case is not None and of_model != (None, None):
        raise InputError(f"--case {case} decodes random prompts with a random model: leave out MODEL and --prompts")


def _prepare(report: Path | None, plot: Path | None, threads: int | None, repeats: int) -> None:
    """Refuse what would fail only after minutes; set the threads once."""
    if plot is not None:
        check_plot_path(plot)
    for path in (report, plot):
        if path is not None:
            check_writable(path)
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}")
    set_threads(threads)


def _measure(console: Console, device: torch.device = CPU) -> Machine:
    _progress()("measuring bandwidth and peak")
    machine = measure_gpu(device) if device.type == "cuda" else measure_machine()
    console.print(machine_line(machine))
    return machine


def _limits(found: Mapping[str, Any]) -> str:
    """Over the whole run; points of experts have limits of their own."""
    limits = f"{found['bandwidth_gb_per_s']:.1f} GB/s, {found['peak_gmac_per_s']:.0f} GMAC/s"
    return f"the machine between the calls, which bounds go by: {limits} (medians over the run)"


def _finish(
    command: str,
    console: Console,
    machine: Machine,
    found: Mapping[str, Any],
    tables: Sequence[Table],
    config: Mapping[str, Any],
    seed: int,
    dtype: str,
    as_json: bool,
    report: Path | None,
    plot: Path | None,
) -> None:
    for table in tables:
        console.print(table)
    for entry in found["left_out"]:
        where = f" at {entry['unique']} unique experts of {entry['case']}" if entry.get("unique") else ""
        console.print(f"not timed: {entry['backend']}{where}: {entry['reason']}", soft_wrap=True)
    results = {
        "machine": machine.to_json(),
        "bandwidth_gb_per_s": machine.bytes_per_s / 1e9,
        "peak_gmac_per_s": machine.macs_per_s[dtype] / 1e9,
        **found,
    }
    if report is not None:
        full = {**config, "dtype": dtype}
        environment = capture_environment(torch.device("cuda") if "gpu" in machine.facts else None)
        Report(command=command, environment=environment, seeds={"bench": seed}, config=full, results=results).write(
            report
        )
    if plot is not None:
        plot_bench(results, plot)
    if as_json:
        print_json(results)


def _progress() -> Callable[[str], None]:
    """A line on stderr for each step, on a terminal only."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda text: typer.echo(f"  {text}", err=True)
