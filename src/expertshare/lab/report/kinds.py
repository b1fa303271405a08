"""The kinds of stored results that a report is made from: how each is known, and what it must hold. A shape is checked
once, so that what draws a result later can rely on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expertshare.errors import InputError

NUMBER, TEXT, FLAG = float, str, bool
_NAMES: dict[Any, str] = {NUMBER: "a number", TEXT: "a string", FLAG: "true or false"}
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Row:
    """A list of so many numbers."""

    length: int


@dataclass(frozen=True, slots=True)
class Each:
    """An object of any keys, whose values all have one shape."""

    shape: Any


def fields(shape: Any, *names: str) -> dict[str, Any]:
    """The shape of an object with a value of one shape under each name."""
    return dict.fromkeys(names, shape)


def numbers(*names: str) -> dict[str, Any]:
    """The shape of an object with a number under each name."""
    return fields(NUMBER, *names)


def check_shape(value: Any, shape: Any, where: str, file: str) -> None:
    """Raise InputError, naming file and key, unless `value` has the shape.

    A shape is NUMBER, TEXT or FLAG; a mapping of keys that must be there to shapes (others may be there too, and one
    that ends in "?" may be missing); a list of one shape, for any number of such entries; `Each`; `Row`; or a tuple of
    None and what it is otherwise.
    """
    if isinstance(shape, tuple):
        if value is not None:
            check_shape(value, shape[1], where, file)
    elif isinstance(shape, Row):
        fits = isinstance(value, list) and len(value) == shape.length and all(_is(entry, NUMBER) for entry in value)
        _expect(fits, f"a list of {shape.length} numbers", value, where, file)
    elif isinstance(shape, list):
        _expect(isinstance(value, list), "a list", value, where, file)
        for index, entry in enumerate(value):
            check_shape(entry, shape[0], f"{where}[{index}]", file)
    elif isinstance(shape, (Each, Mapping)):
        _expect(isinstance(value, Mapping), "an object", value, where, file)
        for name, inner in dict.fromkeys(value, shape.shape).items() if isinstance(shape, Each) else shape.items():
            key = name if isinstance(shape, Each) else name.removesuffix("?")
            if key in value:
                check_shape(value[key], inner, f"{where}.{key}", file)
            elif key == name:
                raise InputError(f"{file}: expected {where} to have {key!r}, it has none: cut off, edited, or too old")
    else:
        _expect(_is(value, shape), _NAMES[shape], value, where, file)


def _is(value: Any, kind: Any) -> bool:
    if kind is NUMBER:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _expect(holds: bool, what: str, value: Any, where: str, file: str) -> None:
    if not holds:
        shown = repr(value)
        short = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise InputError(f"{file}: expected {where} to be {what}, got {short}: cut off, edited, or too old")


Shape = Mapping[str, Any]
ENVIRONMENT: Shape = {"versions": Each(TEXT), "commit": (None, TEXT), "cpu": TEXT, **numbers("cpu_count", "threads")}
_MAYBE, _INTERVAL = (None, NUMBER), Row(2)
_KNOBS = {"top_p_experts?": NUMBER}
_RUN = {
    **fields(TEXT, "policy", "label"),
    **fields(_MAYBE, "accuracy", "retained", "retained_capped"),
    **numbers("unique_experts_reduction", "agreement"),
    "knobs": _KNOBS,
    "unique_experts": numbers("denoise"),
    "seconds_by_part": Each(NUMBER),
    "accuracy_interval": (None, _INTERVAL),
    "tasks": Each({**numbers("accuracy", "count"), "interval": _INTERVAL}),
    "difference": (None, numbers("value", "low", "high", "p_value")),
}
COMPARISON = {"runs": [_RUN], "reference": _RUN, "num_prompts": NUMBER}
COMPARISON_CONFIG = {
    "model": TEXT,
    "model_facts": numbers("block_length"),
    "decoding": {**numbers("gen_length", "block_length"), "threshold": _MAYBE},
    "batch_size": NUMBER,
}
_ROW = {
    **fields(TEXT, "task", "policy"),
    **numbers("count", "judged", "correct"),
    **fields(_MAYBE, "accuracy", "retained"),
    "interval": (None, _INTERVAL),
}
_SUMMARY = {
    "policy": TEXT,
    **fields(_MAYBE, "retained", "retained_capped", "unique_experts_reduction"),
    "retained_capped_interval": (None, _INTERVAL),
    "unique_experts": numbers("denoise"),
}
EVALUATION = {**fields([TEXT], "tasks", "policies"), "num_answers": NUMBER, "rows": [_ROW], "summary": [_SUMMARY]}
EVALUATION_CONFIG = {
    "model": TEXT,
    "policies": [{**fields(TEXT, "label", "policy"), "knobs": _KNOBS}],
    "identity": {"items": Each(NUMBER)},
    "config": {"limit": _MAYBE, "decoding": numbers("gen_length", "block_length")},
}
_VERIFIED = {
    "label": TEXT,
    **numbers("retained", "lower_bound", "unique_experts", "expert_bytes"),
    "counts": numbers("kept", "lost", "gained"),
    "seconds_per_block": _MAYBE,
}
TUNING = {
    "certified": FLAG,
    **fields(TEXT, "claim", "quality", "cost_kind"),
    **fields(_VERIFIED, "chosen", "vanilla"),
    "tested": [{**_VERIFIED, "passed": FLAG}],
    "tried": [_VERIFIED],
    "num_prompts": numbers("search", "certify"),
    "options": {**numbers("retain", "confidence"), "policies?": (None, [TEXT])},
}
_LIMITS = numbers("bandwidth_gb_per_s", "peak_gmac_per_s")
_CASE = {
    **fields(TEXT, "case", "backend"),
    **numbers("tokens", "unique", "ms", "bound_ms", "bytes", "macs", "gmac_per_s"),
    "ms_quartiles": _INTERVAL,
    "quantisation?": (None, TEXT),
}
_FIT = {**fields(TEXT, "case", "backend"), **numbers("us_per_expert", "r_squared")}
_FORWARD = {
    **fields(TEXT, "case", "backend", "policy"),
    **numbers("ms", "unique_experts?"),
    "ms_by_part?": Each(NUMBER),
}
_GENERATION = {
    **fields(TEXT, "model", "backend", "policy"),
    **numbers("batch_size", "tokens_per_s", "unique_experts?"),
    "tokens_per_s_range": _INTERVAL,
}
_STEPS = {
    "label": TEXT,
    **numbers("steps", "unique_experts", "cv", "cv_of_step_means"),
    "cv_by_layer": [NUMBER],
    "histogram_by_layer": [[NUMBER]],
    "by_step": [numbers("step", "mean", "std")],
}
_CORRELATION = {**numbers("pearson_r", "spearman_r", "pearson_r_by_expert"), "pearson_r_interval": _INTERVAL}
_KNOCKED_OUT = {
    **numbers("points", "blocks"),
    "weights": fields(_CORRELATION, "sum", "max", "tokens"),
    "sample": [Row(3)],
    "tenths": [numbers("weight", "increase")],
}
GROWTH = {
    **numbers("num_experts", "experts_per_token", "blocks", "exponent", "linear_r_squared"),
    "points": [numbers("tokens", "unique_experts", "independent", "macs_per_byte", "dense_macs_per_byte")],
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of result. how: the command that writes one; results, config: their shapes. fault: what does not fit
    together in them (config, results), None if all does."""

    how: str
    results: Shape
    config: Shape
    fault: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] = lambda *_: None


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


