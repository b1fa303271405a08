"""Jobs answered by actors of Ray, on this machine or several; the answers are those of the local pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from expertshare.errors import EvaluationError, ExpertShareError
from expertshare.evaluation.model_files import model_sha256
from expertshare.evaluation.pool import solve_with
from expertshare.evaluation.solving import Job, Solved, Solver, SolverSetup
from expertshare.measure.environment import versions
from expertshare.ray_connection import connected

RESTARTS = 3
"""How often an actor whose process or machine has died is started again, before the evaluation is given up."""


def solve_on_ray(
    setup: SolverSetup, jobs: Iterable[Job], processes: int, *, sha256: str, address: str | None = None
) -> Iterator[Solved]:
    """Answer in `processes` actors. address: as `connected` takes it.

    sha256: of the model, as model_sha256 says it; every actor must find the same one at the same path. Raises
    what a job raised there, ConfigError, and EvaluationError for an actor that keeps dying or has another model or
    other versions.
    """
    with connected(address, cpus=processes * setup.threads):
        import ray

        actor = ray.remote(num_cpus=setup.threads, max_restarts=RESTARTS, max_task_retries=RESTARTS, max_concurrency=1)(
            RemoteSolver
        )
        yield from solve_with([_Actor(actor.remote(setup, sha256, versions())) for _ in range(processes)], jobs)


class RemoteSolver:
    """What runs in an actor. Its errors are values: Ray would wrap what is raised."""

    def __init__(self, setup: SolverSetup, sha256: str, expected: Mapping[str, str]) -> None:
        torch.set_num_threads(setup.threads)
        self._setup, self._wanted = setup, (sha256, expected)
        self._solver: Solver | None = None

    def solve(self, job: Job) -> Solved | ExpertShareError:
        """One answer, or why there is none; the model is loaded for the first one."""
        try:
            if self._solver is None:
                self._check()
                self._solver = Solver.load(self._setup)
            return self._solver.solve(job)
        except ExpertShareError as error:
            return error

    def _check(self) -> None:
        sha256, wanted = self._wanted
        path = self._setup.model
        if not path.is_dir() or model_sha256(path) != sha256:
            raise EvaluationError(
                f"expected the same model in {path} on every machine, but on one it is another or missing: copy it "
                "there, or put it where all see it"
            )
        here = versions()
        differing = sorted(name for name in {*here, *wanted} if here.get(name) != wanted.get(name))
        if differing:
            name = differing[0]
            raise EvaluationError(
                f"expected {name} {wanted.get(name)} on every machine, but on one it is {here.get(name)}: install the "
                "same versions everywhere"
            )


class _Actor:
    """The conversation with an actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def ask(self, job: Job) -> Solved:
        """Send one job and wait for its answer."""
        import ray
        from ray.exceptions import RayActorError

        try:
            reply = ray.get(self._handle.solve.remote(job))
        except RayActorError as error:
            raise EvaluationError(
                f"expected an answer from an actor of Ray, but it died {RESTARTS + 1} times or was ended: out of "
                "memory? Run the same command again, with fewer --processes; finished items are kept"
            ) from error
        if isinstance(reply, ExpertShareError):
            raise reply
        assert isinstance(reply, Solved)
        return reply

    def end(self) -> None:
        """Stop the actor, whatever it is doing."""
        import ray

        ray.kill(self._handle)
