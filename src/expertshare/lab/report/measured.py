"""Figures of benchmarks, tuning runs and the measurements of single blocks: one for each stored result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expertshare.lab import plots
from expertshare.lab.report.figure import Figure
from expertshare.lab.report.sources import Source
from expertshare.lab.report.tables import (
    Table,
    Values,
    latency_table,
    number,
    parts_table,
    percent,
    plain_table,
    tuning_table,
)


def _each(sources: Sequence[Source], kind: str, slug: str, make: Callable[[Source], dict[str, Any]]) -> list[Figure]:
    mine = [source for source in sources if source.kind == kind]
    return [Figure(slug=f"{slug}-{index}", sources=(source,), **make(source)) for index, source in enumerate(mine, 1)]


def _drawing(plot: Callable[[Any, Path], None], results: Any) -> Callable[[Path], None]:
    return lambda path: plot(results, path)


def steps(sources: Sequence[Source]) -> list[Figure]:
    """Distribution of unique experts over steps."""

    def make(source: Source) -> dict[str, Any]:
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
        head = ("policy", "steps", "unique experts", "CV, %", "CV by layer, %", "CV of step means, %")
        return {
            "title": f"{source.config['model']}: denoising steps, one block at a time",
            "caption": "Left: all steps and layers. Right: mean over layers by step of a block, with its deviation.",
            "alt": f"Histogram of unique experts and their course over steps. {said}.",
            "table": plain_table(head, rows),
            "draw": _drawing(plots.plot_steps, source.results),
        }

    return _each(sources, "steps-distribution", "steps", make)


def weights(sources: Sequence[Source]) -> list[Figure]:
    """Router weight against the loss that an expert's absence costs."""
    names = {"sum": "sum over the block", "max": "largest of a token", "tokens": "tokens that use it"}

    def make(source: Source) -> dict[str, Any]:
        rows = []
        for way in ("replaced", "dropped"):
            for key, name in names.items():
                found = source.results[way]["weights"][key]
                low, high = found["pearson_r_interval"]
                shown = [f"{found[figure]:.2f}" for figure in ("pearson_r", "spearman_r", "pearson_r_by_expert")]
                rows.append((f"{way}, {name}", shown[0], f"{low:.2f} to {high:.2f}", *shown[1:]))
        found = source.results["replaced"]
        head = ("way, weight", "Pearson's r", "95 % interval", "Spearman's r", "r of sums by expert")
        return {
            "title": f"{source.config['model']}: {found['points']:,} knock-outs in {found['blocks']:,} blocks",
            "caption": "Light: a sample of knock-outs. Orange: means by tenths of router weight, of all knock-outs.",
            "alt": f"Scatter charts of loss increase against router weight; Pearson's r is {rows[0][1]} where tokens "
            "take their next expert.",
            "table": plain_table(head, rows),
            "draw": _drawing(plots.plot_weight_against_loss, source.results),
        }

    return _each(sources, "weight-against-loss", "weights", make)


def growth(sources: Sequence[Source]) -> list[Figure]:
    """The union of experts against the tokens of a block."""

    def make(source: Source) -> dict[str, Any]:
        results = source.results
        keys = ("unique_experts", "independent", "macs_per_byte", "dense_macs_per_byte")
        rows = [(f"{p['tokens']}", *(number(p[key]) for key in keys)) for p in results["points"]]
        last = results["points"][-1]
        return {
            "title": f"{source.config['model']}: {results['blocks']:,} blocks under vanilla routing",
            "caption": f"Growth exponent {results['exponent']:.2f} (1 is linear, 0 is flat).",
            "alt": f"Line charts: unique experts grow to {number(last['unique_experts'])} of {results['num_experts']} "
            f"at {last['tokens']} tokens; a byte of the MoE layer's weights serves {number(last['macs_per_byte'])} "
            f"multiply-accumulates there, one of a dense layer {number(last['dense_macs_per_byte'])}.",
            "table": plain_table(
                ("tokens", "unique experts", "if independent", "MAC per byte, MoE", "MAC per byte, dense"), rows
            ),
            "draw": _drawing(plots.plot_growth, results),
        }

    return _each(sources, "expert-growth", "growth", make)


