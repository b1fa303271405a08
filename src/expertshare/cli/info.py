"""`expertshare info`: what a user wants to know of a model before choosing a policy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli.console import megabytes, people, print_json
from expertshare.models import ModelFacts

EXAMPLE = "Example: expertshare info path/to/model --json"


def info(
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of a table.")] = False,
) -> None:
    """Show architecture, router rule, bytes per expert and the smallest coreset of a model."""
    facts = api.info(model)
    if as_json:
        print_json({"model": model, **asdict(facts)})
    else:
        people(as_json=False).print(_table(facts))


def _table(facts: ModelFacts) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    capacity = "none" if facts.expert_capacity is None else f"{facts.expert_capacity} experts"
    coresets = f"{facts.min_coreset_inside} experts, {facts.min_coreset_ignore} where the group limit is ignored"
    for name, value in (
        ("family", facts.family),
        ("architecture", facts.architecture),
        ("router rule", facts.router_rule),
        ("parameters", f"{facts.num_parameters:,} in {facts.dtype}, {megabytes(facts.total_bytes)} MB"),
        ("experts", f"{megabytes(facts.experts_bytes)} MB, {100 * facts.experts_share:.0f} % of the model"),
        ("bytes per expert", f"{facts.bytes_per_expert:,}"),
        ("minimum coreset", coresets),
        ("default budget", f"{facts.default_budget} experts"),
        ("trained coreset", capacity),
        ("distilled for", facts.distilled_policy or "no policy"),
        ("block length", f"{facts.block_length} tokens"),
        ("longest sequence", f"{facts.max_positions} tokens"),
    ):
        table.add_row(name, value)
    return table
