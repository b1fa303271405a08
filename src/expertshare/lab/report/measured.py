"""Figures of benchmarks, tuning runs and the measurements of single blocks: one for each stored result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from expertshare.lab import plots
from expertshare.lab.report.sources import Source
from expertshare.lab.report.tables import (
    Figure,
    latency_table,
    number,
    parts_table,
    percent,
    plain_table,
    section,
    tuning_table,
)


def per_result(kind: str, needs: str = "") -> Callable[[Callable[[Source], Figure]], Callable[..., list[Figure]]]:
    """Make the decorated function, which draws one result, draw all of a kind that hold any `needs`."""

    def wrap(draw: Callable[[Source], Figure]) -> Callable[[Sequence[Source]], list[Figure]]:
        def make(sources: Sequence[Source]) -> list[Figure]:
            return [draw(each) for each in sources if each.kind == kind and (not needs or each.results[needs])]

        return make

    return wrap


@section(
    "steps",
    "Unique experts over steps",
    "CV: coefficient of variation, standard deviation by mean.",
    "python benchmarks/steps_distribution.py MODEL --json FILE",
)
@per_result("steps-distribution")
def steps(source: Source) -> Figure:
    """Distribution of unique experts over steps."""
    runs = source.results["runs"]
    said = "; ".join(f"{r['label']} mean {number(r['unique_experts'])}, CV {percent(r['cv'])} %" for r in runs)
    rows = [
        (
            run["label"],
            f"{run['steps']:,}",
            number(run["unique_experts"]),
            percent(run["cv"]),
            ", ".join(percent(cv) for cv in run["cv_by_layer"]),
            percent(run["cv_of_step_means"]),
        )
        for run in runs
    ]
    return Figure(
        title=f"{source.config['model']}: denoising steps, one block at a time",
        caption="Left: all steps and layers. Right: mean over layers by step of a block, with its deviation.",
        alt=f"Histogram of unique experts and their course over steps. {said}.",
        sources=(source,),
        table=plain_table(
            ("policy", "steps", "unique experts", "CV, %", "CV by layer, %", "CV of step means, %"), rows
        ),
        draw=partial(plots.plot_steps, source.results),
    )


@section(
    "weights",
    "Router weight against loss increase",
    "One expert at a time is taken out of one layer for one block.",
    "python benchmarks/weight_against_loss.py MODEL --json FILE",
)
@per_result("weight-against-loss")
def weights(source: Source) -> Figure:
    """Router weight against the loss that an expert's absence costs."""
    names = {"sum": "sum over the block", "max": "largest of a token", "tokens": "tokens that use it"}
    rows = []
    for way in ("replaced", "dropped"):
        for key, name in names.items():
            r = source.results[way]["weights"][key]
            low, high = r["pearson_r_interval"]
            shown = [f"{r[figure]:.2f}" for figure in ("pearson_r", "spearman_r", "pearson_r_by_expert")]
            rows.append((f"{way}, {name}", shown[0], f"{low:.2f} to {high:.2f}", *shown[1:]))
    found = source.results["replaced"]
    return Figure(
        title=f"{source.config['model']}: {found['points']:,} knock-outs in {found['blocks']:,} blocks",
        caption="Light: a sample of knock-outs. Orange: means by tenths of router weight, of all knock-outs.",
        alt=f"Scatter charts of loss increase against router weight; Pearson's r is {rows[0][1]} where tokens "
        "take their next expert.",
        sources=(source,),
        table=plain_table(("way, weight", "Pearson's r", "95 % interval", "Spearman's r", "r of sums by expert"), rows),
        draw=partial(plots.plot_weight_against_loss, source.results),
    )


@section(
    "growth",
    "Experts against tokens",
    "What a block needs as it gets longer, and how much work each byte of weights then does.",
    "python benchmarks/expert_growth.py MODEL --json FILE",
)
@per_result("expert-growth")
def growth(source: Source) -> Figure:
    """The union of experts against the tokens of a block."""
    results = source.results
    keys = ("unique_experts", "independent", "macs_per_byte", "dense_macs_per_byte")
    rows = [(f"{p['tokens']}", *(number(p[key]) for key in keys)) for p in results["points"]]
    tokens, unique, _, moe, dense = rows[-1]
    return Figure(
        title=f"{source.config['model']}: {results['blocks']:,} blocks under vanilla routing",
        caption=f"Growth exponent {results['exponent']:.2f} (1 is linear, 0 is flat).",
        alt=f"Line charts: unique experts grow to {unique} of {results['num_experts']} at {tokens} tokens; a byte of "
        f"the MoE layer's weights serves {moe} multiply-accumulates there, one of a dense layer {dense}.",
        sources=(source,),
        table=plain_table(
            ("tokens", "unique experts", "if independent", "MAC per byte, MoE", "MAC per byte, dense"), rows
        ),
        draw=partial(plots.plot_growth, results),
    )


