"""One expert layer at the widths of published models: time, bandwidth and arithmetic against what the machine gives.

    python benchmarks/expert_layer.py --case mini --unique 8,12,16,32,68,108 --json out.json

Run it on a quiet machine. Bandwidth (a sum over a gigabyte) and peak (a large torch matrix product) are measured in
the same run, with the same number of threads; the bound of a case is max(bytes / bandwidth, MACs / peak), for quantised
weights with their own bytes (scales among them) and the peak of an int8 product. Each call
uses the next of several disjoint sets of experts, so that no cache serves the weights. Backends take turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare import native
from expertshare.kernels import TorchBackend
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.quantise import QUANTISATIONS, quantise_bank
from expertshare.kernels.weights import projections, tensors_of
from expertshare.measure.report import capture_environment, write_json
from expertshare.types import Bank, ExpertBank, RoutingPlan

TOKENS, TOP_K = 32, 8
CYCLE_BYTES = 256 << 20  # weights read before any is read again
# hidden (D), inner (F), experts held here (E; of flash's 256 a quarter fits)
CASES = {
    "mini": (2048, 512, 256),
    "flash": (4096, 1024, 64),
    "llada-moe": (2048, 1024, 64),
    "sdar": (2048, 768, 128),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CPU, TORCH = CpuBackend(), TorchBackend()
Backend = Callable[[Tensor, RoutingPlan, Any], Tensor]  # of the bank that `bank_for` makes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the bounds are made of."""

    processor: str
    threads: int
    bandwidth_gb_per_s: float
    peak_gmac_per_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backend on one case; times of a single call."""

    case: str
    dtype: str
    unique: int
    backend: str
    ms: float
    iqr_ms: float
    gb_per_s: float
    gmac_per_s: float
    bound_ms: float
    share_of_bound: float
    error: float


def loop(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """One torch product per expert, as most released models compute."""
    y_TD = torch.zeros_like(x_TD)
    for expert in plan.active_E.nonzero().flatten().tolist():
        token, slot = (plan.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], bank.gate_up_EHD[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, bank.down_EDF[expert])
        y_TD.index_add_(0, token, (out * plan.weights_TK[token, slot, None]).to(y_TD.dtype))
    return y_TD


def with_own_threads(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """The kernel in its own threads, which contest the cores with torch's where torch's operations surround it."""
    native.use_torch_threads(False)
    y_TD = CPU.moe_ffn(x_TD, plan, bank)
    native.use_torch_threads(None)
    return y_TD


BACKENDS: dict[str, Backend] = {
    "cpu": CPU.moe_ffn,
    "cpu-own": with_own_threads,
    "cpu-int8": CPU.moe_ffn,
    "cpu-int4": CPU.moe_ffn,
    "torch": TORCH.moe_ffn,
    "loop": loop,
}
# Backends whose weights are not those of the dtype under test.
SCHEMES = {f"cpu-{name}": scheme for name, scheme in QUANTISATIONS.items()}


def best_s(run: Callable[[], object], repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def measure_machine(dtypes: list[str]) -> Machine:
    memory = torch.empty(1 << 28)  # 1 GiB, in huge pages as the weights are
    native.ask_for_huge_pages(memory)
    memory.fill_(1.0)
    bandwidth = memory.nbytes / best_s(memory.sum, 5) / 1e9
    del memory
    peak = {}
    for dtype in dtypes:
        a, b = torch.randn(2048, 2048, dtype=DTYPES[dtype]), torch.randn(2048, 2048, dtype=DTYPES[dtype])
        peak[dtype] = 2048**3 / best_s(lambda a=a, b=b: a @ b.T, 10) / 1e9  # type: ignore[misc]
    codes = torch.randint(-127, 128, (2048, 2048), dtype=torch.int8)
    peak["int8"] = 2048**3 / best_s(lambda: torch._int_mm(codes, codes), 10) / 1e9
    return Machine(
        processor=_processor(),
        threads=torch.get_num_threads(),
        bandwidth_gb_per_s=bandwidth,
        peak_gmac_per_s=peak,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def make_bank(hidden: int, inner: int, num_experts: int, dtype: torch.dtype) -> ExpertBank:
    """Random weights, different for every expert, made without a second copy of the bank."""

    def weights(rows: int, depth: int) -> Tensor:
        seed = (torch.randn(rows * depth) * depth**-0.5).to(dtype)
        made = torch.empty(num_experts, rows, depth, dtype=dtype)
        native.ask_for_huge_pages(made)
        for expert in range(num_experts):
            made[expert] = seed.roll(1031 * expert).view(rows, depth)
        return made

    return ExpertBank(weights(2 * inner, hidden), weights(hidden, inner))


def make_plan(experts: list[int], num_experts: int, generator: torch.Generator) -> RoutingPlan:
    """32 tokens x 8 distinct experts that use exactly `experts`, with a load that falls off like Zipf's law."""
    popularity_U = -torch.log(torch.arange(len(experts)) + 2.0)
    gumbel_TU = -torch.log(-torch.log(torch.rand(TOKENS, len(experts), generator=generator)))
    local_TK = (popularity_U + gumbel_TU).topk(TOP_K, dim=-1).indices
    count_U = torch.bincount(local_TK.flatten(), minlength=len(experts))
    for missing in (count_U == 0).nonzero().flatten().tolist():
        flat = int(count_U[local_TK].flatten().argmax())  # a slot of the most popular expert of all
        count_U[local_TK.view(-1)[flat]] -= 1
        count_U[missing] += 1
        local_TK.view(-1)[flat] = missing
    ids_TK = torch.tensor(experts)[local_TK]
    active_E = torch.zeros(num_experts, dtype=torch.bool).index_fill_(0, ids_TK.unique(), True)
    assert int(active_E.sum()) == len(experts)
    weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
    return RoutingPlan(ids_TK, weights_TK / weights_TK.sum(dim=-1, keepdim=True), active_E)


