"""Several processes that answer jobs; answers come back in the order of the jobs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

import expertshare
from expertshare.errors import EvaluationError, ExpertShareError
from expertshare.evaluation.solving import Job, Solved, Solver, SolverSetup

WORKER = "expertshare.evaluation.worker"
AHEAD = 4
"""Jobs under way per process: enough that none idles while answers wait for an earlier one."""


def solve_here(solver: Solver, jobs: Iterable[Job]) -> Iterator[Solved]:
    """Answer in this process, with as many threads as another process would use."""
    for job in jobs:
        with _threads(solver.setup.threads):
            solved = solver.solve(job)
        yield solved


class Worker(Protocol):
    """Somebody who answers one job at a time."""

    def ask(self, job: Job) -> Solved:
        """Send one job and wait for its answer. Raises ExpertShareError."""
        ...

    def end(self) -> None:
        """Stop, whatever is being done; `ask` then fails in its thread."""
        ...


def solve_in_processes(setup: SolverSetup, jobs: Iterable[Job], processes: int) -> Iterator[Solved]:
    """Answer in `processes` others. Raises what a job raised there, or EvaluationError if a process died."""
    return solve_with([_Process(setup) for _ in range(processes)], jobs)


def solve_with(workers: Sequence[Worker], jobs: Iterable[Job]) -> Iterator[Solved]:
    """Let every worker answer whatever is next, and end them all. Raises what one of them raises."""
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def ask(job: Job) -> Solved:
        worker = free.get()
        try:
            return worker.ask(job)
        finally:
            free.put(worker)

    executor = ThreadPoolExecutor(len(workers))
    waiting: deque[Future[Solved]] = deque()
    try:
        for job in jobs:
            waiting.append(executor.submit(ask, job))
            if len(waiting) >= AHEAD * len(workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for worker in workers:
            worker.end()  # before the threads: they wait for the workers
        executor.shutdown()


class _Process:
    """One process and the conversation with it."""

    def __init__(self, setup: SolverSetup) -> None:
        package = str(Path(expertshare.__file__).parents[1])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # an interrupt from the keyboard is for the parent, which ends this one
        )
        self._setup: SolverSetup | None = setup

    def ask(self, job: Job) -> Solved:
        """Send one job and wait for its answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if self._setup is not None:
                pickle.dump(self._setup, process.stdin)
                self._setup = None
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            reply = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise EvaluationError(
                f"expected an answer from process {process.pid}, but it ended (status {process.poll()}): out of "
                "memory? Run the same command again, with fewer --processes; finished items are kept"
            ) from error
        if isinstance(reply, ExpertShareError):
            raise reply
        assert isinstance(reply, Solved)
        return reply

    def end(self) -> None:
        """Stop the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # half a job was still to be sent


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
