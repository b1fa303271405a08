"""`expertshare plan`: what fits into memory, before anything is loaded. `expertshare info`: what a user wants to know
of a model before choosing a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from expertshare import api
from expertshare.cli import flags
from expertshare.cli.console import megabytes, people, print_json, table
from expertshare.cli.options import option
from expertshare.convert.plan import Figure, Plan, Workload, make_plan
from expertshare.convert.rates import measure_rates
from expertshare.convert.sizes import VANILLA_UNIQUE, ModelSizes, likeness, sizes_like, sizes_of
from expertshare.errors import InputError
from expertshare.experts import format_size, parse_size
from expertshare.experts.recording import read_record
from expertshare.measure.memory import usable_memory_bytes
from expertshare.models import ModelFacts
from expertshare.routing import native_policy, parse_policy

SizedModel = Annotated[
    str | None, typer.Argument(help="Directory of a model in Hugging Face or expert layout, or a hub id.")
]
Like = Annotated[str | None, typer.Option(help=f"Instead of a model: the shapes of {', '.join(VANILLA_UNIQUE)}.")]


def sizes_from(model: str | None, like: str | None, layers: int | None = None) -> ModelSizes:
    """Sizes of a model, or of the shapes of one. Raises InputError unless exactly one is given."""
    if (model is None) == (like is None):
        raise InputError("expected either a model or --like NAME: give one of them")
    if layers is not None and like is None:
        raise InputError("--layers belongs to --like: leave it out")
    return sizes_of(model) if model is not None else sizes_like(likeness(like or "", layers=layers))


def plan(
    model: SizedModel = None,
    like: Like = None,
    layers: int | None = option("With --like: layers. Default: all.", None),
    memory: str | None = option("For the whole process, e.g. 8GiB. Default: what is free.", None),
    policy: flags.Policy = None,
    trace: Path | None = option("Routing record of this model under this policy (generate --record-routing).", None),
    prompt_length: int = option("Tokens of a prompt.", 256),
    gen_length: int = option("Tokens to generate.", 256),
    batch_size: flags.BatchSize = 1,
    tokens_per_step: float = option("Tokens that a denoising step commits.", 1.0),
    as_json: flags.Json = False,
) -> None:
    """Say what fits: dense bytes, bytes per expert, smallest budget, recommended store, expected speed.

    Example: expertshare plan path/to/converted --memory 8GiB --policy des-vote:budget=16 --trace routing.jsonl   (the
    trace: expertshare generate path/to/converted --prompt Hello --record-routing routing.jsonl)
    """
    sizes = sizes_from(model, like, layers)
    workload = Workload(
        prompt_length=prompt_length, gen_length=gen_length, batch_size=batch_size, tokens_per_step=tokens_per_step
    )
    limit = parse_size(memory) if memory is not None else usable_memory_bytes()
    if limit is None:
        raise InputError("the system does not say how much memory is free: give --memory")
    chosen = parse_policy(policy) if policy is not None else native_policy(sizes.config)
    bound = chosen.bind(sizes.config.router)
    record = read_record(trace) if trace is not None else None
    made = make_plan(sizes, limit, bound, measure_rates(sizes.probe), workload=workload, record=record)
    console = people(as_json=as_json)
    console.print(_table(made))
    for sentence in made.advice:
        console.print(sentence, soft_wrap=True)
    if as_json:
        print_json({"model": model or like, "policy": policy or bound.name, **made.to_json()})


def _table(made: Plan) -> Table:
    columns: dict[str, Callable[[tuple[str, Figure]], str]] = {
        "": lambda row: row[0],
        " ": lambda row: _shown(row[1]),
        "origin": lambda row: row[1].origin,
        "how": lambda row: row[1].how,
    }
    title = f"store: {made.store}, experts in {made.scheme}"
    return table(title, columns, made.figures.items(), words=4, widest=0)


def _shown(figure: Figure) -> str:
    if figure.unit == "bytes":
        return format_size(int(figure.value))
    if figure.unit == "share":
        return f"{100 * figure.value:.1f} %"
    speeds = {"bytes/s": f"{figure.value / 1e9:.2f} GB/s", "MAC/s": f"{figure.value / 1e9:.0f} GMAC/s"}
    return speeds.get(figure.unit, f"{figure.value:.4g} {figure.unit}")


def info(model: flags.Model, as_json: bool = option("One JSON line instead of a table.", False, "--json")) -> None:
    """Show architecture, router rule, bytes per expert and the smallest coreset of a model.

    Example: expertshare info path/to/model --json
    """
    facts = api.info(model)
    if as_json:
        print_json({"model": model, **asdict(facts)})
    else:
        people(as_json=False).print(_facts_table(facts))


def _facts_table(facts: ModelFacts) -> Table:
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
