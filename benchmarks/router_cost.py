"""What routing costs beside the experts that it is for, per policy, at LLaDA2.0-mini's width.

    python benchmarks/router_cost.py --json out.json
    python benchmarks/router_cost.py --by torch            # without the native library, but for the experts

Run it on a quiet machine. "routing" is what the model does between a layer's hidden states and its plan with the
counts for reports, in microseconds of one layer for one block of 32 tokens: the median and the quartiles. By torch
scores, select, assign and account (the counts) have a time each. With `--by native,torch` the two alternate.

Each layer has a router of its own and its experts run between one routing and the next, so that no cache serves the
router's weights. Tokens of a block resemble each other by --likeness (0: nothing in common), which decides how many
experts vanilla routing uses. "of experts" is routing / expert time of the same policy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import ModelConfig, RouterSpec
from expertshare.kernels import choose_backend
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.lab.bench.cases import CASES
from expertshare.lab.bench.weights import random_banks
from expertshare.measure.report import capture_environment
from expertshare.models.moe import Router, lay_side_by_side, narrow
from expertshare.routing import POLICIES, RoutingPolicy, count_load, parse_policy, router_scores
from expertshare.types import ExpertBank, RoutingPlan

TOKENS = 32
CPU = CpuBackend()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy: median microseconds of routing and experts, quartiles of routing, unique experts, share of the
    expert time; parts_us where routing was done by torch."""

    policy: str
    by: str
    unique: float
    router_us: float
    router_low_us: float
    router_high_us: float
    experts_us: float
    share_of_experts: float
    parts_us: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What every policy is measured on: routers, hidden states and one bank of experts."""

    routers: list[Router]
    blocks: list[Tensor]
    bank: ExpertBank
    spec: RouterSpec


def make_routers(config: ModelConfig, num_layers: int, dtype: torch.dtype) -> list[Router]:
    """Routers whose weights are of `dtype`, as a checkpoint holds them, and kept as a loaded model keeps them."""
    generator = torch.Generator().manual_seed(0)
    routers = [Router(config).requires_grad_(False) for _ in range(num_layers)]
    lay_side_by_side(routers)
    for router in routers:
        weights = torch.randn(router.weight.shape, generator=generator) * 2 * config.hidden_size**-0.5
        router.weight.copy_(weights.to(dtype))
    narrow(routers)
    return routers


def make_blocks(hidden: int, count: int, likeness: float) -> list[Tensor]:
    """Hidden states [1, 32, D] in bfloat16; `likeness` is the cosine between any token and the block's direction."""
    generator = torch.Generator().manual_seed(1)

    def block() -> Tensor:
        common = torch.randn(1, 1, hidden, generator=generator)
        own = torch.randn(1, TOKENS, hidden, generator=generator)
        return likeness * common + (1.0 - likeness**2) ** 0.5 * own

    return [block().bfloat16() for _ in range(count)]


