"""The cheapest policy that keeps what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from expertshare.api.loading import DecodingValue, Model, as_records, decoding_options, load, opened
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import ProgressListener, Setup
from expertshare.experts import StoreOptions
from expertshare.kernels import AUTO
from expertshare.tuning.options import TuningOptions
from expertshare.tuning.policy_file import PolicyFile, read_policy_file
from expertshare.tuning.results import Tuned
from expertshare.tuning.tuner import tune as run_tuning


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
