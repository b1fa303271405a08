"""A model whose experts do not all lie on the card: speed, hit rate, and how much of the bus it takes, on a GPU.

    expertshare make-checkpoint --like llada2.0-mini --out checkpoints/mini
    python benchmarks/gpu_store.py checkpoints/mini --budgets 4GiB,8GiB,all --host-memory all --json build/store.json

Every policy runs at every budget of the card's memory (`all`: every expert there), each pair with a store of its own,
`--rounds` times after one that does not count, in which kernels are compiled, and slots and the host's memory are
filled: what is told is a server's state after its first requests. The bus is measured before every round. Close
everything else first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from expertshare.api.loading import opened
from expertshare.decoding import DecodingOptions
from expertshare.evaluation.runner import PolicyRun, Setup, answer_prompts, encode_prompts
from expertshare.experts import ExpertMemory, StoreOptions
from expertshare.lab.bench.machine import bus_bandwidth, gpu_device, gpu_facts
from expertshare.measure.memory import peak_memory_bytes
from expertshare.measure.report import capture_environment, write_json
from expertshare.models import LoadedModel, load_model
from expertshare.routing import parse_policy

PROMPT = "Tom has 12 apples. He finds 7 more. How many apples does Tom have now?"
HEADER = (
    "model            budget   policy               "
    "tok/s  x vanilla  card GiB  unique   hit %  bus GB  of bus %  stall s"
)

Setting = tuple[str, str]
"""A budget and a policy."""


def store_options(budget: str, asked: argparse.Namespace) -> StoreOptions:
    """The store of a budget; where all experts are on the card, none are kept beside it."""
    memory = ExpertMemory.parse(budget)
    beside = asked.host_memory if memory.kind == "budget" else None
    host = None if beside is None else ExpertMemory.parse_host(beside)
    return StoreOptions(memory=memory, direct=asked.direct_io, prefetch=asked.prefetch, host_memory=host)


def rounds(loaded: LoadedModel, setting: Setting, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The generations that count, from one store that was warmed up by one more."""
    budget, policy = setting
    device = loaded.model.device
    options = DecodingOptions(gen_length=asked.gen_length, threshold=None, stop_at_eos=False)
    prompts = encode_prompts(loaded, [PROMPT], None)
    found = []
    with opened(loaded, store_options(budget, asked), Setup(backend=asked.backend)) as setup:
        for turn in range(asked.rounds + 1):
            bus = bus_bandwidth(device)
            torch.cuda.reset_peak_memory_stats(device)
            made = answer_prompts(loaded, prompts, parse_policy(policy), options, setup=setup)
            if turn:
                found.append({**summary(made, bus), "peak_device_bytes": peak_memory_bytes(device)})
    return found


def summary(made: PolicyRun, bus: float) -> dict[str, Any]:
    """What one generation took, and the bus of that minute."""
    assert made.expert_store is not None  # of a converted model, which `opened` makes sure of
    store = made.expert_store.to_json()
    return {
        "tokens_per_s": made.tokens_per_s,
        "elapsed_s": made.elapsed_s,
        "token_ids": list(made.answers[0].token_ids),
        "unique_experts": made.cost.unique_experts["denoise"],
        **{key: store[key] for key in ("slots", "slot_bytes", "hit_rate", "bytes_read", "bytes_copied", "stall_s")},
        "bus_bytes_per_s": bus,
        "share_of_bus": store["bytes_copied"] / made.elapsed_s / bus,
    }


def median_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of median speed, whole, so that its figures belong together; and the range of speeds."""
    ordered = sorted(runs, key=lambda found: found["tokens_per_s"])
    speeds = [found["tokens_per_s"] for found in ordered]
    return {**ordered[len(ordered) // 2], "tokens_per_s_range": [speeds[0], speeds[-1]]}


def points(model: str, runs: dict[Setting, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each setting. same_tokens: whether a policy's answers are the same at all budgets and in all rounds."""
    answers: dict[str, set[tuple[int, ...]]] = {}
    for (_, policy), found in runs.items():
        answers.setdefault(policy, set()).update(tuple(one["token_ids"]) for one in found)
    rows = []
    for (budget, policy), found in runs.items():
        vanilla = runs.get((budget, "vanilla"))
        base = median_run(vanilla)["tokens_per_s"] if vanilla else None
        row = {"model": model, "budget": budget, "policy": policy, **median_run(found)}
        del row["token_ids"]
        row["same_tokens"] = len(answers[policy]) == 1
        row["faster_than_vanilla"] = row["tokens_per_s"] / base if base else None
        rows.append(row)
    return rows


def table_row(point: dict[str, Any]) -> str:
    """A line under HEADER."""
    return (
        f"{point['model']:16} {point['budget']:8} {point['policy']:20} {point['tokens_per_s']:5.1f} "
        f"{point['faster_than_vanilla'] or 0:9.2f}x {point['peak_device_bytes'] / 2**30:9.2f} "
        f"{point['unique_experts']:7.1f} {100 * point['hit_rate']:7.1f} {point['bytes_copied'] / 1e9:7.1f} "
        f"{100 * point['share_of_bus']:9.1f} {point['stall_s']:8.2f}{'' if point['same_tokens'] else '  OTHER TOKENS'}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the expert layout")
    parser.add_argument("--budgets", default="4GiB", help="expert memories of the card, parted by commas")
    parser.add_argument("--policies", default="vanilla,des-vote:budget=32,des-vote:budget=16")
    parser.add_argument("--host-memory", help="pinned memory for experts beside the card: a size, or all")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--gen-length", default=64, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--direct-io", action="store_true", help="read experts past the page cache")
    parser.add_argument("--no-prefetch", dest="prefetch", action="store_false")
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, write JSON."""
    asked = parse(arguments)
    device = gpu_device()
    facts = {**capture_environment(device).to_json(), "gpu": gpu_facts(torch.cuda.get_device_properties(device))}
    loaded = load_model(asked.model, device=device)
    settings = product(asked.budgets.split(","), asked.policies.split(","))
    runs = {setting: rounds(loaded, setting, asked) for setting in settings}
    rows = points(asked.model.name, runs)
    print(HEADER, *map(table_row, rows), sep="\n")
    if asked.json:
        told = {key: value for key, value in vars(asked).items() if key not in ("model", "json")}
        write_json(asked.json, {"settings": told, "environment": facts, "points": rows})


if __name__ == "__main__":
    main()
