"""`bench experts`: one layer's experts, by number of unique experts, everybody on equal weights in one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertshare.bench.bound import Work, expert_work
from expertshare.bench.cases import Case
from expertshare.bench.contenders import Contender, Run
from expertshare.bench.fit import fit_latency
from expertshare.bench.machine import CACHE_FACTOR, Machine, Peaks, Yardstick, dtype_name
from expertshare.bench.oracle import QUANTISED_TOLERANCE, TOLERANCES, expected_output, relative_error
from expertshare.bench.plans import SKEW, rotation
from expertshare.bench.timing import Spread, interleave, spread
from expertshare.bench.weights import check_memory, quantised_expert_bytes, random_banks
from expertshare.kernels.quantise import quantise_bank, scheme_named
from expertshare.types import Bank, RoutingPlan

MAX_BANKS = 8
READ, MULTIPLY = "(read)", "(multiply)"
RATIOS_TO = ("cpu", "torch", "transformers-eager", "transformers-grouped-mm")
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
    """What all contenders of one point share: layers of weights (by quantisation, None: floats), tokens, and the plans
    that are walked through."""

    banks: Mapping[str | None, Sequence[Bank]]
    x_TD: Tensor
    plans: Sequence[RoutingPlan]

    def call(self, run: Run, turn: int) -> Tensor:
        """The `turn`-th call: layers first, then plans."""
        layers = len(self.banks[None])
        return run(turn % layers, self.x_TD, self.plans[turn // layers % len(self.plans)])


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
            banks = _banks(case, machine, settings, present.values())
            runs = {backend: e.build(banks[e.quantisation], case) for backend, e in present.items()}
            for tokens in settings.tokens or (case.tokens,):
                for unique in settings.unique or case.unique:
                    on_progress(f"{name}: {unique} unique experts, {tokens} tokens")
                    found, refused = _point(
                        name, case, banks, present, runs, yardstick, machine, settings, tokens, unique
                    )
                    points += found
                    left_out += refused
            del banks, runs
    best = machine.peaks(settings.dtype)
    limits = yardstick.peaks() if points else best
    return {
        "bandwidth_gb_per_s": limits.bytes_per_s / 1e9,
        "peak_gmac_per_s": limits.macs_per_s / 1e9,
        "cases": [_with_bounds(point, limits, best) for point in points],
        "fits": _fits(points, cases, present, settings.dtype),
        "left_out": left_out,
    }


def _banks(
    case: Case, machine: Machine, settings: ExpertsSettings, entrants: Collection[Contender]
) -> dict[str | None, Sequence[Bank]]:
    """Enough layers to exceed the cache CACHE_FACTOR times, as far as memory and MAX_BANKS allow: floats under None,
    and the same quantised for whoever takes part with codes. All forms together stay within the limit."""
    config = case.config
    floats = config.router.num_experts * config.num_expert_parameters * settings.dtype.itemsize
    forms = sorted({e.quantisation for e in entrants if e.quantisation is not None})
    codes = sum(config.router.num_experts * quantised_expert_bytes(config, form) for form in forms)
    one = (2 if any(e.copies_weights for e in entrants) else 1) * floats + codes
    check_memory(one, settings.memory_bytes, "one layer of this case", "measure a smaller --experts")
    wanted = -(-CACHE_FACTOR * machine.cache_bytes // floats)
    banks = random_banks(
        count=max(1, min(wanted, MAX_BANKS, settings.memory_bytes // one)),
        num_experts=config.router.num_experts,
        hidden=config.hidden_size,
        inner=config.expert_hidden,
        dtype=settings.dtype,
        seed=settings.seed,
    )
    return {None: banks, **{form: [quantise_bank(bank, scheme_named(form)) for bank in banks] for form in forms}}


def _expert_bytes(case: Case, entrant: Contender, dtype: torch.dtype) -> int:
    if entrant.quantisation is None:
        return case.config.num_expert_parameters * dtype.itemsize
    return quantised_expert_bytes(case.config, entrant.quantisation)


def _kept(
    case: Case,
    banks: Mapping[str | None, Sequence[Bank]],
    entrant: Contender,
    machine: Machine,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Bytes of all layers that a contender walks through, and whether a cache could hold much of them."""
    size = len(banks[None]) * case.config.router.num_experts * _expert_bytes(case, entrant, dtype)
    return {"weights_bytes": size, "beyond_cache": size >= CACHE_FACTOR * machine.cache_bytes}


