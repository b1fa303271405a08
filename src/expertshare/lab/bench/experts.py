"""`bench experts`: one layer's experts, by number of unique experts, all contenders on equal weights in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertshare.convert.rates import CACHE_FACTOR
from expertshare.lab.bench.cases import Case, Work, expert_work, fit_latency
from expertshare.lab.bench.contenders import Contender, Run
from expertshare.lab.bench.machine import Machine, Yardstick, dtype_name, yardstick_for
from expertshare.lab.bench.stage import (
    QUANTISED_TOLERANCE,
    TOLERANCES,
    ExpertsSettings,
    Stage,
    banks_of,
    expected_output,
    relative_error,
    stage_of,
)
from expertshare.lab.bench.timing import MOST_TURNS, first_line, spread, timed
from expertshare.lab.bench.weights import expert_bytes
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
    in between, "cases": points, "fits": lines through them, "left_out": which was not timed and why}.

    Raises InputError where the weights do not fit, or for a number of unique experts that cannot be routed.
    """
    absent = {name: entrant.absent(settings.device) for name, entrant in entrants.items()}
    present = {name: entrant for name, entrant in entrants.items() if absent[name] is None}
    left_out: list[Point] = [
        {"case": None, "unique": None, "backend": name, "reason": reason} for name, reason in absent.items() if reason
    ]
    points: list[Point] = []
    yardstick = yardstick_for(settings.dtype, machine.cache_bytes, settings.device)
    with torch.no_grad():
        for name, case in cases.items():
            on_progress(f"{name}: filling weights")
            banks = banks_of(case, machine, settings, present.values())
            runs: dict[str, Run] = {}
            for backend, entrant in present.items():
                try:  # an installed library need not fit this torch
                    runs[backend] = entrant.build(banks[entrant.quantisation], case)
                except (ImportError, OSError, RuntimeError, AttributeError) as error:
                    reason = f"cannot be set up: {first_line(error)}"
                    left_out.append({"case": name, "unique": None, "backend": backend, "reason": reason})
            layer = _Layer(name, case, banks, present, runs, yardstick, machine, settings)
            for tokens in settings.tokens or (case.tokens,):
                for unique in settings.unique or case.unique:
                    on_progress(f"{name}: {unique} unique experts, {tokens} tokens")
                    found, refused = layer.measure(tokens, unique)
                    points += found
                    left_out += refused
            del banks, runs, layer
    limits = yardstick.peaks() if points else machine.peaks(settings.dtype)
    fits = _fits(points, cases, present, settings.dtype)
    return {**limits.to_json(), "cases": points, "fits": fits, "left_out": left_out}