def rotating_plans(unique: int, num_experts: int, expert_bytes: int) -> list[RoutingPlan]:
    """Plans over disjoint sets of experts, as many as the bank has room for."""
    generator = torch.Generator().manual_seed(unique)
    order = torch.randperm(num_experts, generator=generator).tolist()
    sets = [order[i : i + unique] for i in range(0, num_experts - unique + 1, unique)]
    if len(sets) * unique * expert_bytes < CYCLE_BYTES:
        raise SystemExit(f"{num_experts} experts are too few: caches could hold {len(sets)} sets of {unique}.")
    return [make_plan(chosen, num_experts, generator) for chosen in sets]


def time_backends(
    backends: list[str], x_TD: Tensor, plans: list[RoutingPlan], banks: dict[str, Bank], repeats: int, between: bool
) -> dict[str, list[float]]:
    """Seconds of each call, the backends by turns; each goes through the plans in the same order."""
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    square = torch.randn(512, 512)
    for call in range(-2, repeats):
        for backend in backends:
            if between:  # what surrounds an expert layer in a model: products by torch's own threads
                square @ square
            start = time.perf_counter()
            BACKENDS[backend](x_TD, plans[call % len(plans)], banks[backend])
            if call >= 0:
                times[backend].append(time.perf_counter() - start)
    return times


