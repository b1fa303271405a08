"""Policies measured on prompts: compared with vanilla, judged on tasks, tuned; and a page of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from expertshare.api.loading import (
    DecodingValue,
    Model,
    Policy,
    as_records,
    decoding_options,
    for_model,
    listed,
    load,
    opened,
)
from expertshare.evaluation.comparison import Comparison, compare_policies
from expertshare.evaluation.evaluating import (
    Evaluation,
    EvaluationSettings,
    NoticeListener,
    check_task_names,
    evaluate_sources,
    harness_version,
    make_sources,
)
from expertshare.evaluation.items import SourceOptions, find_preset
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import ProgressListener, Setup
from expertshare.experts import StoreOptions
from expertshare.kernels import AUTO
from expertshare.lab.tasks.generation import generate_items
from expertshare.measure.memory import MemoryWatch
from expertshare.measure.report import Report, capture_environment
from expertshare.ray_connection import require_ray
from expertshare.routing import POLICIES
from expertshare.tuning.options import TuningOptions
from expertshare.tuning.policy_file import PolicyFile, read_policy_file
from expertshare.tuning.results import Tuned
from expertshare.tuning.tuner import tune as run_tuning

if TYPE_CHECKING:
    from expertshare.lab.report.page import WrittenReport

DEFAULT_TITLE = "Expert sharing: what was measured"


def compare(
    model: Model,
    records: Sequence[PromptRecord | str],
    policies: Sequence[Policy] | None = None,
    *,
    batch_size: int = 1,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_progress: ProgressListener | None = None,
    memory: MemoryWatch | None = None,
    **decoding: DecodingValue,
) -> Comparison:
    """Answer the same prompts under several policies and compare each with vanilla, which is always run.

    policies: by default all of them, with their default knobs. Prompts with a reference or tests are judged; code that
    the model wrote for the code tasks is then run, in the sandbox. on_progress(label, done, total)
    hears of every finished prompt. store, memory: as for generate. Raises a subclass of ExpertShareError for anything
    unusable.
    """
    options = decoding_options(decoding)
    chosen = listed(policies if policies is not None else list(POLICIES))
    prompts = as_records(records)
    with memory or MemoryWatch() as watch:
        loaded = load(model, dtype=dtype, store=store)
        bound = [for_model(policy, loaded) for policy in chosen]
        with opened(loaded, store, Setup(batch_size=batch_size, backend=backend, chat=chat)) as setup:
            return compare_policies(loaded, prompts, bound, options, setup=setup, on_progress=on_progress, memory=watch)


def comparison_report(comparison: Comparison, device: torch.device | None = None) -> Report:
    """The whole record, with every answer."""
    decoding = comparison.config["decoding"]
    return Report(
        command="compare",
        environment=capture_environment(device),
        seeds={"decoding": decoding["seed"]},
        config=comparison.config,
        results=comparison.to_json(answers=True),
    )


def evaluate(
    model: Model,
    tasks: Sequence[str],
    policies: Sequence[Policy],
    *,
    out: str | Path,
    preset: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    data: str | Path | None = None,
    allow_code: bool = False,
    processes: int = 1,
    threads: int = 1,
    ray: bool = False,
    ray_address: str | None = None,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_progress: ProgressListener | None = None,
    on_notice: NoticeListener | None = None,
    **decoding: DecodingValue,
) -> Evaluation:
    """Accuracy and cost of policies on tasks, a line per answer in the directory `out`, which a second call completes.

    tasks: generated kinds (arith, math, ...) and benchmarks (gsm8k, ...; these need expertshare[eval]). preset:
    settings of a paper; what is given here goes before it. seed: of items, examples and sampling. threads: of each
    process. ray: the processes are Ray's (extra `ray`), at ray_address, in RAY_ADDRESS, or started for this. store: how
    each process keeps the experts of a converted model, as for `generate`. See docs/evaluation.md. Raises a
    subclass of ExpertShareError for anything unusable.
    """
    on_ray = ray or ray_address is not None
    if on_ray:
        require_ray()
    chosen = find_preset(preset) if preset is not None else None
    check_task_names(tasks)
    wanted = listed(policies)
    merged = {**(chosen.decoding if chosen else {}), **decoding, "seed": seed}
    sources = SourceOptions(
        limit=limit,
        seed=seed,
        gen_length=merged.get("gen_length"),  # type: ignore[arg-type]
        shots=shots if shots is not None or chosen is None else chosen.shots,
        data=Path(data) if data is not None else None,
        chat=chat if chat is not None or chosen is None else chosen.chat,
        allow_code=allow_code,
    )
    loaded = load(model, dtype=dtype, store=store)
    chosen_policies = [for_model(policy, loaded) for policy in wanted]
    with opened(loaded, store, Setup(backend=backend, chat=sources.chat)) as setup:
        settings = EvaluationSettings(
            options=decoding_options(merged),
            setup=setup,
            dtype=loaded.model.dtype,
            processes=processes,
            threads=threads,
            ray=(ray_address or "") if on_ray else None,
            identity={"allow_code": allow_code, "harness": harness_version(tasks)},
            config={"preset": chosen.to_json() if chosen else None, "limit": limit, "shots": sources.shots},
        )
        made = make_sources(tasks, sources, loaded, draw=partial(generate_items, split="test"))
        return evaluate_sources(
            loaded, made, chosen_policies, settings, Path(out), on_progress=on_progress, on_notice=on_notice
        )


def tune(
    model: Model,
    records: Sequence[PromptRecord | str],
    *,
    tuning: TuningOptions | None = None,
    batch_size: int = 16,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_progress: ProgressListener | None = None,
    **decoding: DecodingValue,
) -> Tuned:
    """The cheapest policy that is certified to keep a share of vanilla's quality on prompts like these.

    tuning: the promise and the work to spend on it. `.policy_file().write(path)` keeps the outcome. on_progress(stage,
    done, total). Raises a subclass of ExpertShareError for anything unusable.
    """
    options = decoding_options(decoding)
    prompts = as_records(records)
    wanted = tuning if tuning is not None else TuningOptions()
    loaded = load(model, dtype=dtype, store=store)
    with opened(loaded, store, Setup(batch_size=batch_size, backend=backend, chat=chat)) as setup:
        return run_tuning(loaded, prompts, options, wanted, setup=setup, on_progress=on_progress)


def load_policy(path: str | Path) -> PolicyFile:
    """A policy file of `tune`. The verbs refuse it with any other model. Raises InputError, PolicyError."""
    return read_policy_file(path)


def report(
    runs: Sequence[str | Path], out: str | Path, *, title: str = DEFAULT_TITLE, claims: bool = True
) -> WrittenReport:
    """One self-contained HTML page from stored results, nothing measured anew.

    runs: run directories of `eval`, and files of `compare`, `bench`, `tune` and the scripts in benchmarks/. out: a
    name ending in .html for the page alone, else a folder for the page (report.html) and its pictures as PNG. claims:
    whether what papers claim is a part of it. Raises InputError, naming the file, for anything that is no known result.
    """
    from expertshare.lab.report.page import write_report  # brings matplotlib

    return write_report(runs, out, title=title, claims=claims)