class Stopwatch:
    """Microseconds of the parts of one layer."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.parts_us: dict[str, float] = {}

    def stop(self, part: str) -> None:
        """What went by since the last stop belongs to `part`."""
        now = time.perf_counter()
        self.parts_us[part] = (now - self._last) * 1e6
        self._last = now


def plan_whole(
    router: Router, x_GLD: Tensor, live_GL: Tensor, policy: RoutingPolicy, spec: RouterSpec, watch: Stopwatch
) -> tuple[RoutingPlan, Tensor]:
    """As the model does it."""
    routed = CPU.route(x_GLD, router.weight, router.bias, policy, spec, live_GL)
    watch.stop("routing")
    return routed.plan, routed.group_experts_G


def plan_by_torch(
    router: Router, x_GLD: Tensor, live_GL: Tensor, policy: RoutingPolicy, spec: RouterSpec, watch: Stopwatch
) -> tuple[RoutingPlan, Tensor]:
    """Step by step."""
    scores = router_scores(router(x_GLD), live_GL, spec, router.bias)
    watch.stop("scores")
    coreset = policy.select(scores, spec)
    watch.stop("select")
    plan = policy.assign(scores, coreset, spec)
    watch.stop("assign")
    _, unique_G = count_load(plan, 1)
    watch.stop("account")
    return plan, unique_G


def layer(
    call: int, by: str, policy: RoutingPolicy, scene: Scene, options: argparse.Namespace
) -> tuple[dict[str, float], int]:
    """Route and compute once: microseconds by part, and unique experts."""
    router = scene.routers[call % len(scene.routers)]
    x_GLD = scene.blocks[call % len(scene.blocks)] + 0  # written just before, as in a model
    live_GL = torch.ones(1, TOKENS, dtype=torch.bool)
    plan_by = plan_whole if by == "native" else plan_by_torch
    watch = Stopwatch()
    plan, unique_G = plan_by(router, x_GLD, live_GL, policy, scene.spec, watch)
    watch.stop("between")
    options.chosen.moe_ffn(x_GLD[0], plan, scene.bank)
    watch.stop("experts")
    return watch.parts_us, int(unique_G[0])


def measure(policy: RoutingPolicy, scene: Scene, options: argparse.Namespace) -> list[Row]:
    """Layer after layer, by each way in turn."""
    ways = options.by.split(",")
    seen: dict[str, list[tuple[dict[str, float], int]]] = {by: [] for by in ways}
    for call in range(-5 * len(ways), options.repeats * len(ways)):
        by = ways[call % len(ways)]
        found = layer(call, by, policy, scene, options)
        if call >= 0:
            seen[by].append(found)
    return [summary(policy.name, by, found) for by, found in seen.items()]


def summary(policy: str, by: str, found: list[tuple[dict[str, float], int]]) -> Row:
    """Medians and quartiles of the layers seen."""
    parts = [part for part in found[0][0] if part not in ("between", "experts")]
    routing = [sum(parts_us[part] for part in parts) for parts_us, _ in found]
    low, median, high = statistics.quantiles(routing, n=4)
    experts_us = statistics.median(parts_us["experts"] for parts_us, _ in found)
    medians = {part: statistics.median(parts_us[part] for parts_us, _ in found) for part in parts}
    return Row(
        policy=policy,
        by=by,
        unique=statistics.mean(unique for _, unique in found),
        router_us=median,
        router_low_us=low,
        router_high_us=high,
        experts_us=experts_us,
        share_of_experts=median / experts_us,
        parts_us=medians if len(parts) > 1 else None,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated, knobs allowed")
    parser.add_argument("--by", default="native", help="native, torch or both, comma-separated")
    parser.add_argument("--router-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of its values")
    parser.add_argument("--likeness", type=float, default=0.75, help="cosine of a block's tokens with its direction")
    parser.add_argument("--backend", help="of the experts; default: cpu where it is there, else torch")
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
    options.backend = options.backend or ("cpu" if native.available() else "torch")
    options.chosen = choose_backend(options.backend, torch.device("cpu"))
    config = CASES["llada2.0-mini"].config
    sizes = {"num_experts": config.router.num_experts, "hidden": config.hidden_size, "inner": config.expert_hidden}
    (bank,) = random_banks(count=1, **sizes, dtype=torch.bfloat16, seed=0)
    routers = make_routers(config, options.layers, getattr(torch, options.router_dtype))
    blocks = make_blocks(config.hidden_size, options.layers + 1, options.likeness)
    scene = Scene(routers=routers, blocks=blocks, bank=bank, spec=config.router)
    instructions = native.instruction_set() if native.available() else "none"
    print(f"{torch.get_num_threads()} threads, native library: {instructions}; experts: {options.backend}")
    print("policy          by      unique  routing  (quartiles)   experts  of experts")
    rows = []
    for name in options.policies.split(","):
        for row in measure(parse_policy(name).bind(config.router), scene, options):
            rows.append(row)
            print(
                f"{row.policy:15} {row.by:7} {row.unique:6.1f} {row.router_us:8.0f} ({row.router_low_us:5.0f}-"
                f"{row.router_high_us:5.0f}) {row.experts_us:9.0f} {row.share_of_experts:11.1%}   "
                + " ".join(f"{part} {us:.0f}" for part, us in (row.parts_us or {}).items()),
                flush=True,
            )
    if options.json:
        kept = {name: value for name, value in vars(options).items() if name != "json"}
        found = [asdict(row) for row in rows]
        report = {"environment": capture_environment().to_json(), "options": kept, "rows": found}
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
