"""Accuracy and cost on tasks and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from expertshare.api.loading import DecodingValue, Model, decoding_options, for_model, listed, load, opened
from expertshare.evaluation.evaluating import (
    Evaluation,
    EvaluationSettings,
    NoticeListener,
    check_task_names,
    evaluate_sources,
    harness_version,
    make_sources,
)
from expertshare.evaluation.items import SourceOptions
from expertshare.evaluation.presets import find_preset
from expertshare.evaluation.runner import ProgressListener, Setup
from expertshare.experts import StoreOptions
from expertshare.kernels import AUTO
from expertshare.lab.tasks.generation import generate_items
from expertshare.ray_connection import require_ray
from expertshare.routing import RoutingPolicy
from expertshare.tuning.policy_file import PolicyFile


def evaluate(
    model: Model,
    tasks: Sequence[str],
    policies: Sequence[str | RoutingPolicy | PolicyFile],
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
    if ray or ray_address is not None:
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
            ray=(ray_address or "") if ray or ray_address is not None else None,
            identity={"allow_code": allow_code, "harness": harness_version(tasks)},
            config={"preset": chosen.to_json() if chosen else None, "limit": limit, "shots": sources.shots},
        )
        made = make_sources(tasks, sources, loaded, draw=partial(generate_items, split="test"))
        return evaluate_sources(
            loaded, made, chosen_policies, settings, Path(out), on_progress=on_progress, on_notice=on_notice
        )
