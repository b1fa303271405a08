"""The kinds of stored results that a report is made from: how each is known, and what it must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertshare.reporting.shape import FLAG, NUMBER, TEXT, Each

COUNTS = {"denoise": NUMBER}
ENVIRONMENT = {"versions": Each(TEXT), "commit": (None, TEXT), "cpu": TEXT, "cpu_count": NUMBER, "threads": NUMBER}

_RUN = {
    "policy": TEXT,
    "label": TEXT,
    "knobs": {},
    "unique_experts": COUNTS,
    "unique_experts_reduction": NUMBER,
    "seconds_by_part": Each(NUMBER),
    "agreement": NUMBER,
    "accuracy": (None, NUMBER),
    "accuracy_interval": (None, [NUMBER]),
    "tasks": Each({"accuracy": NUMBER, "interval": [NUMBER], "count": NUMBER}),
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
            "interval": (None, [NUMBER]),
            "retained": (None, NUMBER),
        }
    ],
    "summary": [
        {
            "policy": TEXT,
            "retained": (None, NUMBER),
            "retained_capped": (None, NUMBER),
            "retained_capped_interval": (None, [NUMBER]),
            "unique_experts": COUNTS,
            "unique_experts_reduction": (None, NUMBER),
        }
    ],
}
EVALUATION_CONFIG = {
    "model": TEXT,
    "policies": [{"label": TEXT, "policy": TEXT, "knobs": {}}],
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
    "options": {"retain": NUMBER, "confidence": NUMBER},
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
            "ms_quartiles": [NUMBER],
            "bound_ms": NUMBER,
            "bytes": NUMBER,
            "macs": NUMBER,
            "gmac_per_s": NUMBER,
        }
    ],
    "fits": [{"case": TEXT, "backend": TEXT, "us_per_expert": NUMBER, "r_squared": NUMBER}],
}
BENCH_FORWARD = {**_BANDWIDTH, "forwards": [{"case": TEXT, "backend": TEXT, "policy": TEXT, "ms": NUMBER}]}
BENCH_GENERATE = {
    **_BANDWIDTH,
    "generations": [
        {
            "model": TEXT,
            "backend": TEXT,
            "policy": TEXT,
            "batch_size": NUMBER,
            "tokens_per_s": NUMBER,
            "tokens_per_s_range": [NUMBER],
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
_KNOCKED_OUT = {
    "points": NUMBER,
    "blocks": NUMBER,
    "weights": {"sum": {"pearson_r": NUMBER, "pearson_r_interval": [NUMBER], "spearman_r": NUMBER}},
    "sample": [[NUMBER]],
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of result. how: the command that writes one; config, results: their shapes."""

    how: str
    results: Mapping[str, Any]
    config: Mapping[str, Any]


_SCRIPT = {"model": TEXT}
KINDS: dict[str, Kind] = {
    "eval": Kind(how="expertshare eval ... --out RUN_DIR", results=EVALUATION, config=EVALUATION_CONFIG),
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
        how="python benchmarks/steps_distribution.py ... --json FILE", results=STEPS, config=_SCRIPT
    ),
    "weight-against-loss": Kind(
        how="python benchmarks/weight_against_loss.py ... --json FILE", results=WEIGHTS, config=_SCRIPT
    ),
    "expert-growth": Kind(how="python benchmarks/expert_growth.py ... --json FILE", results=GROWTH, config=_SCRIPT),
}


def known_kinds() -> str:
    """For messages: what can be read, and where it comes from."""
    return "; ".join(f"{name} ({kind.how})" for name, kind in KINDS.items())
