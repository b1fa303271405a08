"""BENCHMARKS: which tasks of lm-evaluation-harness make up a benchmark, which of their metrics is its accuracy, what
its files hold, and how an answer that is code becomes a program."""

from __future__ import annotations

import ast
import csv
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import InputError
from expertshare.evaluation.sandbox import Verdict, run_programs

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


Record = dict[str, Any]
Splits = dict[str, list[Record]]
TIMEOUT_S = 10.0
"""Of the reference solutions of MBPP one takes more than three seconds."""
FENCE = "```"
MBPP_PROMPTS, MBPP_TEST = range(1, 11), range(11, 511)
"""Task ids of the examples and of the test split (google-research's README of MBPP)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """parts: task of the harness by the name of the part ("" where there is one part only).

    read: records by split, in the columns of the hub, from a folder of files, for a part; InputError for a file that is
    missing or not what its name says. metric: (filter, metric) of the harness that says whether an answer is right.
    number: the column with the right number, by whose value answers are judged instead; the harness's verdict is told
    beside it. folders: of the harness's tasks to search; none for task files of ours. code: what an answer continues,
    and the tests that are run behind it; with it there is no metric.
    """

    name: str
    parts: Mapping[str, str]
    read: Callable[[Path, str], Splits]
    metric: tuple[str, str] | None = None
    number: str | None = None
    folders: tuple[str, ...] = ()
    code: Callable[[Mapping[str, Any]], tuple[str, str]] | None = None


def verdict(benchmark: str, record: Mapping[str, Any], answer: str) -> Verdict:
    """Run the program of an answer to a code benchmark with the record's tests: pass@1 in the sandbox."""
    code = BENCHMARKS[benchmark].code
    assert code is not None
    prefix, tests = code(record)
    [found] = run_programs([f"{program(prefix, answer)}\n\n{tests}\n"], timeout_s=TIMEOUT_S)
    return found


def program(prefix: str, answer: str) -> str:
    """The code of an answer that was to continue `prefix` inside a code fence.

    Chat models also start afresh, in a fence of their own: whatever compiles and does something is taken, the
    continuation first. A heading before the fence may well compile, as a name, but it does nothing.
    """
    continued = answer.partition(FENCE)[0]
    fresh = _first_block(answer)
    bodies = [text for text in (continued, fresh) if text.strip()]
    candidates = [*(prefix + body for body in bodies), *reversed(bodies), prefix + continued]
    idle = _statements(prefix) or 0
    return next((text for text in candidates if (_statements(text) or 0) > idle), candidates[0])


def _first_block(answer: str) -> str:
    _, fence, rest = answer.partition(FENCE)
    if not fence:
        return answer
    language, newline, body = rest.partition("\n")
    block = body if newline and not language.strip().count(" ") else rest
    return block.partition(FENCE)[0]


