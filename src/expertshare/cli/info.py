"""`expertshare info`: what a user wants to know of a model before choosing a policy."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import megabytes, people, print_json, table
from expertshare.cli.options import option
from expertshare.models import ModelFacts

EXAMPLE = "Example: expertshare info path/to/model --json"


def info(
    model: flags.Model,
    as_json: bool = option("One JSON line instead of a table.", False, "--json"),
) -> None:
    """Show architecture, router rule, bytes per expert and the smallest coreset of a model."""
    facts = api.info(model)
    if as_json:
        print_json({"model": model, **asdict(facts)})
    else:
        people(as_json=False).print(_table(facts))


def _table(facts: ModelFacts) -> Table:
    capacity = "none" if facts.expert_capacity is None else f"{facts.expert_capacity} experts"
    coresets = f"{facts.min_coreset_inside} experts, {facts.min_coreset_ignore} where the group limit is ignored"
    lines = {
        "family": facts.family,
        "architecture": facts.architecture,
        "router rule": facts.router_rule,
        "parameters": f"{facts.num_parameters:,} in {facts.dtype}, {megabytes(facts.total_bytes)} MB",
        "experts": f"{megabytes(facts.experts_bytes)} MB, {100 * facts.experts_share:.0f} % of the model",
        "bytes per expert": f"{facts.bytes_per_expert:,}",
        "minimum coreset": coresets,
        "default budget": f"{facts.default_budget} experts",
        "trained coreset": capacity,
        "distilled for": facts.distilled_policy or "no policy",
        "block length": f"{facts.block_length} tokens",
        "longest sequence": f"{facts.max_positions} tokens",
    }
    made = table(None, {"": lambda line: line[0], "value": lambda line: line[1]}, lines.items(), words=2)
    made.show_header, made.columns[0].style = False, "bold"
    return made