@per_result("bench forward", needs="forwards")
def _forward(source: Source) -> Figure:
    forwards = source.results["forwards"]
    said = "; ".join(f"{f['backend']} {f['policy']} {number(f['ms'])} ms" for f in forwards)
    return Figure(
        title=f"{source.config['case']}: one denoising forward, {source.config['num_layers']} layers",
        caption=f"{_bounds(source)} Grey: contenders whose parts cannot be told apart.",
        alt=f"Stacked bars of milliseconds by part. {said}.",
        sources=(source,),
        table=parts_table(forwards),
        draw=partial(plots.plot_bench, source.results),
    )


@per_result("compare", needs="runs")
def _decoding(source: Source) -> Figure:
    runs = source.results["runs"]
    names = list(runs[0]["seconds_by_part"])
    rows = [(run["label"], *(number(run["seconds_by_part"].get(name), 2) for name in names)) for run in runs]
    return Figure(
        title=f"{source.config['model']}: a comparison's decoding",
        caption="As it ran, beside whatever else the machine did; policies may take different numbers of steps.",
        alt=f"Stacked bars of seconds by part ({', '.join(names)}) for {len(runs)} policies; see the table.",
        sources=(source,),
        table=plain_table(("policy", *(f"{name}, s" for name in names)), rows),
        draw=partial(plots.plot_parts, runs),
    )


@section(
    "parts",
    "Latency by part",
    "Sharing makes the experts' part smaller and leaves the others as they are.",
    "expertshare bench forward --report FILE",
)
def parts(sources: Sequence[Source]) -> list[Figure]:
    """Time by part of the model: of one forward, or else of comparisons, which ran beside other work."""
    return _forward(sources) or _decoding(sources)


@section(
    "latency",
    "Latency against unique experts",
    "One expert layer; the bound is what memory bandwidth and arithmetic allow.",
    "expertshare bench experts --report FILE",
)
@per_result("bench experts", needs="cases")
def latency(source: Source) -> Figure:
    """One expert layer against unique experts."""
    fits = "; ".join(
        f"{fit['case']} {fit['backend']} {number(fit['us_per_expert'])} µs an expert, R² {fit['r_squared']:.3f}"
        for fit in source.results["fits"]
    )
    return Figure(
        title=f"{', '.join(source.config['cases'])}: one expert layer",
        caption=f"{_bounds(source)} Bars: quartiles. Last panel: roofline of all points.",
        alt=f"Line charts of milliseconds against unique experts. {fits or 'See the table'}.",
        sources=(source,),
        table=latency_table(source.results["cases"]),
        draw=partial(plots.plot_bench, source.results),
    )


@section(
    "answers",
    "Whole answers",
    "Tokens per second of complete generations.",
    "expertshare bench generate --report FILE",
)
@per_result("bench generate", needs="generations")
def answers(source: Source) -> Figure:
    """Whole answers, by batch size."""
    points = source.results["generations"]
    rows = [
        (
            f"{point['backend']}, {point['policy']}",
            f"{point['batch_size']}",
            number(point["tokens_per_s"]),
            number(point.get("unique_experts")),
        )
        for point in points
    ]
    return Figure(
        title=f"{points[0]['model']}: tokens per second",
        caption=f"{_bounds(source)} Bars: range over repetitions.",
        alt="Line chart of tokens per second against batch size; see the table.",
        sources=(source,),
        table=plain_table(("backend, policy", "batch size", "tokens/s", "unique experts"), rows),
        draw=partial(plots.plot_bench, source.results),
    )


@section(
    "tuning",
    "Tuning",
    "What the tuner tried on its prompts, and what it certified on others.",
    "expertshare tune MODEL --prompts FILE --out policy.json",
)
@per_result("tune")
def tuning(source: Source) -> Figure:
    """What a tuning run found."""
    tuned = source.results
    return Figure(
        title=f"Promise: keep {100 * tuned['options']['retain']:g} % of vanilla's {tuned['quality']}",
        caption=tuned["claim"],
        alt=f"Scatter chart of what policies keep against their cost. {tuned['claim']}",
        sources=(source,),
        table=tuning_table(tuned),
        draw=partial(plots.plot_tuning, tuned),
    )


def _bounds(source: Source) -> str:
    results = source.results
    return f"Measured there: {results['bandwidth_gb_per_s']:.0f} GB/s, {results['peak_gmac_per_s']:.0f} GMAC/s."