def _statements(text: str) -> int | None:
    """Statements of a program that do something: bare names and constants do not. None where it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about code that a model wrote
            compile(text, "<answer>", "exec", dont_inherit=True)
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None
    idle = [node for node in nodes if isinstance(node, ast.Expr) and not any(map(_acts, ast.walk(node)))]
    return sum(isinstance(node, ast.stmt) for node in nodes) - len(idle)


def _acts(node: ast.AST) -> bool:
    return isinstance(node, ast.Call | ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr)


def _lines(pattern: str, splits: Iterable[str], *columns: str) -> Callable[[Path, str], Splits]:
    """Reads one JSONL file for each split, whose name stands in the place of {}."""
    return lambda folder, _: {split: _jsonl(folder / pattern.format(split), *columns) for split in splits}


def _arc(folder: Path, part: str) -> Splits:
    read = _lines("arc_challenge/{}.jsonl", ("train", "test"), "question", "choices", "answer")(folder, part)
    found = {split: [_arc_record(record) for record in records] for split, records in read.items()}
    return {**found, "validation": found["train"]}  # the harness names one, and asks nothing of it


def _arc_record(record: Record) -> Record:
    texts = list(record["choices"])
    labels = list("ABCDE")[: len(texts)]
    choices = {"text": texts, "label": labels}
    return {"question": record["question"], "choices": choices, "answerKey": labels[record["answer"]]}


def _mmlu(folder: Path, subject: str) -> Splits:
    return {
        split: [
            {
                "question": row["question"],
                "choices": [row[f"choice{number}"] for number in range(4)],
                "answer": int(row["answer"]),
                "subject": subject,
            }
            for row in _csv(folder / "mmlu" / split / f"{subject}_{split}.csv")
        ]
        for split in ("dev", "test")
    }


def _mbpp(folder: Path, _: str) -> Splits:
    columns = ("text", "code", "task_id", "test_list", "test_setup_code")
    read = _jsonl(folder / "mbpp" / "mbpp.jsonl", *columns)
    records = [{name: record[name] for name in columns} for record in read]
    return {
        split: [record for record in records if record["task_id"] in ids]
        for split, ids in (("prompt", MBPP_PROMPTS), ("test", MBPP_TEST))
    }


def _jsonl(path: Path, *columns: str) -> list[Record]:
    lines = [line for line in _text(path).split("\n") if line.strip()]
    return _checked([_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)], path, *columns)


def _csv(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(_text(path).splitlines(keepends=True)))
    return _checked(rows, path, "question", "choice0", "choice1", "choice2", "choice3", "answer")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            f"expected the benchmark file {path}, got: {reason}; docs/evaluation.md says which files --data holds"
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: expected JSON, got an error at column {error.colno}: {error.msg}") from error


def _checked(records: Iterable[Any], path: Path, *columns: str) -> list[Any]:
    found = list(records)
    for number, record in enumerate(found, 1):
        missing = [name for name in columns if not isinstance(record, dict) or record.get(name) is None]
        if missing:
            raise InputError(f"{path}, record {number}: expected {', '.join(columns)}, got none of {missing[0]!r}")
    if not found:
        raise InputError(f"expected records in {path}, got none")
    return found


def _of_subjects(name: str, subjects: Iterable[str]) -> Benchmark:
    return Benchmark(
        name=name,
        parts={subject: f"mmlu_{subject}_generative" for subject in subjects},
        read=_mmlu,
        metric=("get_response", "exact_match"),
        folders=("mmlu/generative",),
    )


def _pro(name: str) -> Benchmark:
    """Self-invoking problems: an answer continues the first problem's head."""

    def read(folder: Path, _: str) -> Splits:
        path = folder / "codeeval_pro" / f"{name}.json"
        value = _parse(_text(path), f"{path}")
        if not isinstance(value, list):
            raise InputError(f"expected a list of problems in {path}, got {type(value).__name__}")
        return {"train": _checked(value, path, "raw_problem", "new_problem", "test_code")}

    return Benchmark(
        name=name,
        parts={"": f"expertshare_{name}"},
        read=read,
        code=lambda record: (f"{record['raw_problem'].strip()}\n", record["test_code"]),
    )


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="gsm8k",
            parts={"": "gsm8k"},
            read=_lines("gsm8k/{}.jsonl", ("train", "test"), "question", "answer"),
            metric=("flexible-extract", "exact_match"),
            number="answer",
            folders=("gsm8k",),
        ),
        Benchmark(
            name="math500",
            parts={"": "minerva_math500"},
            read=_lines("math500/{}.jsonl", ("test",), "problem", "solution", "answer"),
            metric=("none", "math_verify"),
            folders=("minerva_math",),
        ),
        Benchmark(
            name="arc_c",
            parts={"": "arc_challenge_chat"},
            read=_arc,
            metric=("remove_whitespace", "exact_match"),
            folders=("arc",),
        ),
        _of_subjects("mmlu", SUBJECTS),
        _of_subjects("mmlu_math", MATHS_SUBJECTS),
        _of_subjects("mmlu_hs_math", ("high_school_mathematics",)),
        Benchmark(
            name="humaneval",
            parts={"": "expertshare_humaneval"},
            read=_lines("humaneval/HumanEval.jsonl", ("test",), "prompt", "entry_point", "test"),
            code=lambda record: (record["prompt"], f"{record['test']}\ncheck({record['entry_point']})"),
        ),
        Benchmark(
            name="mbpp",
            parts={"": "expertshare_mbpp"},
            read=_mbpp,
            code=lambda record: ("", "\n".join([record.get("test_setup_code") or "", *record["test_list"]])),
        ),
        _pro("humaneval_pro"),
        _pro("mbpp_pro"),
    )
}
