"""The unit of work: what an answer depends on, and what it does not; processes that die."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expertshare.decoding import DecodingOptions
from expertshare.errors import EvaluationError, InputError
from expertshare.evaluation import workers
from expertshare.evaluation.evaluating import bind_policies
from expertshare.evaluation.items import EvalItem
from expertshare.evaluation.run_directory import model_sha256
from expertshare.evaluation.workers import (
    Job,
    Solver,
    SolverSetup,
    item_seed,
    options_for,
    solve_here,
    solve_in_processes,
)
from expertshare.models import LoadedModel
from expertshare.routing import parse_policy


def item(number: int, gen_length: int = 8) -> EvalItem:
    return EvalItem(task="t", id=str(number), prompt="Solve 3x.", chat=False, gen_length=gen_length, content="")


def solver(loaded: LoadedModel, **options: float) -> Solver:
    policies = bind_policies([parse_policy("vanilla"), parse_policy("des-seq")], loaded)
    setup = SolverSetup(
        model=Path("none"), dtype=None, policies=policies, options=DecodingOptions(**options), backend="auto", threads=1
    )  # type: ignore[arg-type]
    return Solver(loaded=loaded, setup=setup)


def test_vanilla_comes_first_and_once(loaded: LoadedModel) -> None:
    asked = [parse_policy("des-seq"), parse_policy("vanilla"), parse_policy("des-seq")]
    assert [policy.name for policy in bind_policies(asked, loaded)] == ["vanilla", "des-seq"]


def test_sampled_answers_do_not_depend_on_what_else_is_asked(loaded: LoadedModel) -> None:
    sampling = solver(loaded, temperature=1.0)
    jobs = [Job(item=item(number), policy=number % 2) for number in range(4)]
    together = list(solve_here(sampling, jobs))
    assert [next(solve_here(sampling, [job])) for job in reversed(jobs)] == together[::-1]
    assert len({solved.answer for solved in together}) > 1


def test_a_seed_belongs_to_item_and_evaluation() -> None:
    assert item_seed(0, item(1)) == item_seed(0, item(1))
    assert len({item_seed(seed, item(number)) for seed in range(3) for number in range(3)}) == 9
    assert all(0 <= item_seed(seed, item(0)) < 2**63 for seed in range(100))


def test_lengths_are_whole_blocks_where_the_model_needs_that(loaded: LoadedModel) -> None:
    full = replace(loaded.config, attention="full")
    assert options_for(item(0, gen_length=9), DecodingOptions(), full).gen_length == 16
    assert options_for(item(0, gen_length=9), DecodingOptions(), loaded.config).gen_length == 9


def test_costs_are_by_kind_of_forward(loaded: LoadedModel) -> None:
    solved = solver(loaded).solve(Job(item=item(0, gen_length=24), policy=0))
    assert solved.forwards["denoise"] == solved.steps == solved.blocks["denoise"]
    assert 4 <= solved.unique_experts["denoise"] <= 16
    assert solved.tokens <= 24


def test_a_prompt_that_does_not_fit_is_named(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"task t, item 3: .*positions"):
        solver(loaded).check(item(3, gen_length=10_000))


def test_a_process_that_dies_or_cannot_load_is_an_error(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(item=item(0), policy=0)]
    with pytest.raises(InputError, match="no directory 'none'"):
        list(solve_in_processes(solver(loaded).setup, jobs, 1))
    monkeypatch.setattr(workers, "PROGRAM", "")  # does nothing
    with pytest.raises(EvaluationError, match="finished items are kept"):
        list(solve_in_processes(solver(loaded).setup, jobs, 1))


def test_a_models_hash_is_of_what_decides_its_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = model_sha256(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert model_sha256(tmp_path) == first
    (tmp_path / "config.json").write_text("{ }")
    assert model_sha256(tmp_path) != first