def _point(
    name: str,
    case: Case,
    banks: Mapping[str | None, Sequence[Bank]],
    present: Mapping[str, Contender],
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
    checker = _Checker(stage, present)
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
    work = {
        backend: expert_work(
            tokens=tokens,
            top_k=router.top_k,
            unique=unique,
            hidden=hidden,
            inner=case.config.expert_hidden,
            itemsize=settings.dtype.itemsize,
            expert_bytes=_expert_bytes(case, entrant, settings.dtype),
        )
        for backend, entrant in present.items()
    }
    shared = {
        "case": name,
        "num_experts": router.num_experts,
        "tokens": tokens,
        "pairs": tokens * router.top_k,
        "unique": unique,
        "dtype": dtype_name(settings.dtype),
        "seed": settings.seed,
    }
    yardstick.note(seconds[READ], seconds[MULTIPLY])
    spreads = {backend: spread(seconds[backend]) for backend in right if backend not in reasons}
    points = [
        {
            **shared,
            "backend": backend,
            "quantisation": present[backend].quantisation,
            **_kept(case, banks, present[backend], machine, settings.dtype),
            "error": errors[backend],
            **_figures(timed, work[backend], spreads),
        }
        for backend, timed in spreads.items()
    ]
    return points, [{**shared, "backend": backend, "reason": reason} for backend, reason in reasons.items()]


def _caller(stage: Stage, run: Run) -> Callable[[int], object]:
    return lambda turn: stage.call(run, turn)


class _Checker:
    """Holds what is right for two different plans; a contender must meet one, the other, and the first again."""

    def __init__(self, stage: Stage, entrants: Mapping[str, Contender]) -> None:
        self._stage, self._entrants = stage, entrants
        self._expected = {
            form: [expected_output(stage.x_TD, plan, banks[0]) for plan in stage.plans[:2]]
            for form, banks in stage.banks.items()
        }

    def judge(self, backend: str, run: Run, errors: dict[str, float], reasons: dict[str, str]) -> None:
        """Note the worst error, and the reason where the contender is wrong or fails."""
        form = self._entrants[backend].quantisation
        tolerance = TOLERANCES[self._stage.x_TD.dtype] if form is None else QUANTISED_TOLERANCE
        try:
            found = [
                relative_error(run(0, self._stage.x_TD, self._stage.plans[index]), self._expected[form][index])
                for index in (0, 1, 0)
            ]
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            reasons[backend] = f"failed: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}"
            return
        worst = max(found)
        errors[backend] = max(worst, errors.get(backend, 0.0))
        if worst > tolerance:
            reasons[backend] = f"wrong: relative error {worst:.2g}, allowed {tolerance:g}; not timed"


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
    """The point with its bounds: by what the machine gave during the run, and by the best that it gave before it. Those
    of codes are of bytes alone: how fast the machine multiplies small integers is not measured."""
    work = Work(num_bytes=point["bytes"], num_macs=point["macs"] if point["quantisation"] is None else 0)
    bounds = {"bound_ms": 1e3 * work.bound_s(run), "best_bound_ms": 1e3 * work.bound_s(best)}
    return {**point, **bounds, "share_of_bound": bounds["bound_ms"] / point["ms"]}


def _fits(
    points: Sequence[Mapping[str, Any]],
    cases: Mapping[str, Case],
    present: Mapping[str, Contender],
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
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
            told = fit.to_json(
                bytes_per_expert=_expert_bytes(cases[case], present[backend], dtype), macs_per_pair=size
            )
            fits.append({"case": case, "backend": backend, "unique": [point["unique"] for point in mine], **told})
    return fits
