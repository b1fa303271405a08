"""The harness itself: whether it is installed, and its tasks, from local files or the hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertshare.errors import InputError
from expertshare.evaluation.harness.benchmarks import Benchmark
from expertshare.evaluation.harness.local_data import splits

if TYPE_CHECKING:
    from lm_eval.api.task import Task

OUR_TASKS = Path(__file__).parent / "tasks"
EXTRA = "expertshare[eval]"
NO_LIKELIHOOD = (
    "a masked diffusion model has no left-to-right likelihood of a given text. Choose a task that generates its answer "
    "(generate_until)"
)


def check_installed() -> None:
    """Raise InputError, with the extra's name, where lm-evaluation-harness or its part for mathematics is absent."""
    for module in ("lm_eval", "math_verify"):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"this benchmark needs lm-evaluation-harness, and {module} is not installed: pip install '{EXTRA}'. "
                "The generated tasks (arith, math, code, code_pro, choice) need nothing more"
            )


def installed_version() -> str | None:
    """Version of lm-evaluation-harness, None where it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def load_task(benchmark: Benchmark, part: str, data: Path | None, cache: Path) -> Task:
    """One task of the harness. Its records come from files below `data`, or from the hub where that is None.

    cache: a folder for converted records, which the task reads as long as it is used. Raises InputError.
    """
    check_installed()
    with _quiet():
        from datasets.exceptions import DatasetsError
        from lm_eval.tasks import TaskManager

        name = benchmark.parts[part]
        manager = TaskManager(include_defaults=False, include_path=_folders(benchmark))
        # A task by itself ignores what is to be changed about it; as a member of a group it does not.
        changes: dict[str, Any] = {"task": name, **(_local(benchmark, part, data, cache) if data else {})}
        try:
            loaded = manager.load([{"group": "expertshare", "task": [changes]}])["tasks"]
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"the data of {benchmark.name} could not be loaded ({reason}): check the network, or give the "
                "folder that holds its files with --data (docs/evaluation.md says which)"
            ) from error
    task: Task = loaded[name]
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError(f"task {name} asks for {task.OUTPUT_TYPE}: {NO_LIKELIHOOD}")
    return task


def _folders(benchmark: Benchmark) -> list[str]:
    if not benchmark.folders:
        return [str(OUR_TASKS)]
    import lm_eval.tasks

    return [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in benchmark.folders]


def _local(benchmark: Benchmark, part: str, data: Path, cache: Path) -> dict[str, Any]:
    folder = cache / (part or benchmark.name)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for split, records in splits(benchmark.data, part, data).items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        files[split] = str(path)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "arrow")},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings about settings that are meant; datasets says where it looks in its errors."""
    import datasets

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        log.setLevel(level)
