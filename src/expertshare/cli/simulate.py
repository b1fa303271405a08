"""`expertshare simulate`: tokens per second, traffic, balance and GPUs of a deployment, from recorded routing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from expertshare.cli.console import people, print_json
from expertshare.convert.shapes import VANILLA_UNIQUE, likeness
from expertshare.convert.sizes import ModelSizes, sizes_like, sizes_of
from expertshare.errors import InputError
from expertshare.experts import format_size, parse_size
from expertshare.experts.recording import read_record
from expertshare.lab.plots import check_plot_path, plot_scaling
from expertshare.lab.simulate import (
    ASSUMPTIONS,
    CARDS,
    GPU_COUNTS,
    PLACEMENTS,
    Card,
    Cluster,
    Demand,
    Simulation,
    cut_into_blocks,
    find_card,
)

EXAMPLE = (
    "Example: expertshare simulate --like llada2.0-flash --card h100 --rate 100 --steps-per-block 8 "
    "--trace examples/routing/mini-3-layers-vanilla.jsonl --trace examples/routing/mini-3-layers-des-vote.jsonl"
)
_CLUSTER, _DEMAND = "Cluster", "Demand"


def simulate(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a model in Hugging Face or expert layout, or a hub id.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help=f"Instead of a model: the shapes of {', '.join(VANILLA_UNIQUE)}.")
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="Routing record (generate --record-routing) with as many experts; repeat to compare."),
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens of a block in the records. Default: the model's.")
    ] = None,
    card: Annotated[str, typer.Option(help=f"GPU: {', '.join(CARDS)}.", rich_help_panel=_CLUSTER)] = "h100",
    memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU, instead of the card's.", rich_help_panel=_CLUSTER)
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Its memory bandwidth, GB/s.", rich_help_panel=_CLUSTER)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Its bfloat16 products, TFLOP/s.", rich_help_panel=_CLUSTER)
    ] = None,
    link: Annotated[
        float | None, typer.Option(help="To GPUs of its node, GB/s in one direction.", rich_help_panel=_CLUSTER)
    ] = None,
    network: Annotated[
        float | None, typer.Option(help="To other nodes, GB/s in one direction.", rich_help_panel=_CLUSTER)
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of a node.", rich_help_panel=_CLUSTER)] = None,
    efficiency: Annotated[
        float, typer.Option(help="Share of bandwidth and peak that kernels reach.", rich_help_panel=_CLUSTER)
    ] = 1.0,
    overlap: Annotated[
        float, typer.Option(help="1: reading hides behind computing; 0: it does not.", rich_help_panel=_CLUSTER)
    ] = 1.0,
    gpus: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of GPUs to sweep over.", rich_help_panel=_CLUSTER)
    ] = ",".join(map(str, GPU_COUNTS)),
    expert_parallel: Annotated[
        int | None,
        typer.Option(help="GPUs of a replica. Default: the power of two that delivers most.", rich_help_panel=_CLUSTER),
    ] = None,
    max_expert_parallel: Annotated[
        int, typer.Option(help="Where that is chosen: at most this.", rich_help_panel=_CLUSTER)
    ] = 64,
    placement: Annotated[
        str, typer.Option(help=f"Of experts: {', '.join(PLACEMENTS)}.", rich_help_panel=_CLUSTER)
    ] = "balanced",
    copies: Annotated[
        int, typer.Option(help="With replicated: additional copies in every layer.", rich_help_panel=_CLUSTER)
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Sequences at work on each GPU.", rich_help_panel=_CLUSTER)] = 8,
    quantise: Annotated[
        str, typer.Option(help="How experts are stored: none, int8 or int4.", rich_help_panel=_CLUSTER)
    ] = "none",
    rate: Annotated[float | None, typer.Option(help="Requests per second to serve.", rich_help_panel=_DEMAND)] = None,
    load: Annotated[
        float, typer.Option(help="Share of a replica's capacity to use for them.", rich_help_panel=_DEMAND)
    ] = 0.7,
    prompt_length: Annotated[int, typer.Option(help="Tokens of a prompt.", rich_help_panel=_DEMAND)] = 256,
    gen_length: Annotated[int, typer.Option(help="Tokens of an answer.", rich_help_panel=_DEMAND)] = 256,
    steps_per_block: Annotated[
        list[float] | None,
        typer.Option(
            help="Denoising steps of a block; once, or once for each trace. Default: the block's length.",
            rich_help_panel=_DEMAND,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to simulate and to take means over.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the blocks that are drawn.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep to a .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")] = False,
) -> None:
    """Say what a cluster can serve with and without sharing: traffic, balance, memory, tokens/s, GPUs for a rate."""
    if (model is None) == (like is None):
        raise InputError("expected either a model or --like NAME: give one of them")
    if plot is not None:
        check_plot_path(plot)
    if not trace:
        raise InputError("expected a routing record, got none: make one with `generate --record-routing`, give --trace")
    chosen = _card(card, memory, bandwidth, tflops, link, network, gpus_per_node)
    cluster = Cluster(
        card=chosen,
        placement=placement,
        copies=copies,
        sequences=batch_size,
        scheme=quantise,
        efficiency=efficiency,
        overlap=overlap,
    )
    sizes = sizes_of(model) if model is not None else sizes_like(likeness(like or ""))
    length = sizes.config.block_length if block_length is None else block_length
    if length != sizes.config.block_length:
        sizes = replace(sizes, config=replace(sizes.config, block_length=length))
    demands = _demands(
        steps_per_block,
        len(trace),
        Demand(
            requests_per_s=rate,
            prompt_length=prompt_length,
            gen_length=gen_length,
            steps_per_block=float(length),
            load=load,
        ),
    )
    simulations = [
        Simulation(
            sizes, cut_into_blocks(read_record(path), length, path.stem), cluster, demand, steps=steps, seed=seed
        )
        for path, demand in zip(trace, demands, strict=True)
    ]
    counts = _counts(gpus)
    if max_expert_parallel < 1:
        raise InputError(f"--max-expert-parallel must be at least 1, got {max_expert_parallel}")
    degrees = (
        [expert_parallel]
        if expert_parallel is not None
        else simulations[0].degrees(min(max(counts), max_expert_parallel))
    )
    traces = [_run(*each, degrees, counts) for each in zip(simulations, demands, strict=True)]
    values = {
        "model": model or like or "",
        "model_bytes": _model_bytes(sizes, quantise),
        "cluster": cluster.to_json(),
        "simulated_steps": steps,
        "seed": seed,
        "assumptions": list(ASSUMPTIONS),
        "traces": traces,
    }
    console = people(as_json=as_json)
    console.print(
        f"{values['model']}, experts in {quantise}, on {chosen.name}, {batch_size} sequences on each GPU. read: "
        "experts of a layer that the busiest GPU reads; MB: exchanged in a step; balance: pairs of the busiest GPU "
        "over the mean (mean, 95 %).",
        soft_wrap=True,
    )
    for each in traces:
        console.print(_degree_table(each))
    console.print(_sweep_table(values))
    if not any(point["expert_parallel"] for each in traces for point in each["sweep"]):
        console.print("Nothing fits: allow more GPUs of a replica, fewer sequences, or experts in fewer bits.")
    if plot is not None:
        plot_scaling(values, plot)
    if as_json:
        print_json(values)


def _run(simulation: Simulation, demand: Demand, degrees: list[int], counts: list[int]) -> dict[str, Any]:
    sweep = [simulation.best(count, degrees) for count in counts]
    best = sweep[-1].expert_parallel
    return {
        "label": simulation.trace.label,
        "recorded_blocks": simulation.trace.experts_NXLK.shape[1],
        "recorded_layers": simulation.trace.experts_NXLK.shape[0],
        "unique_experts": simulation.trace.mean_unique(),
        "demand": demand.to_json(),
        "best_expert_parallel": best,
        "degrees": [simulation.capacity(degree).to_json() for degree in degrees],
        "sweep": [point.to_json() for point in sweep],
    }


def _card(
    name: str,
    memory: str | None,
    bandwidth: float | None,
    tflops: float | None,
    link: float | None,
    network: float | None,
    gpus_per_node: int | None,
) -> Card:
    """The named card with what was given in the place of its figures."""
    given: dict[str, Any] = {
        "memory_bytes": float(parse_size(memory)) if memory is not None else None,
        "bytes_per_s": bandwidth * 1e9 if bandwidth is not None else None,
        "flops_per_s": tflops * 1e12 if tflops is not None else None,
        "link_bytes_per_s": link * 1e9 if link is not None else None,
        "network_bytes_per_s": network * 1e9 if network is not None else None,
        "gpus_per_node": gpus_per_node,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    card = find_card(name)
    if not changes:
        return card
    return replace(card, name=f"{name}, changed", source=f"{card.source}; given: {', '.join(changes)}", **changes)


def _demands(steps: list[float] | None, count: int, demand: Demand) -> list[Demand]:
    if not steps:
        return [demand] * count
    if len(steps) not in (1, count):
        raise InputError(f"expected --steps-per-block once or {count} times, as there are traces; got {len(steps)}")
    each = steps * count if len(steps) == 1 else steps
    return [replace(demand, steps_per_block=value) for value in each]


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"expected --gpus as whole numbers above 0, parted by commas, got {text!r}")
    return sorted({int(part) for part in parts})


def _model_bytes(sizes: ModelSizes, scheme: str) -> int:
    return sizes.dense_bytes + sizes.num_experts * sizes.slabs.get(scheme, 0)


def _degree_table(trace: dict[str, Any]) -> Table:
    table = Table(
        title=f"{trace['label']}: {trace['unique_experts']:.1f} experts of a block and layer; one replica",
        title_justify="left",
    )
    for name in ("GPUs", "memory", "read", "step, ms", "dense", "experts", "exchange", "MB", "balance", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("for the rate", justify="right")
    for degree in trace["degrees"]:
        replica = degree["replica"]
        table.add_row(
            str(replica["num_gpus"]),
            format_size(replica["memory"]["total"]) + ("" if replica["fits"] else " (too much)"),
            f"{replica['experts_per_gpu']:.1f}",
            *(f"{1e3 * replica[key]:.2f}" for key in ("step_s", "dense_s", "experts_s", "exchange_s")),
            f"{replica['exchange_bytes'] / 1e6:,.1f}",
            f"{replica['pairs']['mean']:.2f}, {replica['pairs']['p95']:.2f}",
            f"{degree['tokens_per_s']:,.0f}",
            "-" if degree["gpus"] is None else f"{degree['replicas']} x {replica['num_gpus']}",
        )
    return table


def _sweep_table(values: dict[str, Any]) -> Table:
    traces = values["traces"]
    table = Table(title="Best use of that many GPUs: tokens/s (GPUs of a replica)", title_justify="left")
    for name in ("GPUs", *(trace["label"] for trace in traces), *(["gain"] if len(traces) > 1 else [])):
        table.add_column(name, justify="right")
    for points in zip(*(trace["sweep"] for trace in traces), strict=True):
        cells = [
            f"{point['tokens_per_s']:,.0f} ({point['expert_parallel']})" if point["expert_parallel"] else "does not fit"
            for point in points
        ]
        first, last = points[0]["tokens_per_s"], points[-1]["tokens_per_s"]
        gain = [f"{last / first:.2f} x" if first else "-"] if len(points) > 1 else []
        table.add_row(f"{points[0]['gpus']:,}", *cells, *gain)
    return table
