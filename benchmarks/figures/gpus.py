"""The capacity model: cards, one to 10,000 GPUs, and the check on one machine. For docs/scaling.md."""

from __future__ import annotations

import sys
from typing import Any

from writing import ROOT, bullets, pick, spanning, stored, table

from expertshare.convert.sizes import likeness, sizes_like
from expertshare.experts.recording import read_record
from expertshare.lab.simulate.capacity import Capacity, Simulation
from expertshare.lab.simulate.deployment import CARDS, Cluster, Demand
from expertshare.lab.simulate.placement import cut_into_blocks

sys.path.append(str(ROOT / "benchmarks"))
import capacity_check as check

BLOCKS = (
    *("cards", "gpus_sweep", "gpus_demand", "gpus_parts", "gain_by_sequences", "balance_by_placement"),
    *("capacity_tables", "capacity_findings"),
)
NAMES = ("vanilla", "des-vote")


def _traces() -> list[dict[str, Any]]:
    vanilla, shared = stored("scaling-flash")["traces"]
    return [vanilla, shared]


def cards() -> str:
    """What the data sheets say."""
    rows = [
        [
            f"`{card.name}`",
            card.source.split(";")[0],
            f"{card.memory_bytes / 1e9:g}",
            f"{card.bytes_per_s / 1e12:g}",
            f"{card.flops_per_s / 1e12:g}",
            f"{card.link_bytes_per_s / 1e9:g}",
            f"{card.network_bytes_per_s / 1e9:g}",
        ]
        for card in CARDS.values()
    ]
    head = ("card", "source", "GB", "TB/s", "TFLOP/s", "link, GB/s", "network, GB/s")
    return table(head, rows, words=2)


def gpus_sweep() -> str:
    """Tokens per second against GPUs, with the GPUs of a replica in parentheses."""
    rows = []
    for gpus in (1, 2, 4, 8, 64, 1_000, 10_000):
        points = [pick(trace["sweep"], gpus=gpus) for trace in _traces()]
        shown = [f"{point['tokens_per_s']:,.0f} ({point['expert_parallel']})" for point in points]
        rows.append([f"{gpus:,}", *shown, f"{points[1]['tokens_per_s'] / points[0]['tokens_per_s']:.2f}"])
    return table(("GPUs", "vanilla, tokens/s", "des-vote, 16 experts", "gain"), rows)


def gpus_demand() -> str:
    """GPUs for the request rate."""
    demand, said = _traces()[0]["demand"], []
    for trace, name in zip(_traces(), NAMES, strict=True):
        degrees = {each["replica"]["num_gpus"]: each for each in trace["degrees"]}
        best = degrees[trace["best_expert_parallel"]]
        said.append(
            f"{best['gpus']} GPUs under {name} ({best['replicas']} replicas of {trace['best_expert_parallel']})"
        )
    return (
        f"{demand['requests_per_s']:,.0f} requests a second of {demand['prompt_length']} + {demand['gen_length']} "
        "tokens at "
        f"{100 * demand['load']:.0f} % load take {said[0]} and {said[1]}, if both need "
        f"{demand['steps_per_block']:g} denoising steps for a block"
    )


def gpus_parts() -> str:
    """Parts of a step by the GPUs of a replica."""
    rows = []
    for pair in zip(*(trace["degrees"] for trace in _traces()), strict=True):
        for name, degree in zip(NAMES, pair, strict=True):
            r = degree["replica"]
            rows.append(
                [
                    f"{r['num_gpus']}",
                    name,
                    f"{r['memory']['total'] / 1e9:.0f}",
                    *(f"{1e3 * r[part]:.2f}" for part in ("step_s", "dense_s", "experts_s", "exchange_s")),
                    f"{r['exchange_bytes'] / 1e6:,.0f}",
                    f"{r['ranks_per_token']:.2f}",
                    f"{r['pairs']['mean']:.2f}",
                ]
            )
    head = ("GPUs of a replica", "policy", "GB a GPU", "step, ms", "dense", "experts", "exchange", "MB exchanged")
    return table((*head, "GPUs a token", "balance"), rows, words=2)