def parts(sources: Sequence[Source]) -> list[Figure]:
    """Time by part of the model: of one forward, or else of comparisons, which ran beside other work."""

    def forward(source: Source) -> dict[str, Any]:
        forwards = source.results["forwards"]
        said = "; ".join(f"{f['backend']} {f['policy']} {number(f['ms'])} ms" for f in forwards)
        return {
            "title": f"{source.config['case']}: one denoising forward, {source.config['num_layers']} layers",
            "caption": f"{_bounds(source)} Grey: contenders whose parts cannot be told apart.",
            "alt": f"Stacked bars of milliseconds by part. {said}.",
            "table": parts_table(forwards),
            "draw": _drawing(plots.plot_bench, source.results),
        }

    def compared(source: Source) -> dict[str, Any]:
        runs = source.results["runs"]
        names = list(runs[0]["seconds_by_part"])
        rows = [(run["label"], *(number(run["seconds_by_part"].get(name), 2) for name in names)) for run in runs]
        return {
            "title": f"{source.config['model']}: a comparison's decoding",
            "caption": "As it ran, beside whatever else the machine did; policies may take different numbers of steps.",
            "alt": f"Stacked bars of seconds by part ({', '.join(names)}) for {len(runs)} policies; see the table.",
            "table": plain_table(("policy", *(f"{name}, s" for name in names)), rows),
            "draw": _drawing(plots.plot_parts, runs),
        }

    benched = _each([s for s in sources if s.results.get("forwards")], "bench forward", "parts", forward)
    timed = [source for source in sources if source.kind == "compare" and source.results["runs"]]
    return benched or _each(timed, "compare", "parts", compared)


def latency(sources: Sequence[Source]) -> list[Figure]:
    """One expert layer against unique experts."""

    def make(source: Source) -> dict[str, Any]:
        cases = source.results["cases"]
        fits = "; ".join(
            f"{fit['case']} {fit['backend']} {number(fit['us_per_expert'])} µs an expert, R² {fit['r_squared']:.3f}"
            for fit in source.results["fits"]
        )
        return {
            "title": f"{', '.join(source.config['cases'])}: one expert layer",
            "caption": f"{_bounds(source)} Bars: quartiles. Last panel: roofline of all points.",
            "alt": f"Line charts of milliseconds against unique experts. {fits or 'See the table'}.",
            "table": latency_table(cases),
            "draw": _drawing(plots.plot_bench, source.results),
        }

    return _each([s for s in sources if s.results.get("cases")], "bench experts", "latency", make)


def answers(sources: Sequence[Source]) -> list[Figure]:
    """Whole answers, by batch size."""

    def make(source: Source) -> dict[str, Any]:
        points = source.results["generations"]
        return {
            "title": f"{points[0]['model']}: tokens per second",
            "caption": f"{_bounds(source)} Bars: range over repetitions.",
            "alt": "Line chart of tokens per second against batch size; see the table.",
            "table": _answers_table(points),
            "draw": _drawing(plots.plot_bench, source.results),
        }

    return _each([s for s in sources if s.results.get("generations")], "bench generate", "answers", make)


def _answers_table(points: Sequence[Values]) -> Table:
    rows = [
        (f"{p['backend']}, {p['policy']}", f"{p['batch_size']}", number(p["tokens_per_s"]), number(experts))
        for p, experts in ((p, p.get("unique_experts")) for p in points)
    ]
    return plain_table(("backend, policy", "batch size", "tokens/s", "unique experts"), rows)


def tuning(sources: Sequence[Source]) -> list[Figure]:
    """What a tuning run found."""

    def make(source: Source) -> dict[str, Any]:
        tuned = source.results
        return {
            "title": f"Promise: keep {100 * tuned['options']['retain']:g} % of vanilla's {tuned['quality']}",
            "caption": tuned["claim"],
            "alt": f"Scatter chart of what policies keep against their cost. {tuned['claim']}",
            "table": tuning_table(tuned),
            "draw": _drawing(plots.plot_tuning, tuned),
        }

    return _each(sources, "tune", "tuning", make)


def _bounds(source: Source) -> str:
    results = source.results
    return f"Measured there: {results['bandwidth_gb_per_s']:.0f} GB/s, {results['peak_gmac_per_s']:.0f} GMAC/s."
