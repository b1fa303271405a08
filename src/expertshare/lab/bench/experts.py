"""`bench experts`: one layer's experts, by number of unique experts, everybody on equal weights in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from expertshare.convert.rates import CACHE_FACTOR
from expertshare.lab.bench.bound import Work, expert_work, fit_latency
from expertshare.lab.bench.cases import Case
from expertshare.lab.bench.contenders import Contender, Run
from expertshare.lab.bench.gpu import MOST_TURNS, GpuYardstick, timed
from expertshare.lab.bench.machine import MULTIPLY, READ, CpuYardstick, Machine, Peaks, Yardstick, dtype_name
from expertshare.lab.bench.stage import (
    QUANTISED_TOLERANCE,
    TOLERANCES,
    ExpertsSettings,
    Stage,
    banks_of,
    expected_output,
    expert_bytes,
    relative_error,
    stage_of,
)
from expertshare.lab.bench.timing import Spread, spread
from expertshare.types import Bank

RATIOS_TO = ("cpu", "torch-loop", "transformers-eager", "transformers-grouped-mm")
Listener = Callable[[str], None]
Point = dict[str, Any]


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
    absent = {name: entrant.absent(settings.device) for name, entrant in entrants.items()}
    present = {name: entrant for name, entrant in entrants.items() if absent[name] is None}
    left_out: list[Point] = [
        {"case": None, "unique": None, "backend": name, "reason": reason} for name, reason in absent.items() if reason
    ]
    points: list[Point] = []
    yardstick = _yardstick(machine, settings)
    with torch.no_grad():
        for name, case in cases.items():
            on_progress(f"{name}: filling weights")
            banks = banks_of(case, machine, settings, present.values())
            layer = _Layer(name, case, banks, present, yardstick, machine, settings)
            left_out += [{"case": name, "unique": None, "backend": b, "reason": r} for b, r in layer.broken.items()]
            for tokens in settings.tokens or (case.tokens,):
                for unique in settings.unique or case.unique:
                    on_progress(f"{name}: {unique} unique experts, {tokens} tokens")
                    found, refused = layer.measure(tokens, unique)
                    points += found
                    left_out += refused
            del banks, layer
    best = machine.peaks(settings.dtype)
    limits = yardstick.peaks() if points else best
    return {
        "bandwidth_gb_per_s": limits.bytes_per_s / 1e9,
        "peak_gmac_per_s": limits.macs_per_s / 1e9,
        "cases": [_with_bounds(point, best) for point in points],
        "fits": _fits(points, cases, present, settings.dtype),
        "left_out": left_out,
    }


def _yardstick(machine: Machine, settings: ExpertsSettings) -> Yardstick:
    size = 2 * CACHE_FACTOR * machine.cache_bytes
    if settings.device.type == "cuda":
        return GpuYardstick(settings.dtype, buffer_bytes=size, device=settings.device)
    return CpuYardstick(settings.dtype, buffer_bytes=size)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


class _Layer:
    """One case's weights with every contender that can be set up over them. broken: why the others cannot, as an
    installed library need not fit this torch."""

    def __init__(
        self,
        name: str,
        case: Case,
        banks: Mapping[str | None, Sequence[Bank]],
        present: Mapping[str, Contender],
        yardstick: Yardstick,
        machine: Machine,
        settings: ExpertsSettings,
    ) -> None:
        self._name, self._case, self._banks, self._entrants = name, case, banks, present
        self._yardstick, self._machine, self._settings = yardstick, machine, settings
        self._runs: dict[str, Run] = {}
        self.broken: dict[str, str] = {}
        for backend, entrant in present.items():
            try:
                self._runs[backend] = entrant.build(banks[entrant.quantisation], case)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                self.broken[backend] = f"cannot be set up: {_first_line(error)}"

    def measure(self, tokens: int, unique: int) -> tuple[list[Point], list[Point]]:
        """A point for each contender that is right, and the reason for each other one."""
        settings, yardstick = self._settings, self._yardstick
        stage = stage_of(self._case, self._banks, settings, tokens, unique)
        checker = _Checker(stage, self._entrants)
        for backend, run in self._runs.items():
            checker.judge(backend, run)
        right = {backend: run for backend, run in self._runs.items() if backend not in checker.reasons}
        calls: dict[str, Callable[[int], object]] = {READ: yardstick.read, MULTIPLY: yardstick.multiply}
        seconds, captured = timed(
            calls | {backend: partial(stage.call, run) for backend, run in right.items()},
            settings.device,
            turns=min(MOST_TURNS, stage.num_calls),
            repeats=settings.repeats,
            warmup=settings.warmup,
            host_bound=[name for name, entrant in self._entrants.items() if entrant.host_bound],
        )
        for backend, run in right.items():  # once more: some kernels remember the routing of earlier calls
            checker.judge(backend, run)
        router = self._case.config.router
        shared = {
            "case": self._name,
            "num_experts": router.num_experts,
            "tokens": tokens,
            "pairs": tokens * router.top_k,
            "unique": unique,
            "dtype": dtype_name(settings.dtype),
            "seed": settings.seed,
        }
        yardstick.note(seconds[READ], seconds[MULTIPLY])
        limits = yardstick.peaks_of(seconds[READ], seconds[MULTIPLY])
        spreads = {backend: spread(seconds[backend]) for backend in right if backend not in checker.reasons}
        points = [
            {
                **shared,
                "backend": backend,
                "quantisation": self._entrants[backend].quantisation,
                "bandwidth_gb_per_s": limits.bytes_per_s / 1e9,
                "peak_gmac_per_s": limits.macs_per_s / 1e9,
                **self._kept(backend),
                "error": checker.errors[backend],
                **({"captured": captured[backend]} if backend in captured else {}),
                **_figures(taken, self._work(backend, tokens, unique), spreads),
            }
            for backend, taken in spreads.items()
        ]
        return points, [{**shared, "backend": name, "reason": reason} for name, reason in checker.reasons.items()]

    def _kept(self, backend: str) -> Point:
        """Bytes of all layers that a contender walks through, and whether a cache could hold much of them."""
        one = expert_bytes(self._case, self._entrants[backend], self._settings.dtype)
        size = len(self._banks[None]) * self._case.config.router.num_experts * one
        return {"weights_bytes": size, "beyond_cache": size >= CACHE_FACTOR * self._machine.cache_bytes}

    def _work(self, backend: str, tokens: int, unique: int) -> Work:
        config, dtype = self._case.config, self._settings.dtype
        return expert_work(
            tokens=tokens,
            top_k=config.router.top_k,
            unique=unique,
            hidden=config.hidden_size,
            inner=config.expert_hidden,
            itemsize=dtype.itemsize,
            expert_bytes=expert_bytes(self._case, self._entrants[backend], dtype),
        )


class _Checker:
    """Holds what is right for two different plans; a contender must meet one, the other, and the first again.

    errors: the worst of each contender. reasons: why some are wrong or fail."""

    def __init__(self, stage: Stage, entrants: Mapping[str, Contender]) -> None:
        self._stage, self._entrants = stage, entrants
        self.errors: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self._expected = {
            form: [expected_output(stage.x_TD, plan, banks[0]) for plan in stage.plans[:2]]
            for form, banks in stage.banks.items()
        }

    def judge(self, backend: str, run: Run) -> None:
        """Note the worst error, and the reason where the contender is wrong or fails."""
        form, x_TD, plans = self._entrants[backend].quantisation, self._stage.x_TD, self._stage.plans
        tolerance = TOLERANCES[x_TD.dtype] if form is None else QUANTISED_TOLERANCE
        try:
            worst = max(relative_error(run(0, x_TD, plans[index]), self._expected[form][index]) for index in (0, 1, 0))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            self.reasons[backend] = f"failed: {_first_line(error)}"
            return
        self.errors[backend] = max(worst, self.errors.get(backend, 0.0))
        if worst > tolerance:
            self.reasons[backend] = f"wrong: relative error {worst:.2g}, allowed {tolerance:g}; not timed"


def _figures(taken: Spread, work: Work, spreads: Mapping[str, Spread]) -> Point:
    return {
        **taken.to_json(),
        "gb_per_s": work.num_bytes / taken.median_s / 1e9,
        "gmac_per_s": work.num_macs / taken.median_s / 1e9,
        "bytes": work.num_bytes,
        "macs": work.num_macs,
        "faster_than": {other: spreads[other].median_s / taken.median_s for other in RATIOS_TO if other in spreads},
    }


def _with_bounds(point: Point, best: Peaks) -> Point:
    """The point with its bounds: by what the machine gave between its own calls, and by the best that it gave before
    the run. Those of codes are of bytes alone: how fast the machine multiplies small integers is not measured."""
    run = Peaks(bytes_per_s=point["bandwidth_gb_per_s"] * 1e9, macs_per_s=point["peak_gmac_per_s"] * 1e9)
    work = Work(num_bytes=point["bytes"], num_macs=point["macs"] if point["quantisation"] is None else 0)
    bounds = {"bound_ms": 1e3 * work.bound_s(run), "best_bound_ms": 1e3 * work.bound_s(best)}
    return {**point, **bounds, "share_of_bound": bounds["bound_ms"] / point["ms"]}


def _fits(
    points: Sequence[Point], cases: Mapping[str, Case], present: Mapping[str, Contender], dtype: torch.dtype
) -> list[Point]:
    """A line for each case and contender, over all its numbers of tokens and unique experts."""
    fits: list[Point] = []
    for name, backend in dict.fromkeys((point["case"], point["backend"]) for point in points):
        mine = [point for point in points if (point["case"], point["backend"]) == (name, backend)]
        unique = [point["unique"] for point in mine]
        fit = fit_latency(unique, [point["pairs"] for point in mine], [point["ms"] / 1e3 for point in mine])
        if fit is not None:
            size = expert_bytes(cases[name], present[backend], dtype)
            told = fit.to_json(bytes_per_expert=size, macs_per_pair=cases[name].config.num_expert_parameters)
            fits.append({"case": name, "backend": backend, "unique": unique, **told})
    return fits
