"""The kinds of stored results that a report is made from: how each is known, and what it must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expertshare.lab.report.shape import FLAG, NUMBER, TEXT, Each, Row

COUNTS = {"denoise": NUMBER}
ENVIRONMENT = {"versions": Each(TEXT), "commit": (None, TEXT), "cpu": TEXT, "cpu_count": NUMBER, "threads": NUMBER}

_RUN = {
    "policy": TEXT,
    "label": TEXT,
    "knobs": {"top_p_experts?": NUMBER},
    "unique_experts": COUNTS,
    "unique_experts_reduction": NUMBER,
    "seconds_by_part": Each(NUMBER),
    "agreement": NUMBER,
    "accuracy": (None, NUMBER),
    "accuracy_interval": (None, Row(2)),
    "tasks": Each({"accuracy": NUMBER, "interval": Row(2), "count": NUMBER}),
    "retained": (None, NUMBER),
    "retained_capped": (None, NUMBER),
    "difference": (None, {"value": NUMBER, "low": NUMBER, "high": NUMBER, "p_value": NUMBER}),
}
COMPARISON = {"runs": [_RUN], "reference": _RUN, "num_prompts": NUMBER}
COMPARISON_CONFIG = {
    "model": TEXT,
    "model_facts": {"block_length": NUMBER},
    "decoding": {"gen_length": NUMBER, "block_length": NUMBER, "threshold": (None, NUMBER)},
    "batch_size": NUMBER,
}
EVALUATION = {
    "tasks": [TEXT],
    "policies": [TEXT],
    "num_answers": NUMBER,
    "rows": [
        {
            "task": TEXT,
            "policy": TEXT,
            "count": NUMBER,
            "judged": NUMBER,
            "correct": NUMBER,
            "accuracy": (None, NUMBER),
            "interval": (None, Row(2)),
            "retained": (None, NUMBER),
        }
    ],
    "summary": [
        {
            "policy": TEXT,
            "retained": (None, NUMBER),
            "retained_capped": (None, NUMBER),
            "retained_capped_interval": (None, Row(2)),
            "unique_experts": COUNTS,
            "unique_experts_reduction": (None, NUMBER),
        }
    ],
}
EVALUATION_CONFIG = {
    "model": TEXT,
    "policies": [{"label": TEXT, "policy": TEXT, "knobs": {"top_p_experts?": NUMBER}}],
    "identity": {"items": Each(NUMBER)},
    "config": {"limit": (None, NUMBER), "decoding": {"gen_length": NUMBER, "block_length": NUMBER}},
}
_VERIFIED = {
    "label": TEXT,
    "retained": NUMBER,
    "lower_bound": NUMBER,
    "counts": {"kept": NUMBER, "lost": NUMBER, "gained": NUMBER},
    "unique_experts": NUMBER,
    "expert_bytes": NUMBER,
    "seconds_per_block": (None, NUMBER),
}
TUNING = {
    "certified": FLAG,
    "claim": TEXT,
    "quality": TEXT,
    "cost_kind": TEXT,
    "chosen": _VERIFIED,
    "vanilla": _VERIFIED,
    "tested": [{**_VERIFIED, "passed": FLAG}],
    "tried": [_VERIFIED],
    "num_prompts": {"search": NUMBER, "certify": NUMBER},
    "options": {"retain": NUMBER, "confidence": NUMBER, "policies?": (None, [TEXT])},
}
_BANDWIDTH = {"bandwidth_gb_per_s": NUMBER, "peak_gmac_per_s": NUMBER}
BENCH_EXPERTS = {
    **_BANDWIDTH,
    "cases": [
        {
            "case": TEXT,
            "tokens": NUMBER,
            "unique": NUMBER,
            "backend": TEXT,
            "ms": NUMBER,
            "ms_quartiles": Row(2),
            "bound_ms": NUMBER,
            "quantisation?": (None, TEXT),
            "bytes": NUMBER,
            "macs": NUMBER,
            "gmac_per_s": NUMBER,
        }
    ],
    "fits": [{"case": TEXT, "backend": TEXT, "us_per_expert": NUMBER, "r_squared": NUMBER}],
}
_FORWARD = {
    "case": TEXT,
    "backend": TEXT,
    "policy": TEXT,
    "ms": NUMBER,
    "ms_by_part?": Each(NUMBER),
    "unique_experts?": NUMBER,
}
BENCH_FORWARD = {**_BANDWIDTH, "forwards": [_FORWARD]}
BENCH_GENERATE = {
    **_BANDWIDTH,
    "generations": [
        {
            "model": TEXT,
            "backend": TEXT,
            "policy": TEXT,
            "batch_size": NUMBER,
            "tokens_per_s": NUMBER,
            "tokens_per_s_range": Row(2),
            "unique_experts?": NUMBER,
        }
    ],
}
STEPS = {
    "runs": [
        {
            "label": TEXT,
            "steps": NUMBER,
            "unique_experts": NUMBER,
            "cv": NUMBER,
            "cv_by_layer": [NUMBER],
            "cv_of_step_means": NUMBER,
            "histogram_by_layer": [[NUMBER]],
            "by_step": [{"step": NUMBER, "mean": NUMBER, "std": NUMBER}],
        }
    ]
}
_CORRELATION = {
    "pearson_r": NUMBER,
    "pearson_r_interval": Row(2),
    "spearman_r": NUMBER,
    "pearson_r_by_expert": NUMBER,
}
_KNOCKED_OUT = {
    "points": NUMBER,
    "blocks": NUMBER,
    "weights": {name: _CORRELATION for name in ("sum", "max", "tokens")},
    "sample": [Row(3)],
    "tenths": [{"weight": NUMBER, "increase": NUMBER}],
}
WEIGHTS = {"replaced": _KNOCKED_OUT, "dropped": _KNOCKED_OUT}
GROWTH = {
    "num_experts": NUMBER,
    "experts_per_token": NUMBER,
    "blocks": NUMBER,
    "exponent": NUMBER,
    "linear_r_squared": NUMBER,
    "points": [
        {
            "tokens": NUMBER,
            "unique_experts": NUMBER,
            "independent": NUMBER,
            "macs_per_byte": NUMBER,
            "dense_macs_per_byte": NUMBER,
        }
    ],
}


def _no_fault(*_: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of result. how: the command that writes one; config, results: their shapes.

    fault: what does not fit together in them, None if all does.
    """

    how: str
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    fault: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] = _no_fault


