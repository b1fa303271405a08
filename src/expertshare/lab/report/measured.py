"""Figures of benchmarks, tuning runs and the measurements of single blocks: one for each stored result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from expertshare.lab.plots.bench import plot_bench, plot_parts
from expertshare.lab.plots.quality import plot_growth, plot_steps, plot_tuning, plot_weight_against_loss
from expertshare.lab.report.figures import (
    DASH,
    Columns,
    Figure,
    Table,
    Values,
    each_of,
    number,
    percent,
    plain_table,
    section,
    table_of,
)
from expertshare.lab.report.sources import Source


@section(
    "Unique experts over steps", "python benchmarks/steps_distribution.py MODEL --json FILE", kind="steps-distribution"
)
def steps(source: Source) -> Figure:
    """CV: coefficient of variation, standard deviation by mean."""
    runs = source.results["runs"]
    said = "; ".join(f"{r['label']} mean {number(r['unique_experts'])}, CV {percent(r['cv'])} %" for r in runs)
    columns: Columns = {
        "policy": lambda run: run["label"],
        "steps": lambda run: f"{run['steps']:,}",
        "unique experts": lambda run: number(run["unique_experts"]),
        "CV, %": lambda run: percent(run["cv"]),
        "CV by layer, %": lambda run: ", ".join(percent(cv) for cv in run["cv_by_layer"]),
        "CV of step means, %": lambda run: percent(run["cv_of_step_means"]),
    }
    return Figure(
        title=f"{source.config['model']}: denoising steps, one block at a time",
        caption="Left: all steps and layers. Right: mean over layers by step of a block, with its deviation.",
        alt=f"Histogram of unique experts and their course over steps. {said}.",
        table=table_of(runs, columns),
        draw=partial(plot_steps, source.results),
    )


@section(
    "Router weight against loss increase",
    "python benchmarks/weight_against_loss.py MODEL --json FILE",
    kind="weight-against-loss",
)
def weights(source: Source) -> Figure:
    """One expert at a time is taken out of one layer for one block."""
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
        table=plain_table(("way, weight", "Pearson's r", "95 % interval", "Spearman's r", "r of sums by expert"), rows),
        draw=partial(plot_weight_against_loss, source.results),
    )


@section("Experts against tokens", "python benchmarks/expert_growth.py MODEL --json FILE", kind="expert-growth")
def growth(source: Source) -> Figure:
    """What a block needs as it gets longer, and how much work each byte of weights then does."""
    results = source.results
    keys = ("unique_experts", "independent", "macs_per_byte", "dense_macs_per_byte")
    rows = [(f"{p['tokens']}", *(number(p[key]) for key in keys)) for p in results["points"]]
    tokens, unique, _, moe, dense = rows[-1]
    return Figure(
        title=f"{source.config['model']}: {results['blocks']:,} blocks under vanilla routing",
        caption=f"Growth exponent {results['exponent']:.2f} (1 is linear, 0 is flat).",
        alt=f"Line charts: unique experts grow to {unique} of {results['num_experts']} at {tokens} tokens; a byte of "
        f"the MoE layer's weights serves {moe} multiply-accumulates there, one of a dense layer {dense}.",
        table=plain_table(
            ("tokens", "unique experts", "if independent", "MAC per byte, MoE", "MAC per byte, dense"), rows
        ),
        draw=partial(plot_growth, results),
    )


def _forward(source: Source) -> Figure:
    forwards = source.results["forwards"]
    said = "; ".join(f"{f['backend']} {f['policy']} {number(f['ms'])} ms" for f in forwards)
    columns: dict[str, Callable[[Values], str]] = {
        "backend, policy": lambda forward: f"{forward['backend']}, {forward['policy']}",
        "unique experts": lambda forward: number(forward.get("unique_experts")),
        "all, ms": lambda forward: number(forward["ms"]),
    }
    for part in dict.fromkeys(part for forward in forwards for part in forward.get("ms_by_part", {})):
        columns[f"{part}, ms"] = partial(_ms_of, part)
    return Figure(
        title=f"{source.config['case']}: one denoising forward, {source.config['num_layers']} layers",
        caption=f"{_bounds(source)} Grey: contenders whose parts cannot be told apart.",
        alt=f"Stacked bars of milliseconds by part. {said}.",
        table=table_of(forwards, columns),
        draw=partial(plot_bench, source.results),
    )


def _ms_of(part: str, forward: Values) -> str:
    return number(forward.get("ms_by_part", {}).get(part))


def _decoding(source: Source) -> Figure:
    runs = source.results["runs"]
    names = list(runs[0]["seconds_by_part"])
    rows = [(run["label"], *(number(run["seconds_by_part"].get(name), 2) for name in names)) for run in runs]
    return Figure(
        title=f"{source.config['model']}: a comparison's decoding",
        caption="As it ran, beside whatever else the machine did; policies may take different numbers of steps.",
        alt=f"Stacked bars of seconds by part ({', '.join(names)}) for {len(runs)} policies; see the table.",
        table=plain_table(("policy", *(f"{name}, s" for name in names)), rows),
        draw=partial(plot_parts, runs),
    )


@section("Latency by part", "expertshare bench forward --report FILE")
def parts(sources: Sequence[Source]) -> list[Figure]:
    """Sharing makes the experts' part smaller and leaves the others as they are."""
    return each_of("bench forward", _forward, sources, "forwards") or each_of("compare", _decoding, sources, "runs")


