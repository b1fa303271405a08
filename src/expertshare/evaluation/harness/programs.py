"""Programs out of answers to code benchmarks, and their tests: pass@1 in the sandbox."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from expertshare.evaluation.sandbox import Verdict, run_programs

TIMEOUT_S = 10.0
"""Of the reference solutions of MBPP one takes more than three seconds."""
FENCE = "```"
Record = Mapping[str, Any]


def verdict(benchmark: str, record: Record, answer: str) -> Verdict:
    """Run the answer's program with the record's tests."""
    prefix, tests = _PARTS[benchmark](record)
    [found] = run_programs([f"{program(prefix, answer)}\n\n{tests}\n"], timeout_s=TIMEOUT_S)
    return found


def program(prefix: str, answer: str) -> str:
    """The code of an answer that was to continue `prefix` inside a code fence.

    Chat models also start afresh, in a fence of their own: whatever compiles is taken, the continuation first.
    """
    continued = answer.partition(FENCE)[0]
    fresh = _first_block(answer)
    bodies = [text for text in (continued, fresh) if text.strip()]
    candidates = [*(prefix + body for body in bodies), *reversed(bodies), prefix + continued]
    return next((text for text in candidates if _compiles(text)), candidates[0])


def _first_block(answer: str) -> str:
    _, fence, rest = answer.partition(FENCE)
    if not fence:
        return answer
    language, newline, body = rest.partition("\n")
    block = body if newline and not language.strip().count(" ") else rest
    return block.partition(FENCE)[0]


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about code that a model wrote
            compile(text, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def _humaneval(record: Record) -> tuple[str, str]:
    return record["prompt"], f"{record['test']}\ncheck({record['entry_point']})"


def _mbpp(record: Record) -> tuple[str, str]:
    return "", "\n".join([record.get("test_setup_code") or "", *record["test_list"]])


def _pro(record: Record) -> tuple[str, str]:
    return pro_prefix(record), record["test_code"]


def pro_prefix(record: Record) -> str:
    """What the answer to a self-invoking problem continues: the first problem's head."""
    return f"{record['raw_problem'].strip()}\n"


_PARTS: dict[str, Callable[[Record], tuple[str, str]]] = {
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "humaneval_pro": _pro,
    "mbpp_pro": _pro,
}
