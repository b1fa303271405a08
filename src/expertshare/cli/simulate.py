"""`expertshare simulate`: tokens per second, traffic, balance and GPUs of a deployment, from recorded routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from expertshare.cli import flags
from expertshare.cli.console import check_outputs, figure, megabytes, people, print_json, table
from expertshare.cli.options import OptionGroup, option
from expertshare.cli.plan import Like, SizedModel, sizes_from
from expertshare.errors import InputError
from expertshare.experts import format_size, parse_size
from expertshare.experts.recording import read_record
from expertshare.lab.plots.bench import plot_scaling
from expertshare.lab.simulate.capacity import GPU_COUNTS, Simulation
from expertshare.lab.simulate.deployment import ASSUMPTIONS, CARDS, Card, Cluster, Demand, find_card
from expertshare.lab.simulate.placement import PLACEMENTS, cut_into_blocks

Json = Mapping[str, Any]


class CardOptions(OptionGroup):
    """A GPU by name, and what is given in the place of its figures."""

    panel = "Cluster"
    card: str = option(f"GPU: {', '.join(CARDS)}.", "h100")
    memory: str | None = option("Memory of a GPU, instead of the card's.", None)
    bandwidth: float | None = option("Its memory bandwidth, GB/s.", None)
    tflops: float | None = option("Its bfloat16 products, TFLOP/s.", None)
    link: float | None = option("To GPUs of its node, GB/s in one direction.", None)
    network: float | None = option("To other nodes, GB/s in one direction.", None)
    gpus_per_node: int | None = option("GPUs of a node.", None)

    def chosen(self) -> Card:
        """The named card with what was given."""
        card = find_card(self.card)
        given = {
            "memory_bytes": (None if self.memory is None else parse_size(self.memory), 1.0),
            "bytes_per_s": (self.bandwidth, 1e9),
            "flops_per_s": (self.tflops, 1e12),
            "link_bytes_per_s": (self.link, 1e9),
            "network_bytes_per_s": (self.network, 1e9),
            "gpus_per_node": (self.gpus_per_node, 1),
        }
        changes: dict[str, Any] = {name: value * unit for name, (value, unit) in given.items() if value is not None}
        if not changes:
            return card
        source = f"{card.source}; given: {', '.join(changes)}"
        return replace(card, name=f"{self.card}, changed", source=source, **changes)


class ClusterOptions(OptionGroup):
    """How GPUs are used; `arguments` are fields of Cluster."""

    panel = "Cluster"
    efficiency: float = option("Share of bandwidth and peak that kernels reach.", 1.0)
    overlap: float = option("1: reading hides behind computing; 0: it does not.", 1.0)
    placement: str = option(f"Of experts: {', '.join(PLACEMENTS)}.", "balanced")
    copies: int = option("With replicated: additional copies in every layer.", 0)
    batch_size: int = option("Sequences at work on each GPU.", 8, argument="sequences")
    quantise: str = option("How experts are stored: none, int8 or int4.", "none", argument="scheme")


class SweepOptions(OptionGroup):
    """Which numbers of GPUs, and of GPUs of a replica."""

    panel = "Cluster"
    gpus: str = option("Numbers of GPUs to sweep over.", ",".join(map(str, GPU_COUNTS)), metavar="N,N,...")
    expert_parallel: int | None = option("GPUs of a replica. Default: the power of two that delivers most.", None)
    max_expert_parallel: int = option("Where that is chosen: at most this.", 64)

    def counts(self) -> list[int]:
        """Numbers of GPUs, ascending. Raises InputError for text that is none."""
        parts = self.gpus.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise InputError(f"expected --gpus as whole numbers above 0, parted by commas, got {self.gpus!r}")
        return sorted({int(part) for part in parts})

    def degrees(self, simulation: Simulation) -> list[int]:
        """GPUs of a replica to try. Raises InputError."""
        if self.max_expert_parallel < 1:
            raise InputError(f"--max-expert-parallel must be at least 1, got {self.max_expert_parallel}")
        if self.expert_parallel is not None:
            return [self.expert_parallel]
        return simulation.degrees(min(max(self.counts()), self.max_expert_parallel))


class DemandOptions(OptionGroup):
    """What is asked; `arguments` are fields of Demand."""

    panel = "Demand"
    rate: float | None = option("Requests per second to serve.", None, argument="requests_per_s")
    load: float = option("Share of a replica's capacity to use for them.", 0.7)
    prompt_length: int = option("Tokens of a prompt.", 256)
    gen_length: int = option("Tokens of an answer.", 256)


def simulate(
    model: SizedModel = None,
    like: Like = None,
    trace: list[Path] | None = option(
        "Routing record (generate --record-routing) with as many experts; repeat to compare.", None
    ),
    block_length: int | None = option("Tokens of a block in the records. Default: the model's.", None),
    *,
    gpu: CardOptions,
    use: ClusterOptions,
    sweep: SweepOptions,
    demand: DemandOptions,
    steps_per_block: list[float] | None = option(
        "Denoising steps of a block; once, or once for each trace. Default: the block's length.",
        None,
        rich_help_panel="Demand",
    ),
    steps: int = option("Steps to simulate and to take means over.", 16),
    seed: int = option("Of the blocks that are drawn.", 0),
    plot: Path | None = option("Draw the sweep to a .png, .svg or .pdf.", None),
    as_json: flags.Json = False,
) -> None:
    """Say what a cluster can serve with and without sharing: traffic, balance, memory, tokens/s, GPUs for a rate.

    Example: expertshare simulate --like llada2.0-flash --card h100 --rate 100 --steps-per-block 8 --trace
    examples/routing/mini-3-layers-vanilla.jsonl --trace examples/routing/mini-3-layers-des-vote.jsonl
    """
    sizes = sizes_from(model, like)
    check_outputs(plot=plot)
    if not trace:
        raise InputError("expected a routing record, got none: make one with `generate --record-routing`, give --trace")
    cluster = Cluster(card=gpu.chosen(), **use.arguments())
    length = sizes.config.block_length if block_length is None else block_length
    if length != sizes.config.block_length:
        sizes = replace(sizes, config=replace(sizes.config, block_length=length))
    each_steps = steps_per_block or [float(length)]
    if len(each_steps) not in (1, len(trace)):
        raise InputError(
            f"expected --steps-per-block once or {len(trace)} times, as there are traces; got {len(each_steps)}"
        )
    simulations, demands = [], []
    for path, denoising_steps in zip(trace, each_steps * (len(trace) // len(each_steps)), strict=True):
        blocks = cut_into_blocks(read_record(path), length, path.stem)
        asked = Demand(steps_per_block=denoising_steps, **demand.arguments())
        demands.append(asked)
        simulations.append(Simulation(sizes, blocks, cluster, asked, steps=steps, seed=seed))
    counts = sweep.counts()
    degrees = sweep.degrees(simulations[0])
    traces = [_run(*each, degrees, counts) for each in zip(simulations, demands, strict=True)]
    values = {
        "model": model or like or "",
        "model_bytes": sizes.dense_bytes + sizes.num_experts * sizes.slabs.get(use.quantise, 0),
        "cluster": asdict(cluster),
        "simulated_steps": steps,
        "seed": seed,
        "assumptions": list(ASSUMPTIONS),
        "traces": traces,
    }
    console = people(as_json=as_json)
    console.print(
        f"{values['model']}, experts in {use.quantise}, on {cluster.card.name}, {use.batch_size} sequences on each "
        "GPU. read: experts of a layer that the busiest GPU reads; MB: exchanged in a step; balance: pairs of the "
        "busiest GPU over the mean (mean, 95 %).",
        soft_wrap=True,
    )
    for each in traces:
        console.print(_degree_table(each))
    console.print(_sweep_table(traces))
    if not any(point["expert_parallel"] for each in traces for point in each["sweep"]):
        console.print("Nothing fits: allow more GPUs of a replica, fewer sequences, or experts in fewer bits.")
    if plot is not None:
        plot_scaling(values, plot)
    if as_json:
        print_json(values)


def _run(simulation: Simulation, demand: Demand, degrees: list[int], counts: list[int]) -> dict[str, Any]:
    best = [simulation.best(count, degrees) for count in counts]
    return {
        "label": simulation.trace.label,
        "recorded_blocks": simulation.trace.experts_NXLK.shape[1],
        "recorded_layers": simulation.trace.experts_NXLK.shape[0],
        "unique_experts": simulation.trace.mean_unique(),
        "demand": asdict(demand),
        "best_expert_parallel": best[-1].expert_parallel,
        "degrees": [simulation.capacity(degree).to_json() for degree in degrees],
        "sweep": [asdict(point) for point in best],
    }


def _degree_table(trace: Json) -> Table:
    columns: dict[str, Callable[[Json], str]] = {
        "GPUs": lambda row: str(row["num_gpus"]),
        "memory": lambda row: format_size(row["memory"]["total"]) + ("" if row["fits"] else " (too much)"),
        "read": lambda row: f"{row['experts_per_gpu']:.1f}",
        "step, ms": lambda row: figure(1e3 * row["step_s"], 2),
        "dense": lambda row: figure(1e3 * row["dense_s"], 2),
        "experts": lambda row: figure(1e3 * row["experts_s"], 2),
        "exchange": lambda row: figure(1e3 * row["exchange_s"], 2),
        "MB": lambda row: megabytes(row["exchange_bytes"]),
        "balance": lambda row: f"{row['pairs']['mean']:.2f}, {row['pairs']['p95']:.2f}",
        "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "for the rate": lambda row: "-" if row["gpus"] is None else f"{row['replicas']} x {row['num_gpus']}",
    }
    title = f"{trace['label']}: {trace['unique_experts']:.1f} experts of a block and layer; one replica"
    return table(title, columns, [{**degree, **degree["replica"]} for degree in trace["degrees"]], words=0)


def _sweep_table(traces: Sequence[Json]) -> Table:
    """A row holds one number of GPUs under every trace."""

    def cell(position: int, points: Sequence[Json]) -> str:
        point, degree = points[position], points[position]["expert_parallel"]
        return f"{point['tokens_per_s']:,.0f} ({degree})" if degree else "does not fit"

    def gain(points: Sequence[Json]) -> str:
        first, last = points[0]["tokens_per_s"], points[-1]["tokens_per_s"]
        return f"{last / first:.2f} x" if first else "-"

    columns: dict[str, Callable[[Sequence[Json]], str]] = {"GPUs": lambda points: f"{points[0]['gpus']:,}"}
    columns |= {trace["label"]: partial(cell, position) for position, trace in enumerate(traces)}
    if len(traces) > 1:
        columns["gain"] = gain
    rows = list(zip(*(trace["sweep"] for trace in traces), strict=True))
    return table("Best use of that many GPUs: tokens/s (GPUs of a replica)", columns, rows, words=0)