def run_case(case: str, dtype: str, uniques: list[int], options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    hidden, inner, num_experts = CASES[case]
    bank = make_bank(hidden, inner, num_experts, DTYPES[dtype])
    banks: dict[str, Bank] = {
        backend: quantise_bank(bank, SCHEMES[backend]) if backend in SCHEMES else bank for backend in options.backends
    }
    x_TD = torch.randn(TOKENS, hidden).to(DTYPES[dtype])
    expert_weights = 3 * hidden * inner
    macs = TOKENS * TOP_K * expert_weights
    for unique in uniques:
        if not TOP_K <= unique <= num_experts:
            continue
        expert_bytes = {backend: bytes_per_expert(bank) for backend, bank in banks.items()}
        plans = rotating_plans(unique, num_experts, min(expert_bytes.values()))
        exact = TORCH.moe_ffn(x_TD[:1].float(), _first_token(plans[0]), _widened(bank, plans[0]))
        first = {backend: BACKENDS[backend](x_TD, plans[0], banks[backend])[:1].float() for backend in options.backends}
        errors = {backend: float((y - exact).abs().max() / exact.abs().max()) for backend, y in first.items()}
        times = time_backends(options.backends, x_TD, plans, banks, options.repeats, options.between)
        for backend, seconds in times.items():
            num_bytes = unique * expert_bytes[backend]
            peak = machine.peak_gmac_per_s["int8" if backend in SCHEMES else dtype]
            bound_s = max(num_bytes / machine.bandwidth_gb_per_s / 1e9, macs / peak / 1e9)
            low, median, high = statistics.quantiles(seconds, n=4)
            yield Row(
                case=case,
                dtype=dtype,
                unique=unique,
                backend=backend,
                ms=median * 1e3,
                iqr_ms=(high - low) * 1e3,
                gb_per_s=num_bytes / median / 1e9,
                gmac_per_s=macs / median / 1e9,
                bound_ms=bound_s * 1e3,
                share_of_bound=bound_s / median,
                error=errors[backend],
            )


def bytes_per_expert(bank: Bank) -> int:
    """Codes, scales and minima of one expert."""
    return sum(
        tensor.nbytes // len(tensor)
        for name, weight in projections(bank).items()
        for tensor in tensors_of(name, weight).values()
    )


def _first_token(plan: RoutingPlan) -> RoutingPlan:
    """The first token alone, its experts numbered 0 to 7."""
    return RoutingPlan(torch.arange(TOP_K).view(1, TOP_K), plan.weights_TK[:1], torch.ones(TOP_K, dtype=torch.bool))


def _widened(bank: ExpertBank, plan: RoutingPlan) -> ExpertBank:
    """float32 copies of the experts of the first token."""
    ids_K = plan.expert_ids_TK[0]
    return ExpertBank(bank.gate_up_EHD[ids_K].float(), bank.down_EDF[ids_K].float())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="mini", help=f"comma-separated: {', '.join(CASES)}")
    parser.add_argument("--unique", default="8,12,16,24,32,48,68,108,128")
    parser.add_argument("--dtype", default="bfloat16", help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument("--backends", default=",".join(BACKENDS), type=lambda names: names.split(","))
    parser.add_argument("--repeats", default=30, type=int)
    parser.add_argument("--threads", type=int, help="torch's and the kernel's; default: torch's own choice")
    parser.add_argument("--between", action="store_true", help="a parallel torch product before every call")
    parser.add_argument("--json", type=Path, help="write machine and cases there")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not native.available():
        print(f"cpu left out: {native.unavailable_reason()}")
        options.backends = [backend for backend in options.backends if not backend.startswith("cpu")]
    dtypes = options.dtype.split(",")
    machine = measure_machine(dtypes)
    peaks = ", ".join(f"{dtype} {peak:.0f} GMAC/s" for dtype, peak in machine.peak_gmac_per_s.items())
    print(f"{machine.processor}, {machine.threads} threads: {machine.bandwidth_gb_per_s:.1f} GB/s, {peaks}")
    if native.available():
        print(f"kernel: {native.instruction_set()}, {native.num_threads()} threads")
    print("case       dtype        U backend        ms     IQR   GB/s  GMAC/s bound ms share")
    rows = []
    for case in options.case.split(","):
        for dtype in dtypes:
            for row in run_case(case, dtype, [int(unique) for unique in options.unique.split(",")], options, machine):
                rows.append(row)
                print(
                    f"{row.case:10} {row.dtype:9} {row.unique:4} {row.backend:8} {row.ms:8.2f} {row.iqr_ms:7.2f} "
                    f"{row.gb_per_s:6.1f} {row.gmac_per_s:7.1f} {row.bound_ms:8.2f} {row.share_of_bound:5.0%}"
                    f"  error {row.error:.1e}",
                    flush=True,
                )
    if options.json:
        results = {"machine": asdict(machine), "cases": [asdict(row) for row in rows]}
        write_json(options.json, {"environment": capture_environment().to_json(), **results})


if __name__ == "__main__":
    main()
