"""Who answers the items of an evaluation: this process, several of this machine, or actors of Ray on any number.

All of them answer an item by `Solver.solve`, one prompt at a time, and give answers in the order of the jobs.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

import expertshare
from expertshare.config import ModelConfig
from expertshare.decoding import DecodingOptions
from expertshare.decoding.row import check_prompts
from expertshare.errors import EvaluationError, ExpertShareError, InputError
from expertshare.evaluation.items import EvalItem
from expertshare.evaluation.run_directory import model_sha256
from expertshare.evaluation.runner import Setup, answer_prompts, encode_prompts
from expertshare.experts import SlabStore, StoreOptions, open_store
from expertshare.measure.cost import FORWARD_KINDS, ForwardKind
from expertshare.measure.report import versions
from expertshare.models import LoadedModel, load_model
from expertshare.ray_connection import connected
from expertshare.routing import RoutingPolicy

PROGRAM = "from expertshare.evaluation.workers import serve; serve()"
"""What another process runs. Not `-m`: what it pickles would then be of the module `__main__`."""
AHEAD = 4
"""Jobs under way per process: enough that none idles while answers wait for an earlier one."""
RESTARTS = 3
"""How often an actor whose process or machine has died is started again, before the evaluation is given up."""
_AFTER_A_DEATH = "out of memory? Run the same command again, with fewer --processes; finished items are kept"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One item to answer under the policy with this number."""

    item: EvalItem
    policy: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """An answer and what it cost, by the names of a line of the evaluation. Mappings are by kind of forward.

    blocks: those that took part in the forwards. unique_experts: of one block in one layer, mean over them.
    """

    answer: str
    finish_reason: str | None
    tokens: int
    steps: int
    forwards: dict[ForwardKind, int]
    blocks: dict[ForwardKind, int]
    unique_experts: dict[ForwardKind, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverSetup:
    """All that another process needs to answer as this one would. dtype: None is the checkpoint's own. store: how
    every process keeps the experts of a converted model (None: all of them in memory)."""

    model: Path
    dtype: torch.dtype | None
    policies: tuple[RoutingPolicy, ...]
    options: DecodingOptions
    backend: str
    threads: int
    store: StoreOptions | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """A loaded model that answers jobs, one prompt at a time, so that no answer depends on what else is asked.

    store: the experts of a converted model, open; the caller closes it.
    """

    loaded: LoadedModel
    setup: SolverSetup
    store: SlabStore | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, setup: SolverSetup) -> Solver:
        """With the experts of a converted model, by default all in memory, open as long as the process lasts."""
        layout, kept = loaded.layout, setup.store or StoreOptions()
        return cls(
            loaded=loaded, setup=setup, store=open_store(loaded.path, layout, kept) if layout is not None else None
        )

    def solve(self, job: Job) -> Solved:
        """Answer one job. Raises InputError or NumericsError."""
        item, setup = job.item, self.setup
        run = answer_prompts(
            self.loaded,
            encode_prompts(self.loaded, [item.prompt], item.chat),
            setup.policies[job.policy],
            options_for(item, setup.options, self.loaded.config),
            setup=Setup(batch_size=1, backend=setup.backend, chat=item.chat, store=self.store),
        )
        [answer], cost = run.answers, run.cost
        return Solved(
            answer=answer.text,
            finish_reason=answer.finish_reason,
            tokens=len(answer.token_ids),
            steps=answer.steps,
            forwards=dict(cost.forwards),
            blocks={kind: sum(step.groups for step in cost.steps if step.kind == kind) for kind in FORWARD_KINDS},
            unique_experts=dict(cost.unique_experts),
        )

    def check(self, item: EvalItem) -> None:
        """Raise InputError unless the model can be asked this."""
        try:
            prompts = encode_prompts(self.loaded, [item.prompt], item.chat)
            check_prompts(prompts, options_for(item, self.setup.options, self.loaded.config), self.loaded.config)
        except InputError as error:
            raise InputError(f"task {item.task}, item {item.id}: {error}") from error