@dataclass(frozen=True, slots=True)
class _Layer:
    """One case's weights with every contender that could be set up over them."""

    name: str
    case: Case
    banks: Mapping[str | None, Sequence[Bank]]
    entrants: Mapping[str, Contender]
    runs: Mapping[str, Run]
    yardstick: Yardstick
    machine: Machine
    settings: ExpertsSettings

    def measure(self, tokens: int, unique: int) -> tuple[list[Point], list[Point]]:
        """A point for each contender that is right, and the reason for each other one."""
        settings, router = self.settings, self.case.config.router
        stage = stage_of(self.case, self.banks, settings, tokens, unique)
        expected = {
            form: [expected_output(stage.x_TD, plan, banks[0]) for plan in stage.plans[:2]]
            for form, banks in self.banks.items()
        }
        errors: dict[str, float] = {}
        reasons: dict[str, str] = {}

        def judge(runs: Mapping[str, Run]) -> dict[str, Run]:
            for backend, run in runs.items():
                form = self.entrants[backend].quantisation
                worst, reason = _judge(run, stage, form, expected[form])
                errors[backend] = max(worst, errors.get(backend, 0.0))
                if reason is not None:
                    reasons[backend] = reason
            return {backend: run for backend, run in runs.items() if backend not in reasons}

        right = judge(self.runs)
        seconds, captured = timed(
            self.yardstick.calls() | {backend: partial(stage.call, run) for backend, run in right.items()},
            settings.device,
            turns=min(MOST_TURNS, stage.num_calls),
            repeats=settings.repeats,
            warmup=settings.warmup,
            host_bound=[name for name, entrant in self.entrants.items() if entrant.host_bound],
        )
        right = judge(right)  # once more: some kernels remember the routing of earlier calls
        shared = {
            "case": self.name,
            "num_experts": router.num_experts,
            "tokens": tokens,
            "pairs": tokens * router.top_k,
            "unique": unique,
            "dtype": dtype_name(settings.dtype),
            "seed": settings.seed,
        }
        limits, best = self.yardstick.note(seconds), self.machine.peaks(settings.dtype)
        spreads = {backend: spread(seconds[backend]) for backend in right}
        points = []
        for backend, taken in spreads.items():
            entrant, ms = self.entrants[backend], taken["ms"]
            work = self._work(entrant, tokens, unique)
            # Bounds of codes are of bytes alone: how fast the machine multiplies small integers is not measured.
            bounded = work if entrant.quantisation is None else Work(num_bytes=work.num_bytes, num_macs=0)
            bound_ms = 1e3 * bounded.bound_s(limits)
            points.append(
                {
                    **shared,
                    "backend": backend,
                    "quantisation": entrant.quantisation,
                    **limits.to_json(),
                    **self._kept(entrant),
                    "error": errors[backend],
                    **({"captured": captured[backend]} if backend in captured else {}),
                    **taken,
                    "gb_per_s": work.num_bytes / ms / 1e6,
                    "gmac_per_s": work.num_macs / ms / 1e6,
                    "bytes": work.num_bytes,
                    "macs": work.num_macs,
                    "faster_than": {other: spreads[other]["ms"] / ms for other in RATIOS_TO if other in spreads},
                    "bound_ms": bound_ms,
                    "best_bound_ms": 1e3 * bounded.bound_s(best),
                    "share_of_bound": bound_ms / ms,
                }
            )
        return points, [{**shared, "backend": name, "reason": reason} for name, reason in reasons.items()]

    def _kept(self, entrant: Contender) -> Point:
        """Bytes of all layers that a contender walks through, and whether a cache could hold much of them."""
        one = expert_bytes(self.case.config, entrant.quantisation, self.settings.dtype)
        size = len(self.banks[None]) * self.case.config.router.num_experts * one
        return {"weights_bytes": size, "beyond_cache": size >= CACHE_FACTOR * self.machine.cache_bytes}

    def _work(self, entrant: Contender, tokens: int, unique: int) -> Work:
        config, dtype = self.case.config, self.settings.dtype
        return expert_work(
            tokens=tokens,
            top_k=config.router.top_k,
            unique=unique,
            hidden=config.hidden_size,
            inner=config.expert_hidden,
            itemsize=dtype.itemsize,
            expert_bytes=expert_bytes(config, entrant.quantisation, dtype),
        )


def _judge(run: Run, stage: Stage, form: str | None, expected: Sequence[Tensor]) -> tuple[float, str | None]:
    """The worst error over two different plans, one, the other, and the first again, which a contender must meet; the
    reason where it is wrong or fails. expected: what is right for both."""
    tolerance = TOLERANCES[stage.x_TD.dtype] if form is None else QUANTISED_TOLERANCE
    try:
        worst = max(relative_error(run(0, stage.x_TD, stage.plans[n]), expected[n]) for n in (0, 1, 0))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return 0.0, f"failed: {first_line(error)}"
    wrong = worst > tolerance
    return worst, f"wrong: relative error {worst:.2g}, allowed {tolerance:g}; not timed" if wrong else None


def _fits(
    points: Sequence[Point], cases: Mapping[str, Case], present: Mapping[str, Contender], dtype: torch.dtype
) -> list[Point]:
    """A line for each case and contender, over all its numbers of tokens and unique experts."""
    fits: list[Point] = []
    for name, backend in dict.fromkeys((point["case"], point["backend"]) for point in points):
        mine = [point for point in points if (point["case"], point["backend"]) == (name, backend)]
        unique = [point["unique"] for point in mine]
        fit = fit_latency(
            unique,
            [point["pairs"] for point in mine],
            [point["ms"] / 1e3 for point in mine],
            bytes_per_expert=expert_bytes(cases[name].config, present[backend].quantisation, dtype),
            macs_per_pair=cases[name].config.num_expert_parameters,
        )
        if fit is not None:
            fits.append({"case": name, "backend": backend, "unique": unique, **fit})
    return fits
