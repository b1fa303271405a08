"""Options that the verbs of `expertshare bench` share, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from expertshare import api
from expertshare.cli.bench_tables import case_table
from expertshare.cli.console import people
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.evaluation import parse_policies, policy_label
from expertshare.lab.bench import CASES, gpu_device
from expertshare.types import RoutingPolicy


def list_cases(wanted: bool) -> None:
    """Print the registry and leave."""
    if wanted:
        people(as_json=False).print(case_table(CASES))
        raise typer.Exit


ListFlag = Annotated[
    bool, typer.Option("--list", callback=list_cases, is_eager=True, help="Print the cases and leave.")
]
CasesFlag = Annotated[str, typer.Option("--case", help="Cases, parted by commas; --list shows them.")]
DtypeFlag = Annotated[str, typer.Option(help="Of weights and activations: bfloat16 or float32.")]
BackendsFlag = Annotated[str | None, typer.Option(help="Contenders, parted by commas. Default: all that are there.")]
DeviceFlag = Annotated[str, typer.Option(help="cpu, or cuda: the GPU, timed by its own events.")]
RepeatsFlag = Annotated[int, typer.Option(help="Timed calls of each contender, in turn with all others.")]
MemoryFlag = Annotated[float | None, typer.Option(help="Gigabytes for weights. Default: 3/4 of what is free.")]
SeedFlag = Annotated[int, typer.Option(help="Of weights, tokens and routing.")]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="End with one JSON line on stdout; everything else goes to stderr.")
]
ReportFlag = Annotated[Path | None, typer.Option(help="Write a JSON report with machine and commit.")]
PlotFlag = Annotated[Path | None, typer.Option(help="Draw the results to this .png, .svg or .pdf file.")]


def names(listed: str | None) -> list[str] | None:
    """Names parted by commas."""
    if listed is None:
        return None
    found = [name.strip() for name in listed.split(",") if name.strip()]
    if not found:
        raise InputError(f"expected names parted by commas, got {listed!r}")
    return found


def counts(flag: str, listed: str | None) -> tuple[int, ...] | None:
    """Whole numbers of at least 1, parted by commas."""
    found = names(listed)
    if found is None:
        return None
    if not all(text.isdecimal() and int(text) >= 1 for text in found):
        raise InputError(f"{flag} takes whole numbers of at least 1 parted by commas, got {listed!r}")
    return tuple(int(text) for text in found)


def policies_by_label(listed: str) -> dict[str, RoutingPolicy]:
    """Policies parted by commas, under the labels that name them in results."""
    return {policy_label(policy): policy for policy in parse_policies([listed])}


def device_named(name: str) -> torch.device:
    """cpu or cuda; ConfigError for others, and for cuda where nothing could be measured."""
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}. {nearest(name, ('cpu', 'cuda'))}")
    return gpu_device() if name == "cuda" else torch.device("cpu")


def dtype_named(name: str) -> torch.dtype:
    """float32 or bfloat16; ConfigError for others."""
    if name not in api.DTYPES:
        raise ConfigError(f"unknown dtype {name!r}. {nearest(name, api.DTYPES)}")
    return api.DTYPES[name]
