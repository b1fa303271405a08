"""What routing costs beside the experts that it is for, per policy, at LLaDA2.0-mini's width.

    python benchmarks/router_cost.py --json out.json
    python benchmarks/router_cost.py --by torch            # the same without the native library, but for the experts

Run it on a quiet machine. Times of gate, select, assign and account (the counts for reports) are
microseconds of one layer for one block of 32 tokens: the median, and the
quartiles of the whole. Each layer has a router of its own and its experts run between one routing and the next, so
that no cache serves the router's weights. Tokens of a block resemble each other by --likeness (0: nothing in common),
which decides how many experts vanilla routing uses. "of experts" is routing / expert time of the same policy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from expertshare import native
from expertshare.bench.cases import CASES
from expertshare.bench.weights import random_banks
from expertshare.config import ModelConfig
from expertshare.kernels import moe_ffn
from expertshare.models.moe import Router
from expertshare.routing import POLICIES, assign, compiled, count_load
from expertshare.types import ExpertBank, RoutingPolicy

TOKENS = 32
PARTS = ("gate", "select", "assign", "account", "experts")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy: median microseconds of each part, quartiles of routing, unique experts, share of the expert time."""

    policy: str
    unique: float
    gate_us: float
    select_us: float
    assign_us: float
    account_us: float
    router_us: float
    router_low_us: float
    router_high_us: float
    experts_us: float
    share_of_experts: float


def make_routers(config: ModelConfig, num_layers: int, dtype: torch.dtype) -> list[Router]:
    """Routers in float32 whose weights are of `dtype`, as a checkpoint holds them."""
    generator = torch.Generator().manual_seed(0)
    routers = [Router(config).requires_grad_(False) for _ in range(num_layers)]
    for router in routers:
        weights = torch.randn(router.weight.shape, generator=generator) * 2 * config.hidden_size**-0.5
        router.weight.copy_(weights.to(dtype))
    return routers


def make_blocks(hidden: int, count: int, likeness: float) -> list[Tensor]:
    """Hidden states [1, 32, D] in bfloat16; `likeness` is the cosine between any token and the block's direction."""
    generator = torch.Generator().manual_seed(1)

    def block() -> Tensor:
        common = torch.randn(1, 1, hidden, generator=generator)
        own = torch.randn(1, TOKENS, hidden, generator=generator)
        return likeness * common + (1.0 - likeness**2) ** 0.5 * own

    return [block().bfloat16() for _ in range(count)]


def measure(
    policy: RoutingPolicy,
    routers: list[Router],
    blocks: list[Tensor],
    bank: ExpertBank,
    config: ModelConfig,
    options: argparse.Namespace,
) -> Row:
    """Route and compute, layer after layer."""
    spec, live = config.router, torch.ones(1, TOKENS, dtype=torch.bool)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    unique: list[int] = []
    for call in range(-5, options.repeats):
        router, x_GLD = (
            routers[call % len(routers)],
            blocks[call % len(blocks)] + 0,
        )  # written just before, as in a model
        stamps = [time.perf_counter()]

        def stamp(stamps: list[float] = stamps) -> None:
            stamps.append(time.perf_counter())

        scores = router.scores(x_GLD, live, spec, compiled=options.by == "native")
        stamp()
        coreset = policy.select(scores, spec)
        stamp()
        plan = assign(scores, coreset, spec, policy=policy)
        stamp()
        _, unique_G = count_load(plan, 1)
        stamp()
        moe_ffn(x_GLD[0], plan, bank, backend=options.backend)
        stamp()
        if call >= 0:
            unique.append(int(unique_G[0]))
            for part, begin, end in zip(PARTS, stamps[:-1], stamps[1:], strict=True):
                times[part].append((end - begin) * 1e6)
    routing = [sum(parts) for parts in zip(*(times[part] for part in PARTS[:-1]), strict=True)]
    low, median, high = statistics.quantiles(routing, n=4)
    medians = {part: statistics.median(times[part]) for part in PARTS}
    return Row(
        policy=policy.name,
        unique=statistics.mean(unique),
        **{f"{part}_us": medians[part] for part in PARTS},
        router_us=median,
        router_low_us=low,
        router_high_us=high,
        share_of_experts=median / medians["experts"],
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated")
    parser.add_argument("--by", choices=("native", "torch"), default="native", help="who computes the routing")
    parser.add_argument("--router-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of its values")
    parser.add_argument("--likeness", type=float, default=0.75, help="cosine of a block's tokens with its direction")
    parser.add_argument("--backend", help="of the experts; default: cpu where it is there, else grouped")
    parser.add_argument("--layers", type=int, default=20, help="routers")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", type=Path, help="write the rows there")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Print a table, and write JSON if asked to."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.backend = options.backend or ("cpu" if native.available() else "grouped")
    config = CASES["llada2.0-mini"].config
    sizes = {"num_experts": config.router.num_experts, "hidden": config.hidden_size, "inner": config.expert_hidden}
    (bank,) = random_banks(count=1, **sizes, dtype=torch.bfloat16, seed=0)
    routers = make_routers(config, options.layers, getattr(torch, options.router_dtype))
    blocks = make_blocks(config.hidden_size, options.layers + 1, options.likeness)
    instructions = native.instruction_set() if native.available() else "none"
    print(f"{torch.get_num_threads()} threads, native library: {instructions}; experts: {options.backend}")
    print("policy          unique   gate select assign account  routing  (quartiles)   experts  of experts")
    no_library: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    rows = []
    with patch.object(compiled, "library_for", no_library) if options.by == "torch" else nullcontext():
        for name in options.policies.split(","):
            row = measure(POLICIES[name]().bind(config.router), routers, blocks, bank, config, options)
            rows.append(row)
            print(
                f"{row.policy:15} {row.unique:6.1f} {row.gate_us:6.0f} {row.select_us:6.0f} {row.assign_us:6.0f} "
                f"{row.account_us:7.0f} {row.router_us:8.0f} ({row.router_low_us:5.0f}-{row.router_high_us:5.0f}) "
                f"{row.experts_us:9.0f} {row.share_of_experts:11.1%}",
                flush=True,
            )
    if options.json:
        kept = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"options": kept, "rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
