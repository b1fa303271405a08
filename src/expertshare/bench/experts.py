"""`bench experts`: one layer's experts, by number of unique experts, everybody on equal weights in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertshare.bench.bound import Work, expert_work
from expertshare.bench.cases import Case
from expertshare.bench.contenders import Contender, Run
from expertshare.bench.fit import fit_latency
from expertshare.bench.machine import CACHE_FACTOR, Machine, Peaks, Yardstick, dtype_name
from expertshare.bench.oracle import TOLERANCES, expected_output, relative_error
from expertshare.bench.plans import SKEW, rotation
from expertshare.bench.timing import Spread, interleave, spread
from expertshare.bench.weights import bank_bytes, check_memory, random_banks
from expertshare.types import ExpertBank, RoutingPlan

MAX_BANKS = 8
READ, MULTIPLY = "(read)", "(multiply)"
RATIOS_TO = ("torch", "transformers-eager", "transformers-grouped-mm")
Listener = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSettings:
    """How each point is measured. tokens, unique: None takes the case's own. memory_bytes: weights may use at most."""

    tokens: tuple[int, ...] | None = None
    unique: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 15
    warmup: int = 2
    seed: int = 0
    skew: float = SKEW
    memory_bytes: int = 4 * 10**9


@dataclass(frozen=True, slots=True)
class Stage:
    """What all contenders of one point share: layers of weights, tokens, and the plans that are walked through."""

    banks: Sequence[ExpertBank]
    x_TD: Tensor
    plans: Sequence[RoutingPlan]

    def call(self, run: Run, turn: int) -> Tensor:
        """The `turn`-th call: layers first, then plans."""
        layer = turn % len(self.banks)
        return run(layer, self.x_TD, self.plans[turn // len(self.banks) % len(self.plans)])


def bench_experts(
    cases: Mapping[str, Case],
    entrants: Mapping[str, Contender],
    machine: Machine,
    settings: ExpertsSettings,
    on_progress: Listener = lambda _: None,
) -> dict[str, Any]:
    """Measure every case. Returns {"bandwidth_gb_per_s" and "peak_gmac_per_s": what the machine gave
    in between, "cases": points, "fits": lines through them, "left_out": who was not timed and why}.

    Raises InputError where the weights do not fit, or for a number of unique experts that cannot be routed.
    """
    points: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    present: dict[str, Contender] = {}
    for name, entrant in entrants.items():
        reason = entrant.missing()
        if reason is None:
            present[name] = entrant
        else:
            left_out.append({"case": None, "unique": None, "backend": name, "reason": reason})
    yardstick = Yardstick(settings.dtype, buffer_bytes=2 * CACHE_FACTOR * machine.cache_bytes)
    with torch.no_grad():
        for name, case in cases.items():
            on_progress(f"{name}: filling weights")
            banks = _banks(case, machine, settings, copies=any(e.copies_weights for e in present.values()))
            runs = {backend: entrant.build(banks, case) for backend, entrant in present.items()}
            for tokens in settings.tokens or (case.tokens,):
                for unique in settings.unique or case.unique:
                    on_progress(f"{name}: {unique} unique experts, {tokens} tokens")
                    found, refused = _point(name, case, banks, runs, yardstick, machine, settings, tokens, unique)
                    points += found
                    left_out += refused
            del banks, runs
    best = machine.peaks(settings.dtype)
    limits = yardstick.peaks() if points else best
    return {
        "bandwidth_gb_per_s": limits.bytes_per_s / 1e9,
        "peak_gmac_per_s": limits.macs_per_s / 1e9,
        "cases": [_with_bounds(point, limits, best) for point in points],
        "fits": _fits(points, cases, settings.dtype),
        "left_out": left_out,
    }


def _banks(case: Case, machine: Machine, settings: ExpertsSettings, *, copies: bool) -> list[ExpertBank]:
    """Enough layers to exceed the cache CACHE_FACTOR times, as far as memory and MAX_BANKS allow."""
    config = case.config
    one = config.router.num_experts * config.num_expert_parameters * settings.dtype.itemsize
    kept = 2 if copies else 1
    check_memory(kept * one, settings.memory_bytes, "one layer of this case", "measure a smaller --experts")
    wanted = -(-CACHE_FACTOR * machine.cache_bytes // one)
    return random_banks(
        count=max(1, min(wanted, MAX_BANKS, settings.memory_bytes // (kept * one))),
        num_experts=config.router.num_experts,
        hidden=config.hidden_size,
        inner=config.expert_hidden,
        dtype=settings.dtype,
        seed=settings.seed,
    )


def _point(
    name: str,
    case: Case,
    banks: Sequence[ExpertBank],
    runs: Mapping[str, Run],
    yardstick: Yardstick,
    machine: Machine,
    settings: ExpertsSettings,
    tokens: int,
    unique: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    router, hidden = case.config.router, case.config.hidden_size
    stage = Stage(
        banks,
        torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(settings.seed)).to(settings.dtype),
        rotation(
            router.num_experts,
            tokens,
            router.top_k,
            unique,
            count=max(2, -(-router.num_experts // unique)),
            seed=settings.seed,
            skew=settings.skew,
        ),
    )
    checker = _Checker(stage)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for backend, run in runs.items():
        checker.judge(backend, run, errors, reasons)
    right = {backend: run for backend, run in runs.items() if backend not in reasons}
    seconds = interleave(
        {READ: yardstick.read, MULTIPLY: yardstick.multiply, **{b: _caller(stage, run) for b, run in right.items()}},
        repeats=settings.repeats,
        warmup=settings.warmup,
    )
    for backend, run in right.items():  # once more: some kernels remember the routing of earlier calls
        checker.judge(backend, run, errors, reasons)
    work = expert_work(
        tokens=tokens,
        top_k=router.top_k,
        unique=unique,
        hidden=hidden,
        inner=case.config.expert_hidden,
        itemsize=settings.dtype.itemsize,
    )
    shared = {
        "case": name,
        "num_experts": router.num_experts,
        "tokens": tokens,
        "pairs": tokens * router.top_k,
        "unique": unique,
        "dtype": dtype_name(settings.dtype),
        "seed": settings.seed,
        "weights_bytes": bank_bytes(banks),
        "beyond_cache": bank_bytes(banks) >= CACHE_FACTOR * machine.cache_bytes,
    }
    yardstick.note(seconds[READ], seconds[MULTIPLY])
    spreads = {backend: spread(seconds[backend]) for backend in right if backend not in reasons}
    points = [
        {
            **shared,
            "backend": backend,
            "error": errors[backend],
            **_figures(timed, work, spreads),
        }
        for backend, timed in spreads.items()
    ]
    return points, [{**shared, "backend": backend, "reason": reason} for backend, reason in reasons.items()]


def _caller(stage: Stage, run: Run) -> Callable[[int], object]:
    return lambda turn: stage.call(run, turn)


class _Checker:
    """Holds what is right for two different plans; a contender must meet one, the other, and the first again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._tolerance = TOLERANCES[stage.x_TD.dtype]
        self._expected = [expected_output(stage.x_TD, plan, stage.banks[0]) for plan in stage.plans[:2]]

    def judge(self, backend: str, run: Run, errors: dict[str, float], reasons: dict[str, str]) -> None:
        """Note the worst error, and the reason where the contender is wrong or fails."""
        try:
            found = [
                relative_error(run(0, self._stage.x_TD, self._stage.plans[index]), self._expected[index])
                for index in (0, 1, 0)
            ]
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            reasons[backend] = f"failed: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}"
            return
        worst = max(found)
        errors[backend] = max(worst, errors.get(backend, 0.0))
        if worst > self._tolerance:
            reasons[backend] = f"wrong: relative error {worst:.2g}, allowed {self._tolerance:g}; not timed"


def _figures(timed: Spread, work: Work, spreads: Mapping[str, Spread]) -> dict[str, Any]:
    return {
        **timed.to_json(),
        "gb_per_s": work.num_bytes / timed.median_s / 1e9,
        "gmac_per_s": work.num_macs / timed.median_s / 1e9,
        "bytes": work.num_bytes,
        "macs": work.num_macs,
        "faster_than": {other: spreads[other].median_s / timed.median_s for other in RATIOS_TO if other in spreads},
    }


def _with_bounds(point: dict[str, Any], run: Peaks, best: Peaks) -> dict[str, Any]:
    """The point with its bounds: by what the machine gave during the run, and by the best that it gave before it."""
    work = Work(num_bytes=point["bytes"], num_macs=point["macs"])
    bounds = {"bound_ms": 1e3 * work.bound_s(run), "best_bound_ms": 1e3 * work.bound_s(best)}
    return {**point, **bounds, "share_of_bound": bounds["bound_ms"] / point["ms"]}


def _fits(points: Sequence[Mapping[str, Any]], cases: Mapping[str, Case], dtype: torch.dtype) -> list[dict[str, Any]]:
    """A line for each case and contender, over all its numbers of tokens and unique experts."""
    fits: list[dict[str, Any]] = []
    for case, backend in dict.fromkeys((point["case"], point["backend"]) for point in points):
        mine = [point for point in points if (point["case"], point["backend"]) == (case, backend)]
        fit = fit_latency(
            [point["unique"] for point in mine],
            [point["pairs"] for point in mine],
            [point["ms"] / 1e3 for point in mine],
        )
        if fit is not None:
            size = cases[case].config.num_expert_parameters
            told = fit.to_json(bytes_per_expert=size * dtype.itemsize, macs_per_pair=size)
            fits.append({"case": case, "backend": backend, "unique": [point["unique"] for point in mine], **told})
    return fits
