"""`expertshare eval --ray` writes what the local pool writes. Skipped without the extra `ray`; the checks need none."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from expertshare import api
from expertshare.decoding import DecodingOptions
from expertshare.errors import EvaluationError, InputError
from expertshare.evaluation.items import EvalItem
from expertshare.evaluation.run_directory import ITEMS, RUN, model_sha256
from expertshare.evaluation.workers import Job, RemoteSolver, Solved, SolverSetup, solve_with
from expertshare.measure.report import versions
from expertshare.routing import POLICIES

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
SETUP = SolverSetup(
    model=REFERENCE,
    dtype=torch.float32,
    policies=(POLICIES["vanilla"](),),
    options=DecodingOptions(gen_length=8),
    backend="auto",
    threads=1,
)
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")
ASKED = {"tasks": ["arith", "choice"], "policies": ["vanilla", "des-vote:budget=16"], "limit": 3, "gen_length": 32}


def job(prompt: str = "What is 7 plus 8?") -> Job:
    item = EvalItem(task="arith", id="0", prompt=prompt, content="x", gen_length=8, chat=True)
    return Job(item=item, policy=0)


def solver(**changes: object) -> RemoteSolver:
    sha256 = str(changes.pop("sha256", model_sha256(REFERENCE)))
    expected = changes.pop("expected", versions())
    return RemoteSolver(replace(SETUP, **changes), sha256, expected)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_an_actor_answers_and_its_errors_are_values() -> None:
    one = solver()
    assert isinstance(one.solve(job()), Solved)
    too_long = job(" ".join(["pens"] * 10_000))
    assert isinstance(one.solve(too_long), InputError)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0"}, "same model"),
        ({"model": Path("nowhere")}, "same model"),
        ({"expected": {**versions(), "torch": "1.0"}}, "expected torch 1.0 on every machine"),
    ],
)
def test_another_model_or_other_versions_are_refused(changes: dict[str, object], said: str) -> None:
    error = solver(**changes).solve(job())
    assert isinstance(error, EvaluationError)
    assert said in str(error)


class Fake:
    """Answers with its job's number; the second job takes longest."""

    def __init__(self, ended: list[object]) -> None:
        self.ended = ended

    def ask(self, job: Job) -> Solved:
        number = job.policy
        time.sleep(0.05 if number == 1 else 0)
        if number == 7:
            raise EvaluationError("seven")
        return Solved(
            answer=str(number), finish_reason=None, tokens=0, steps=0, forwards={}, blocks={}, unique_experts={}
        )

    def end(self) -> None:
        self.ended.append(self)


def test_answers_come_in_order_and_all_workers_end() -> None:
    ended: list[object] = []
    workers = [Fake(ended), Fake(ended)]
    jobs = [replace(job(), policy=number) for number in range(7)]
    assert [solved.answer for solved in solve_with(workers, jobs)] == list("0123456")
    assert len(ended) == 2
    with pytest.raises(EvaluationError, match="seven"):
        list(solve_with([Fake(ended)], [replace(job(), policy=7)]))
    assert len(ended) == 3


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_writes_what_the_local_pool_writes_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    local, remote = tmp_path / "local", tmp_path / "ray"
    api.evaluate(REFERENCE, out=local, processes=2, dtype="float32", **ASKED)  # type: ignore[arg-type]

    class Enough(Exception):
        """Stops an evaluation."""

    def stop(task: str, done: int, total: int) -> None:
        if task == "arith" and done == 2:
            raise Enough

    with pytest.raises(Enough):
        api.evaluate(REFERENCE, out=remote, ray=True, processes=2, dtype="float32", on_progress=stop, **ASKED)  # type: ignore[arg-type]
    assert len((remote / ITEMS).read_text().splitlines()) == 2
    notices: list[str] = []
    api.evaluate(
        REFERENCE,
        out=remote,
        ray=True,
        processes=2,
        dtype="float32",
        on_notice=notices.append,
        **ASKED,  # type: ignore[arg-type]
    )
    assert "2 of 12 answers" in notices[0]
    assert (remote / ITEMS).read_bytes() == (local / ITEMS).read_bytes()
    identities = [json.loads((path / RUN).read_text())["identity"] for path in (local, remote)]
    assert identities[0] == identities[1]


def an_actor_of_this_process() -> int:
    """Its id. Ray names actors by their class; they are children of its daemon, which is this process's child."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = (folder / "cmdline").read_bytes().startswith(b"ray::RemoteSolver")
            if named and os.getpid() == parent(parent(int(folder.name))):
                return int(folder.name)
        except FileNotFoundError:
            continue
    raise AssertionError("no actor runs")


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_actor_is_started_again_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = pytest.importorskip("ray")
    killed: list[int] = []

    def kill_one(task: str, done: int, total: int) -> None:
        if task == "arith" and done == 1 and not killed:
            killed.append(an_actor_of_this_process())
            os.kill(killed[0], signal.SIGKILL)

    api.evaluate(REFERENCE, out=tmp_path / "local", dtype="float32", **ASKED)  # type: ignore[arg-type]
    api.evaluate(
        REFERENCE,
        out=tmp_path / "ray",
        ray=True,
        processes=2,
        dtype="float32",
        on_progress=kill_one,
        **ASKED,  # type: ignore[arg-type]
    )
    assert killed
    assert (tmp_path / "ray" / ITEMS).read_bytes() == (tmp_path / "local" / ITEMS).read_bytes()
    assert not ray.is_initialized()