def _evaluation_fault(config: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    names, known = results["policies"], [policy["label"] for policy in config["policies"]]
    summed = [summary["policy"] for summary in results["summary"]]
    if "vanilla" not in names or not names == known == summed:
        return f"the same policies everywhere, vanilla among them, got {names}, {known} and {summed}"
    return None


def _steps_fault(_: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    lengths = {len(layer) for run in results["runs"] for layer in run["histogram_by_layer"]}
    return None if len(lengths) == 1 else f"histograms of one length, got {sorted(lengths)}"


def _growth_fault(_: Mapping[str, Any], results: Mapping[str, Any]) -> str | None:
    return None if results["points"] else "at least one point, got none"


_SCRIPT = {"model": TEXT}
KINDS: dict[str, Kind] = {
    "eval": Kind(
        how="expertshare eval ... --out RUN_DIR",
        results=EVALUATION,
        config=EVALUATION_CONFIG,
        fault=_evaluation_fault,
    ),
    "compare": Kind(
        how="expertshare compare ... --report FILE, or --json > FILE", results=COMPARISON, config=COMPARISON_CONFIG
    ),
    "tune": Kind(how="expertshare tune ... --out FILE, or --json > FILE", results=TUNING, config={}),
    "bench experts": Kind(
        how="expertshare bench experts ... --report FILE", results=BENCH_EXPERTS, config={"cases": [TEXT]}
    ),
    "bench forward": Kind(
        how="expertshare bench forward ... --report FILE",
        results=BENCH_FORWARD,
        config={"case": TEXT, "policies": [TEXT], "num_layers": NUMBER},
    ),
    "bench generate": Kind(
        how="expertshare bench generate ... --report FILE",
        results=BENCH_GENERATE,
        config={"name": TEXT, "num_layers": NUMBER, "num_prompts": NUMBER, "weights": TEXT, "policies": [TEXT]},
    ),
    "steps-distribution": Kind(
        how="python benchmarks/steps_distribution.py ... --json FILE",
        results=STEPS,
        config=_SCRIPT,
        fault=_steps_fault,
    ),
    "weight-against-loss": Kind(
        how="python benchmarks/weight_against_loss.py ... --json FILE", results=WEIGHTS, config=_SCRIPT
    ),
    "expert-growth": Kind(
        how="python benchmarks/expert_growth.py ... --json FILE",
        results=GROWTH,
        config=_SCRIPT,
        fault=_growth_fault,
    ),
}


def known_kinds() -> str:
    """For messages: what can be read, and where it comes from."""
    return "; ".join(f"{name} ({kind.how})" for name, kind in KINDS.items())
