"""BENCHMARKS: which tasks of lm-evaluation-harness make up a benchmark, and which of their metrics is its accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MATHS_SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
# fmt: off
SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """parts: task of the harness by the name of the part ("" where there is one part only).

    metric: (filter, metric) of the harness that says whether an answer is right; None for code, which is judged by
    running it. folders: of the harness's tasks to search; none for task files of ours. data: what `local_data` reads.
    """

    name: str
    parts: Mapping[str, str]
    metric: tuple[str, str] | None
    folders: tuple[str, ...] = field(default=())
    data: str


def _mmlu(name: str, subjects: tuple[str, ...]) -> Benchmark:
    return Benchmark(
        name=name,
        parts={subject: f"mmlu_{subject}_generative" for subject in subjects},
        metric=("get_response", "exact_match"),
        folders=("mmlu/generative",),
        data="mmlu",
    )


def _code(name: str) -> Benchmark:
    return Benchmark(name=name, parts={"": f"expertshare_{name}"}, metric=None, data=name)


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="gsm8k",
            parts={"": "gsm8k"},
            metric=("flexible-extract", "exact_match"),
            folders=("gsm8k",),
            data="gsm8k",
        ),
        Benchmark(
            name="math500",
            parts={"": "minerva_math500"},
            metric=("none", "math_verify"),
            folders=("minerva_math",),
            data="math500",
        ),
        Benchmark(
            name="arc_c",
            parts={"": "arc_challenge_chat"},
            metric=("remove_whitespace", "exact_match"),
            folders=("arc",),
            data="arc_c",
        ),
        _mmlu("mmlu", SUBJECTS),
        _mmlu("mmlu_math", MATHS_SUBJECTS),
        _mmlu("mmlu_hs_math", ("high_school_mathematics",)),
        _code("humaneval"),
        _code("mbpp"),
        _code("humaneval_pro"),
        _code("mbpp_pro"),
    )
}
