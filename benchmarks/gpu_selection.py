"""Time of the two selection kernels on a GPU, in a captured graph, for every policy: microseconds a layer.

    python benchmarks/gpu_selection.py --out build/selection.json

Scores of LLaDA2.0-mini's router (256 experts, 8 groups) for blocks of 32 tokens. A graph holds 32 selections of
different scores; the figure is its time divided by 32. Beside it: the same through torch's own operations, launched one
by one, as without our kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from expertshare.config import RouterSpec
from expertshare.kernels.triton.route import select_and_assign
from expertshare.lab.bench.cases import find_case
from expertshare.lab.bench.machine import gpu_device, measure_gpu
from expertshare.lab.bench.timing import MOST_TURNS, take_turns_on_gpu
from expertshare.routing import POLICIES, RoutingPolicy, count_load, make_policy, route, runs_on_torch
from expertshare.types import RouterScores


def scenes(spec: RouterSpec, blocks: int, length: int, device: torch.device) -> list[RouterScores]:
    """As a sigmoid router with a small bias gives them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(MOST_TURNS):
        affinity = torch.randn(blocks, length, spec.num_experts, generator=generator).sigmoid().to(device)
        bias_E = 0.01 * torch.randn(spec.num_experts, generator=generator).to(device)
        live_GL = torch.ones(blocks, length, dtype=torch.bool, device=device)
        made.append(RouterScores(affinity, affinity + bias_E, live_GL))
    return made


def calls(policy: RoutingPolicy, spec: RouterSpec, of: Sequence[RouterScores]) -> dict[str, Callable[[int], object]]:
    """Ours, and routing's own functions with what a layer counts besides."""
    rule = policy.rule(spec)

    def by_torch(turn: int) -> object:
        _, plan = route(of[turn], policy, spec)
        return count_load(plan, len(of[turn].live_GL))

    def by_triton(turn: int) -> object:
        return select_and_assign(of[turn], spec, rule)

    return {"triton": by_triton, "torch": by_torch}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="llada2.0-mini")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    device = gpu_device()
    case = find_case(asked.case)
    spec = case.config.router
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        of = scenes(spec, asked.blocks, case.tokens, device)
        for name in POLICIES:
            policy = make_policy(name).bind(spec)
            if runs_on_torch(policy):
                print(f"{name:16s} is routed by torch: no rule expresses it")
                continue
            both = calls(policy, spec, of)
            times = take_turns_on_gpu(both, turns=MOST_TURNS, repeats=asked.repeats, warmup=3, host_bound=["torch"])
            us = {way: 1e6 * statistics.median(seconds) for way, seconds in times.seconds.items()}
            found.append({"policy": name, "us": us["triton"], "us_torch": us["torch"], "captured": times.captured})
            print(f"{name:16s} {us['triton']:8.1f} us   torch, launched one by one {us['torch']:8.1f} us")
    results = {"case": asked.case, "blocks": asked.blocks, "tokens": case.tokens, "selections": found}
    asked.out.write_text(json.dumps({**results, "machine": measure_gpu(device).to_json()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