def options_for(item: EvalItem, options: DecodingOptions, config: ModelConfig) -> DecodingOptions:
    """The item's own length, in whole blocks where the model needs that, and a seed that only it has."""
    length = item.gen_length
    block = options.block_length or config.block_length
    if config.attention == "full" and block:
        length = -(-length // block) * block
    return replace(options, gen_length=length, seed=item_seed(options.seed, item)).resolve(config)


def item_seed(seed: int, item: EvalItem) -> int:
    """A seed for sampling that depends on nothing but the evaluation's seed and the item; in 0..2**63 - 1."""
    digest = hashlib.blake2b(f"{seed}/{item.task}/{item.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def solve_here(solver: Solver, jobs: Iterable[Job]) -> Iterator[Solved]:
    """Answer in this process, with as many threads as another process would use."""
    for job in jobs:
        before = torch.get_num_threads()
        torch.set_num_threads(solver.setup.threads)
        try:
            solved = solver.solve(job)
        finally:
            torch.set_num_threads(before)
        yield solved


class Worker(Protocol):
    """Answers one job at a time."""

    def ask(self, job: Job) -> Solved:
        """Send one job and wait for its answer. Raises ExpertShareError."""
        ...

    def end(self) -> None:
        """Stop, whatever is being done; `ask` then fails in its thread."""
        ...


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


def _answer_of(reply: object) -> Solved:
    """The answer that came back, or the error that came instead of one."""
    if isinstance(reply, ExpertShareError):
        raise reply
    assert isinstance(reply, Solved)
    return reply


class RemoteSolver:
    """What runs in another process or in an actor. Its errors are values: they go back like answers.

    sha256, expected: of the model and the versions that must be found here too (None: those of this machine).
    """

    def __init__(
        self, setup: SolverSetup, sha256: str | None = None, expected: Mapping[str, str] | None = None
    ) -> None:
        torch.set_num_threads(setup.threads)
        self._setup, self._sha256, self._expected = setup, sha256, expected
        self._solver: Solver | None = None

    def solve(self, job: Job) -> Solved | ExpertShareError:
        """One answer, or why there is none; the model is loaded for the first one."""
        try:
            if self._solver is None:
                self._check()
                self._solver = Solver.of(load_model(self._setup.model, dtype=self._setup.dtype), self._setup)
            return self._solver.solve(job)
        except ExpertShareError as error:
            return error

    def _check(self) -> None:
        path, here = self._setup.model, versions()
        wanted = here if self._expected is None else self._expected
        if self._sha256 is not None and not (path.is_dir() and model_sha256(path) == self._sha256):
            raise EvaluationError(
                f"expected the same model in {path} on every machine, but on one it is another or missing: copy it "
                "there, or put it where all see it"
            )
        for name in sorted({*here, *wanted}):
            if here.get(name) != wanted.get(name):
                raise EvaluationError(
                    f"expected {name} {wanted.get(name)} on every machine, but on one it is {here.get(name)}: install "
                    "the same versions everywhere"
                )


def solve_in_processes(setup: SolverSetup, jobs: Iterable[Job], processes: int) -> Iterator[Solved]:
    """Answer in `processes` others. Raises what a job raised there, or EvaluationError if a process died."""
    return solve_with([_Process(setup) for _ in range(processes)], jobs)


class _Process:
    """One process and the conversation with it."""

    def __init__(self, setup: SolverSetup) -> None:
        package = str(Path(expertshare.__file__).parents[1])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._setup = setup
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # an interrupt from the keyboard is for the parent, which ends this one
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs, self._replies = self._process.stdin, self._process.stdout

    def ask(self, job: Job) -> Solved:
        try:
            pickle.dump((self._setup, job), self._jobs)
            self._jobs.flush()
            reply = pickle.load(self._replies)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise EvaluationError(
                f"expected an answer from process {self._process.pid}, but it ended (status {self._process.poll()}): "
                f"{_AFTER_A_DEATH}"
            ) from error
        return _answer_of(reply)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # half a job was still to be sent
            self._jobs.close()
        self._replies.close()


def serve() -> None:
    """Answer jobs until stdin ends, so that no process outlives its parent, however that ends: pickled pairs of
    SolverSetup (always the same) and Job on stdin; a pickled answer or error for each on stdout."""
    with os.fdopen(os.dup(1), "wb") as replies, suppress(EOFError):
        os.dup2(2, 1)  # whatever prints must not get between the replies
        solver: RemoteSolver | None = None
        while True:
            setup, job = pickle.load(sys.stdin.buffer)
            solver = solver or RemoteSolver(setup)
            pickle.dump(solver.solve(job), replies)
            replies.flush()


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


class _Actor:
    """The conversation with an actor."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def ask(self, job: Job) -> Solved:
        import ray
        from ray.exceptions import RayActorError

        try:
            return _answer_of(ray.get(self._handle.solve.remote(job)))
        except RayActorError as error:
            raise EvaluationError(
                f"expected an answer from an actor of Ray, but it died {RESTARTS + 1} times or was ended: "
                f"{_AFTER_A_DEATH}"
            ) from error

    def end(self) -> None:
        import ray

        ray.kill(self._handle)
