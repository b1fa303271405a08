"""Only right results are timed, on equal weights; figures follow from time, bytes and products."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from expertshare.errors import ConfigError, InputError
from expertshare.kernels.quantise import QUANTISATIONS, quantise_bank
from expertshare.lab.bench.cases import CASES, Case, find_case
from expertshare.lab.bench.contenders import CONTENDERS, Contender, Run, contenders
from expertshare.lab.bench.experts import bench_experts
from expertshare.lab.bench.machine import CPU, Machine
from expertshare.lab.bench.stage import (
    QUANTISED_TOLERANCE,
    TOLERANCES,
    ExpertsSettings,
    expected_output,
    relative_error,
    rotation,
)
from expertshare.lab.bench.weights import random_banks
from expertshare.native import available
from expertshare.types import ExpertBank, RoutingPlan

SETTINGS = ExpertsSettings(unique=(5, 9, 14), repeats=2, warmup=1, memory_bytes=10**8)
TINY = {"tiny": find_case("tiny")}


def _bank(dtype: torch.dtype) -> ExpertBank:
    return random_banks(count=1, num_experts=32, hidden=64, inner=32, dtype=dtype, seed=7)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CONTENDERS if CONTENDERS[name].absent(CPU) is None])
def test_every_contender_that_is_here_is_right(name: str, dtype: torch.dtype) -> None:
    form = CONTENDERS[name].quantisation
    bank = _bank(dtype) if form is None else quantise_bank(_bank(dtype), QUANTISATIONS[form])
    run = CONTENDERS[name].build([bank], find_case("tiny"))
    x_TD = torch.randn(8, 64).to(dtype)
    with torch.no_grad():
        for plan in rotation(32, 8, 4, 9, count=3, seed=1):
            error = relative_error(run(0, x_TD, plan), expected_output(x_TD, plan, bank))
            assert error <= (TOLERANCES[dtype] if form is None else QUANTISED_TOLERANCE)


def test_oracle_is_the_formula() -> None:
    bank, plan = _bank(torch.float32), rotation(32, 3, 4, 6, count=1, seed=2)[0]
    x_TD = torch.randn(3, 64)
    for token in range(3):
        expected_D = torch.zeros(64, dtype=torch.float64)
        for expert, weight in zip(plan.expert_ids_TK[token].tolist(), plan.weights_TK[token].tolist(), strict=True):
            gate, up = (bank.gate_up_EHD[expert].double() @ x_TD[token].double()).chunk(2)
            expected_D += weight * (bank.down_EDF[expert].double() @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(expected_output(x_TD, plan, bank)[token].double(), expected_D, rtol=1e-4, atol=1e-5)


def test_one_wrong_expert_of_one_token_is_seen() -> None:
    bank, plan = _bank(torch.bfloat16), rotation(32, 8, 4, 9, count=1, seed=3)[0]
    x_TD = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected_TD = expected_output(x_TD, plan, bank)
    ids_TK = plan.expert_ids_TK.clone()
    slot = int(plan.weights_TK[5].argmin())  # even the one that counts least
    ids_TK[5, slot] = (ids_TK[5, slot] + 1) % 32
    wrong = RoutingPlan(ids_TK, plan.weights_TK, torch.ones(32, dtype=torch.bool))
    assert relative_error(expected_output(x_TD, wrong, bank), expected_TD) > QUANTISED_TOLERANCE


def test_values_that_are_not_finite_and_wrong_shapes_are_infinitely_wrong() -> None:
    right = torch.ones(2, 3)
    assert relative_error(torch.full((2, 3), torch.nan), right) == float("inf")
    assert relative_error(torch.ones(3, 3), right) == float("inf")


def test_figures_follow_from_time_and_work(machine: Machine) -> None:
    found = bench_experts(TINY, contenders(["torch-loop", "torch"]), machine, SETTINGS)
    assert [(point["unique"], point["backend"]) for point in found["cases"]] == [
        (unique, backend) for unique in (5, 9, 14) for backend in ("torch-loop", "torch")
    ]
    for point in found["cases"]:
        seconds = point["ms"] / 1e3
        num_bytes = point["unique"] * 3 * 64 * 32 * 2 + 2 * 8 * 64 * 2
        assert point["gb_per_s"] == pytest.approx(num_bytes / seconds / 1e9)
        assert point["gmac_per_s"] == pytest.approx(8 * 4 * 3 * 64 * 32 / seconds / 1e9)
        macs = 8 * 4 * 3 * 64 * 32
        bound_s = max(num_bytes / point["bandwidth_gb_per_s"], macs / point["peak_gmac_per_s"]) / 1e9
        assert point["share_of_bound"] == pytest.approx(bound_s / seconds)
        assert point["best_bound_ms"] == pytest.approx(1e3 * max(num_bytes / 2e9, macs / 4e9))
        assert point["faster_than"].keys() == {"torch-loop"}
        assert point["beyond_cache"]
    for limit in ("bandwidth_gb_per_s", "peak_gmac_per_s"):  # of each point, and over all of them
        by_unique = {unique: {p[limit] for p in found["cases"] if p["unique"] == unique} for unique in (5, 9, 14)}
        assert all(len(values) == 1 for values in by_unique.values())
        own = [value for values in by_unique.values() for value in values]
        assert min(own) <= found[limit] <= max(own)
    assert [(fit["backend"], len(fit["residuals_ms"])) for fit in found["fits"]] == [("torch-loop", 3), ("torch", 3)]
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(not available(), reason="no native kernel")
def test_quantised_contenders_are_judged_by_their_own_weights_and_bytes(machine: Machine) -> None:
    """4 bits are 15 % off the floats: only against what the codes stand for can an error of a few percent be told."""
    names = ["cpu", "cpu-int8", "cpu-int4"]
    found = bench_experts(TINY, contenders(names), machine, ExpertsSettings(unique=(9,), repeats=2, memory_bytes=10**8))
    assert [point["backend"] for point in found["cases"]] == names
    rows = 2 * 32 + 64  # of gate, up and down; 3 * 64 * 32 weights
    sizes = {"cpu": 3 * 64 * 32 * 2, "cpu-int8": 3 * 64 * 32 + 4 * rows, "cpu-int4": 3 * 64 * 32 * 9 // 16}
    for point in found["cases"]:
        assert point["error"] < QUANTISED_TOLERANCE
        assert point["bytes"] == 9 * sizes[point["backend"]] + 2 * 8 * 64 * 2
        assert point["weights_bytes"] % (32 * sizes[point["backend"]]) == 0
        assert point["faster_than"].keys() == {"cpu"}
        if point["backend"] != "cpu":
            bound_ms = point["bytes"] / point["bandwidth_gb_per_s"] / 1e6
            assert point["bound_ms"] == pytest.approx(bound_ms)


@pytest.mark.skipif(not available(), reason="no native kernel")
def test_codes_count_as_memory(machine: Machine) -> None:
    floats = 32 * 3 * 64 * 32 * 2
    settings = ExpertsSettings(unique=(9,), repeats=1, memory_bytes=floats + 1000)
    bench_experts(TINY, contenders(["cpu"]), machine, settings)
    with pytest.raises(InputError, match="needs"):
        bench_experts(TINY, contenders(["cpu", "cpu-int8"]), machine, settings)


def _entrant(build: Callable[[Sequence[ExpertBank], Case], Run]) -> Contender:
    return Contender(build=build)


def test_wrong_forgetful_failing_and_missing_contenders_are_named_not_timed(machine: Machine) -> None:
    right = CONTENDERS["torch"].build

    def halved(banks: Sequence[ExpertBank], case: Case) -> Run:
        run = right(banks, case)
        return lambda layer, x_TD, plan: run(layer, x_TD, plan) / 2

    def stale(banks: Sequence[ExpertBank], case: Case) -> Run:
        run, first = right(banks, case), []

        def remember(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
            first.append(plan)
            return run(layer, x_TD, first[0])

        return remember

    def broken(banks: Sequence[ExpertBank], case: Case) -> Run:
        def fail(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
            raise RuntimeError("no such instruction\nmore of it")

        return fail

    def unfit(banks: Sequence[ExpertBank], case: Case) -> Run:
        raise ImportError("undefined symbol")

    entrants = {
        "torch": CONTENDERS["torch"],
        "unfit": _entrant(unfit),
        "halved": _entrant(halved),
        "stale": _entrant(stale),
        "broken": _entrant(broken),
        "absent": Contender(build=halved, missing=lambda: "not installed"),
    }
    found = bench_experts(TINY, entrants, machine, ExpertsSettings(unique=(9,), repeats=1, memory_bytes=10**8))
    assert [point["backend"] for point in found["cases"]] == ["torch"]
    reasons = {entry["backend"]: entry["reason"] for entry in found["left_out"]}
    assert reasons.keys() == {"unfit", "halved", "stale", "broken", "absent"}
    assert reasons["unfit"] == "cannot be set up: undefined symbol"
    assert reasons["halved"].startswith("wrong: relative error 0.5")
    assert reasons["stale"].startswith("wrong")
    assert reasons["broken"] == "failed: no such instruction"
    assert reasons["absent"] == "not installed"


def test_a_contender_that_turns_wrong_while_it_is_timed_is_not_reported(machine: Machine) -> None:
    def tiring(banks: Sequence[ExpertBank], case: Case) -> Run:
        run, calls = CONTENDERS["torch"].build(banks, case), []

        def tire(layer: int, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
            calls.append(layer)
            return run(layer, x_TD, plan) * (1.0 if len(calls) <= 4 else 0.0)

        return tire

    settings = ExpertsSettings(unique=(9,), repeats=2, memory_bytes=10**8)
    found = bench_experts(TINY, {"tiring": _entrant(tiring)}, machine, settings)
    assert found["cases"] == []
    assert found["left_out"][0]["reason"].startswith("wrong")


def test_weights_that_do_not_fit_are_refused(machine: Machine) -> None:
    with pytest.raises(InputError, match=r"needs 0\.0 GB.*raise --memory"):
        bench_experts(TINY, contenders(["torch"]), machine, ExpertsSettings(memory_bytes=1000))


def test_all_cases_can_route_what_they_list() -> None:
    for case in CASES.values():
        router = case.config.router
        assert all(router.top_k <= unique <= router.num_experts for unique in case.unique)
        assert max(case.unique) <= case.tokens * router.top_k


def test_expert_sizes_are_those_of_the_models() -> None:
    sizes = {name: CASES[name].config.num_expert_parameters * 2 for name in ("llada2.0-mini", "llada2.0-flash")}
    assert sizes == {"llada2.0-mini": 3 * 2048 * 512 * 2, "llada2.0-flash": 3 * 4096 * 1024 * 2}
    assert find_case("llada2.0-mini").with_experts(512).config.router.num_experts == 512
    with pytest.raises(ConfigError, match="groups must divide"):
        find_case("llada2.0-mini").with_experts(100)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'llada2\.0-mini'"):
        find_case("llada2-mini")
    with pytest.raises(ConfigError, match="Did you mean 'zentorch'"):
        contenders(["zentorh"])
