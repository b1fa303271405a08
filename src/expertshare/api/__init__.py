"""expertshare from Python: the same verbs as the command line, with values instead of tables.

Example:

    from expertshare.api import compare, generate, info, load
    from expertshare.evaluation.prompts import read_prompts

    model = load("path/to/model")                     # a directory in Hugging Face layout, or a hub id
    print(info(model).router_rule, info(model).min_coreset_inside)

    result = generate(model, "What is 7 plus 8?", policy="des-vote:budget=16", gen_length=64)
    print(result.answers[0].text, result.cost.unique_experts["denoise"])

    comparison = compare(model, read_prompts("prompts.jsonl"), ["vanilla", "des-vote:budget=16", "des-seq"])
    for run in comparison.runs:
        print(run.label, run.reduction, run.agreement.tokens, run.accuracy.overall)

    evaluation = evaluate(model, ["arith", "math"], ["des-vote:budget=28"], out="runs/vote", limit=50)
    print(evaluation.results["summary"])
    tuned = tune(model, read_prompts("prompts.jsonl"))
    print(tuned.sentence())
    report(["runs/vote"], "runs/report")              # report.html and its pictures
    tuned.policy_file().write("policy.json")          # generate(model, ..., policy=load_policy("policy.json"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertshare.api.generation import Generated, generate
    from expertshare.api.loading import DTYPES, DecodingValue, Model, info, load
    from expertshare.api.measuring import (
        DEFAULT_TITLE,
        compare,
        comparison_report,
        evaluate,
        load_policy,
        report,
        tune,
    )

__all__ = [
    "DEFAULT_TITLE",
    "DTYPES",
    "DecodingValue",
    "Generated",
    "Model",
    "compare",
    "comparison_report",
    "evaluate",
    "generate",
    "info",
    "load",
    "load_policy",
    "report",
    "tune",
]

_MODULES = {
    "generation": ("Generated", "generate"),
    "loading": ("DTYPES", "DecodingValue", "Model", "info", "load"),
    "measuring": ("DEFAULT_TITLE", "compare", "comparison_report", "evaluate", "load_policy", "report", "tune"),
}
"""Module of this package: the names that it gives. It is imported when one of them is first used."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
