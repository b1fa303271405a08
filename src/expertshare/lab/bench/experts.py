"""`bench experts`: one layer's experts, by number of unique experts, everybody on equal weights in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from expertshare.convert.rates import CACHE_FACTOR
from expertshare.lab.bench.bound import Work, expert_work
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.contenders import Contender, Run
from expertshare.lab.bench.fit import fit_latency
from expertshare.lab.bench.gpu import MOST_TURNS, GpuTimes, GpuYardstick, take_turns_on_gpu
from expertshare.lab.bench.machine import (
    MULTIPLY,
    READ,
    CpuYardstick,
    Machine,
    Peaks,
    Yardstick,
    dtype_name,
)
from expertshare.lab.bench.oracle import QUANTISED_TOLERANCE, TOLERANCES, expected_output, relative_error
from expertshare.lab.bench.stage import ExpertsSettings, Stage, banks_of, expert_bytes, stage_of
from expertshare.lab.bench.timing import Spread, interleave, spread
from expertshare.types import Bank

RATIOS_TO = ("cpu", "torch", "transformers-eager", "transformers-grouped-mm")
Listener = Callable[[str], None]


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
        reason = entrant.absent(settings.device)
        if reason is None:
            present[name] = entrant
        else:
            left_out.append({"case": None, "unique": None, "backend": name, "reason": reason})
    yardstick = _yardstick(machine, settings)
    with torch.no_grad():
        for name, case in cases.items():
            on_progress(f"{name}: filling weights")
            banks = banks_of(case, machine, settings, present.values())
            runs, broken = _built(present, banks, case)
            here = {backend: entrant for backend, entrant in present.items() if backend in runs}
            left_out += [{"case": name, "unique": None, "backend": b, "reason": r} for b, r in broken.items()]
            for tokens in settings.tokens or (case.tokens,):
                for unique in settings.unique or case.unique:
                    on_progress(f"{name}: {unique} unique experts, {tokens} tokens")
                    found, refused = _point(name, case, banks, here, runs, yardstick, machine, settings, tokens, unique)
                    points += found
                    left_out += refused
            del banks, runs
    best = machine.peaks(settings.dtype)
    limits = yardstick.peaks() if points else best
    return {
        "bandwidth_gb_per_s": limits.bytes_per_s / 1e9,
        "peak_gmac_per_s": limits.macs_per_s / 1e9,
        "cases": [_with_bounds(point, best) for point in points],
        "fits": _fits(points, cases, present, settings.dtype),
        "left_out": left_out,
    }


def _built(
    present: Mapping[str, Contender], banks: Mapping[str | None, Sequence[Bank]], case: Case
) -> tuple[dict[str, Run], dict[str, str]]:
    """Who is ready to run, and why the others are not: an installed library need not fit this torch."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for backend, entrant in present.items():
        try:
            runs[backend] = entrant.build(banks[entrant.quantisation], case)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reasons[backend] = f"cannot be set up: {_first_line(error)}"
    return runs, reasons


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def _yardstick(machine: Machine, settings: ExpertsSettings) -> Yardstick:
    size = 2 * CACHE_FACTOR * machine.cache_bytes
    if settings.device.type == "cuda":
        return GpuYardstick(settings.dtype, buffer_bytes=size, device=settings.device)
    return CpuYardstick(settings.dtype, buffer_bytes=size)


def _kept(
    case: Case,
    banks: Mapping[str | None, Sequence[Bank]],
    entrant: Contender,
    machine: Machine,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Bytes of all layers that a contender walks through, and whether a cache could hold much of them."""
    size = len(banks[None]) * case.config.router.num_experts * expert_bytes(case, entrant, dtype)
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
    stage = stage_of(case, banks, settings, tokens, unique)
    checker = _Checker(stage, present)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for backend, run in runs.items():
        checker.judge(backend, run, errors, reasons)
    right = {backend: run for backend, run in runs.items() if backend not in reasons}
    calls = {READ: yardstick.read, MULTIPLY: yardstick.multiply, **{b: _caller(stage, run) for b, run in right.items()}}
    seconds, captured = _timed(calls, stage, present, settings)
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
            expert_bytes=expert_bytes(case, entrant, settings.dtype),
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
    limits = yardstick.peaks_of(seconds[READ], seconds[MULTIPLY])
    spreads = {backend: spread(seconds[backend]) for backend in right if backend not in reasons}
    points = [
        {
            **shared,
            "backend": backend,
            "quantisation": present[backend].quantisation,
            "bandwidth_gb_per_s": limits.bytes_per_s / 1e9,
            "peak_gmac_per_s": limits.macs_per_s / 1e9,
            **_kept(case, banks, present[backend], machine, settings.dtype),
            "error": errors[backend],
            **({"captured": captured[backend]} if backend in captured else {}),
            **_figures(timed, work[backend], spreads),
        }
        for backend, timed in spreads.items()
    ]
    return points, [{**shared, "backend": backend, "reason": reason} for backend, reason in reasons.items()]


def _timed(
    calls: Mapping[str, Callable[[int], object]],
    stage: Stage,
    present: Mapping[str, Contender],
    settings: ExpertsSettings,
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Seconds of each call, and on a GPU whether the calls ran inside a graph."""
    if settings.device.type == "cpu":
        return interleave(calls, repeats=settings.repeats, warmup=settings.warmup), {}
    times: GpuTimes = take_turns_on_gpu(
        calls,
        turns=min(MOST_TURNS, stage.num_calls),
        repeats=settings.repeats,
        warmup=settings.warmup,
        host_bound=[name for name, entrant in present.items() if entrant.host_bound],
    )
    return times.seconds, times.captured


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
            reasons[backend] = f"failed: {_first_line(error)}"
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


def _with_bounds(point: dict[str, Any], best: Peaks) -> dict[str, Any]:
    """The point with its bounds: by what the machine gave between its own calls, and by the best that it gave before
    the run. Those of codes are of bytes alone: how fast the machine multiplies small integers is not measured."""
    run = Peaks(bytes_per_s=point["bandwidth_gb_per_s"] * 1e9, macs_per_s=point["peak_gmac_per_s"] * 1e9)
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
            told = fit.to_json(bytes_per_expert=expert_bytes(cases[case], present[backend], dtype), macs_per_pair=size)
            fits.append({"case": case, "backend": backend, "unique": [point["unique"] for point in mine], **told})
    return fits
