"""Options that say where a model runs and by what."""

from __future__ import annotations

from typing import Annotated

import typer

DeviceFlag = Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")]
BackendFlag = Annotated[str, typer.Option(help="Expert computation: auto, cpu, grouped, triton or reference.")]
