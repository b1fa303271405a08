"""Flags of the verbs that can run on Ray."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

scale_out = partial(typer.Option, rich_help_panel="Scale-out")
RayFlag = Annotated[bool, scale_out("--ray", help="Use Ray: that of --ray-address, else one that is started for this.")]
RayAddressFlag = Annotated[
    str | None,
    scale_out(metavar="HOST:PORT", help="Ray cluster to use; `auto`: the one of this machine. Default: RAY_ADDRESS."),
]
