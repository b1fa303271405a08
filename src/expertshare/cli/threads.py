"""The threads of a command: chosen once, before anything is computed."""

from __future__ import annotations

import os
from typing import Annotated

import torch
import typer

from expertshare import native
from expertshare.errors import InputError

ThreadsFlag = Annotated[
    int | None,
    typer.Option(help="Threads of one operation. Default: OMP_NUM_THREADS if set, else one for each physical core."),
]


MOST_THREADS = 1024


def set_threads(asked: int | None) -> None:
    """Torch's threads, in which our kernels compute too. Raises InputError for fewer than 1 or too many."""
    if asked is not None and asked < 1:
        raise InputError(f"threads must be at least 1, got {asked}")
    if asked is not None and asked > MOST_THREADS:
        raise InputError(f"threads must be at most {MOST_THREADS}, got {asked}")
    if asked is not None:
        torch.set_num_threads(asked)
    elif not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(native.usable_cores())