def _simulated(name: str, gpus: int, **settings: Any) -> Capacity:
    """What `expertshare simulate` makes of a record in examples/routing, on the model and card of "
    "scaling-flash.json."""
    result = stored("scaling-flash")
    record = read_record(ROOT / "examples" / "routing" / f"mini-3-layers-{name}.jsonl")
    sizes = sizes_like(likeness(result["model"]))
    cluster = Cluster(card=CARDS[result["cluster"]["card"]["name"]], scheme=result["cluster"]["scheme"], **settings)
    demand = Demand(**_traces()[0]["demand"])
    return Simulation(sizes, cut_into_blocks(record, sizes.config.block_length, name), cluster, demand).capacity(gpus)


def gain_by_sequences() -> str:
    """Tokens per second of des-vote over vanilla, by sequences on each GPU."""
    counts, rows = (1, 2, 4, 8, 16, 32), []
    for gpus in (1, 4, 8):
        rates = [[_simulated(name, gpus, sequences=n).tokens_per_s for name in NAMES] for n in counts]
        rows.append([f"{gpus} GPUs of a replica", *(f"{shared / vanilla:.2f}" for vanilla, shared in rates)])
    return table(("gain by sequences on each GPU", *map(str, counts)), rows)


def balance_by_placement() -> str:
    """The busiest of 8 GPUs over their mean, by placement."""
    said = []
    for name, copies in (("round-robin", 0), ("balanced", 0), ("replicated", 32)):
        found = [_simulated(policy, 8, placement=name, copies=copies).replica.pairs.mean for policy in NAMES]
        label = f"`{name} --copies {copies}`" if copies else f"`{name}`"
        said.append(f"{found[0]:.2f} and {found[1]:.2f} with {label}")
    return ", ".join(said)


def capacity_tables() -> str:
    """Predictions beside what was measured on one machine."""
    return "\n\n".join(
        [
            check.table("expert layer", check.expert_layer(), "ms"),
            check.table("four layers and the head", check.forwards(), "ms"),
            check.table("20 layers, bfloat16", check.decoding("memory-mini-bf16.json", "none"), "ms"),
            check.table("20 layers, 4 bit", check.decoding("memory-mini-int4.json", "int4"), "ms"),
            check.table("memory beside experts", check.memory(), "GB"),
        ]
    )


def capacity_findings() -> str:
    """What the tables say."""

    def low(found: list[check.Check]) -> str:
        return spanning([-each.error_low for each in found], 0, 100)

    def high(found: list[check.Check]) -> str:
        return spanning([each.error_high for each in found], 0, 100)

    layer, forwards = check.expert_layer(), check.forwards()
    wide, narrow = (
        check.decoding(f"memory-mini-{name}.json", form) for name, form in (("bf16", "none"), ("int4", "int4"))
    )
    gains = [forwards[0].low / forwards[1].low, forwards[0].high / forwards[1].high]
    missing = [each.measured - each.low for each in check.memory()]
    vanilla, shared = ([each for each in narrow if ("vanilla" in each.what) == is_it] for is_it in (True, False))
    return bullets(
        f"One expert layer lies between the roofline ({low(layer)} % less time than was measured) and the sum "
        f"({high(layer)} "
        "% more) at every point, and the nearer to the roofline the more experts it reads. Reading and arithmetic "
        "overlap.",
        f"So do forwards of four layers: {low(forwards)} % less by the roofline, {high(forwards)} % more by the sum. "
        "Bandwidth "
        "of this machine moves within minutes ([performance](performance.md)); the limits are medians over the run.",
        f"20 layers behind a store take about what the sum says in bfloat16 (off by {high(wide)} %). The waits for the "
        "store "
        "are taken off; what its bookkeeping costs is not, nor are norms, router and sampling. In 4 bit the sum is off "
        "by "
        f"{high(vanilla)} % under vanilla and by {high(shared)} % under coresets: it takes the peak of bfloat16, which "
        "int8 "
        "products of experts and head exceed.",
        f"The gain of sharing: {spanning(gains, 2)} predicted, {forwards[0].measured / forwards[1].measured:.2f} "
        "measured "
        "(four layers and the head).",
        f"Memory: {spanning(missing)} GB of interpreter, libraries and buffers are not predicted, the rest is.",
    )
