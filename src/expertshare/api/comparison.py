"""The same prompts under several policies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertshare.api.loading import (
    DecodingValue,
    Model,
    as_records,
    decoding_options,
    for_model,
    listed,
    load,
    opened,
)
from expertshare.evaluation.comparison import Comparison, compare_policies
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import ProgressListener, Setup
from expertshare.experts import StoreOptions
from expertshare.kernels import AUTO
from expertshare.measure.environment import capture_environment
from expertshare.measure.memory import MemoryWatch
from expertshare.measure.report import Report
from expertshare.routing import POLICIES, RoutingPolicy
from expertshare.tuning.policy_file import PolicyFile


def compare(
    model: Model,
    records: Sequence[PromptRecord | str],
    policies: Sequence[str | RoutingPolicy | PolicyFile] | None = None,
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