def _bench(verb: str, results: Shape, config: Shape) -> Kind:
    return Kind(f"expertshare bench {verb} ... --report FILE", {**_LIMITS, **results}, config)


def _script(name: str, results: Shape, *fault: Callable[..., str | None]) -> Kind:
    return Kind(f"python benchmarks/{name}.py ... --json FILE", results, {"model": TEXT}, *fault)


_OF_FORWARD = {"case": TEXT, "policies": [TEXT], "num_layers": NUMBER}
_OF_GENERATE = {**fields(TEXT, "name", "weights"), **numbers("num_layers", "num_prompts"), "policies": [TEXT]}
KINDS: dict[str, Kind] = {
    "eval": Kind("expertshare eval ... --out RUN_DIR", EVALUATION, EVALUATION_CONFIG, _evaluation_fault),
    "compare": Kind("expertshare compare ... --report FILE, or --json > FILE", COMPARISON, COMPARISON_CONFIG),
    "tune": Kind("expertshare tune ... --out FILE, or --json > FILE", TUNING, {}),
    "bench experts": _bench("experts", {"cases": [_CASE], "fits": [_FIT]}, {"cases": [TEXT]}),
    "bench forward": _bench("forward", {"forwards": [_FORWARD]}, _OF_FORWARD),
    "bench generate": _bench("generate", {"generations": [_GENERATION]}, _OF_GENERATE),
    "steps-distribution": _script("steps_distribution", {"runs": [_STEPS]}, _steps_fault),
    "weight-against-loss": _script("weight_against_loss", {"replaced": _KNOCKED_OUT, "dropped": _KNOCKED_OUT}),
    "expert-growth": _script("expert_growth", GROWTH, _growth_fault),
}


def known_kinds() -> str:
    """What can be read, and where it comes from, for messages."""
    return "; ".join(f"{name} ({kind.how})" for name, kind in KINDS.items())