@section(
    "Latency against unique experts", "expertshare bench experts --report FILE", kind="bench experts", needs="cases"
)
def latency(source: Source) -> Figure:
    """One expert layer; the bound is what memory bandwidth and arithmetic allow."""
    fits = "; ".join(
        f"{fit['case']} {fit['backend']} {number(fit['us_per_expert'])} µs an expert, R² {fit['r_squared']:.3f}"
        for fit in source.results["fits"]
    )
    return Figure(
        title=f"{', '.join(source.config['cases'])}: one expert layer",
        caption=f"{_bounds(source)} Bars: quartiles. Last panel: roofline of all points.",
        alt=f"Line charts of milliseconds against unique experts. {fits or 'See the table'}.",
        table=latency_table(source.results["cases"]),
        draw=partial(plot_bench, source.results),
    )


@section("Whole answers", "expertshare bench generate --report FILE", kind="bench generate", needs="generations")
def answers(source: Source) -> Figure:
    """Tokens per second of complete generations."""
    points = source.results["generations"]
    columns: Columns = {
        "backend, policy": lambda point: f"{point['backend']}, {point['policy']}",
        "batch size": lambda point: f"{point['batch_size']}",
        "tokens/s": lambda point: number(point["tokens_per_s"]),
        "unique experts": lambda point: number(point.get("unique_experts")),
    }
    return Figure(
        title=f"{points[0]['model']}: tokens per second",
        caption=f"{_bounds(source)} Bars: range over repetitions.",
        alt="Line chart of tokens per second against batch size; see the table.",
        table=table_of(points, columns),
        draw=partial(plot_bench, source.results),
    )


@section("Tuning", "expertshare tune MODEL --prompts FILE --out policy.json", kind="tune")
def tuning(source: Source) -> Figure:
    """What the tuner tried on its prompts, and what it certified on others."""
    tuned = source.results
    verdicts = {None: DASH, True: "yes", False: "no"}
    columns: Columns = {
        "policy": lambda run: run["label"],
        "unique experts": lambda run: number(run["unique_experts"]),
        "kept, %": lambda run: percent(run["retained"], 2),
        f"{100 * tuned['options']['confidence']:g} % bound, %": lambda run: percent(run["lower_bound"], 2),
        "lost": lambda run: f"{run['counts']['lost']}",
        "gained": lambda run: f"{run['counts']['gained']}",
        "certified": lambda run: verdicts[run.get("passed")],
    }
    return Figure(
        title=f"Promise: keep {100 * tuned['options']['retain']:g} % of vanilla's {tuned['quality']}",
        caption=tuned["claim"],
        alt=f"Scatter chart of what policies keep against their cost. {tuned['claim']}",
        table=table_of((tuned["vanilla"], *tuned["tested"]), columns),
        draw=partial(plot_tuning, tuned),
    )


def latency_table(cases: Sequence[Values]) -> Table:
    """Milliseconds of an expert layer by unique experts, a column for each contender. The bound is that of weights
    that are not quantised, where there are any."""
    backends = list(dict.fromkeys(case["backend"] for case in cases))
    points: dict[tuple[str, int, int], list[Values]] = {}
    for case in cases:
        points.setdefault((case["case"], case["tokens"], case["unique"]), []).append(case)
    rows = []
    for (name, tokens, unique), here in points.items():
        plain = [case for case in here if case.get("quantisation") is None]
        ms = {case["backend"]: case["ms"] for case in here}
        bound = min(case["bound_ms"] for case in plain or here)
        rows.append([name, f"{tokens}", f"{unique}", number(bound, 2), *(number(ms.get(b), 2) for b in backends)])
    return plain_table(("case", "tokens", "unique experts", "bound, ms", *(f"{b}, ms" for b in backends)), rows)


def _bounds(source: Source) -> str:
    results = source.results
    return f"Measured there: {results['bandwidth_gb_per_s']:.0f} GB/s, {results['peak_gmac_per_s']:.0f} GMAC/s."
