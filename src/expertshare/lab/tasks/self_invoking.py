"""Kind `code_pro` (HumanEval-Pro-like): write a function, then a second one that must call the first.

The tests call both, and one more replaces the first by a recorder and sees whether the second reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from expertshare.lab.tasks.expressions import (
    ARGUMENT_NAMES,
    FUNCTION_NAMES,
    InputKind,
    check_value,
    function_text,
    sample_inputs,
)
from expertshare.lab.tasks.facts import MAX_OPERAND, MAX_VALUE
from expertshare.lab.tasks.functions import INT_EASY, INT_MEDIUM, Form, compose, fold_two
from expertshare.lab.tasks.types import Draft, Draw, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class _Caller:
    """The second function: like an Expression whose meaning also takes the first function's meaning."""

    takes: InputKind
    asked: str
    written: str
    meaning: Callable[[Callable[[Any], Any], Any], Any]
    edges: tuple[Any, ...] = ()


CallerForm = Callable[[Random, str, str], _Caller]


def _shifted(rng: Random, f: str, a: str) -> _Caller:
    c = rng.randint(1, MAX_VALUE)
    if rng.random() < 0.5:
        return _Caller(
            takes="int",
            asked=f"{f}({a}) plus {c}",
            written=f"{f}({a}) + {c}",
            meaning=lambda first, v: first(v) + c,
        )
    return _Caller(
        takes="int",
        asked=f"{f}({a}) minus {c}",
        written=f"{f}({a}) - {c}",
        meaning=lambda first, v: first(v) - c,
    )


def _scaled(rng: Random, f: str, a: str) -> _Caller:
    c = rng.randint(2, 9)
    return _Caller(
        takes="int",
        asked=f"{f}({a}) times {c}",
        written=f"{f}({a}) * {c}",
        meaning=lambda first, v: c * first(v),
    )


def _twice(_rng: Random, f: str, a: str) -> _Caller:
    return _Caller(
        takes="int",
        asked=f"{f}({f}({a}))",
        written=f"{f}({f}({a}))",
        meaning=lambda first, v: first(first(v)),
    )


def _each(_rng: Random, f: str, a: str) -> _Caller:
    return _Caller(
        takes="list",
        asked=f"{f} of each of {a}",
        written=f"[{f}(v) for v in {a}]",
        meaning=lambda first, vs: list(map(first, vs)),
    )


def _total(_rng: Random, f: str, a: str) -> _Caller:
    return _Caller(
        takes="list",
        asked=f"the sum of {f} of each of {a}",
        written=f"sum({f}(v) for v in {a})",
        meaning=lambda first, vs: sum(map(first, vs)),
    )


def _guarded(rng: Random, f: str, a: str) -> _Caller:
    c = rng.randint(1, 9)
    return _Caller(
        takes="int",
        asked=f"{f}({a}) if {a} is above {c}, else {a}",
        written=f"{f}({a}) if {a} > {c} else {a}",
        meaning=lambda first, v: first(v) if v >= c + 1 else v,
        edges=(c + 1, c, c - 1),
    )


def _folded(rng: Random, f: str, a: str) -> _Caller:
    d = rng.randint(1, MAX_OPERAND)
    c = rng.randint(1, MAX_VALUE - d)
    return _Caller(
        takes="int",
        asked=f"{f}({a}) plus {c} and then plus {d}, in one step",
        written=f"{f}({a}) + {c + d}",
        meaning=lambda first, v: first(v) + c + d,
    )


def _folded_twice(rng: Random, f: str, a: str) -> _Caller:
    c, d, e = fold_two(rng)
    return _Caller(
        takes="int",
        asked=f"{f}({a}) plus {c} and then plus {d} and then minus {e}, in one step",
        written=f"{f}({a}) + {c + d - e}",
        meaning=lambda first, v: first(v) + c + d - e,
    )


def _guarded_shift(rng: Random, f: str, a: str) -> _Caller:
    """Level 4: a guard and a shift together, where training has either."""
    c, d = rng.randint(1, 9), rng.randint(1, 9)
    return _Caller(
        takes="int",
        asked=f"{f}({a}) plus {d} if {a} is above {c}, else {a}",
        written=f"{f}({a}) + {d} if {a} > {c} else {a}",
        meaning=lambda first, v: first(v) + d if v >= c + 1 else v,
        edges=(c + 1, c, c - 1),
    )


def check_calls(first: str, second: str, value: Any) -> str:
    """Statements that fail unless `second(value)` calls the global `first`; they put `first` back."""
    return (
        f"_kept, _seen = {first}, []\n"
        f"def {first}(value):\n"
        f"    _seen.append(value)\n"
        f"    return _kept(value)\n"
        f"{second}({value!r})\n"
        f"{first} = _kept\n"
        f"assert _seen"
    )


def _level(first_forms: tuple[Form, ...], second_forms: tuple[CallerForm, ...]) -> Draw:
    def draw(rng: Random) -> Draft:
        first, second = rng.sample(FUNCTION_NAMES, 2)
        first_argument, body = compose(rng, first_forms)
        form = rng.choice(second_forms)
        over_list = form in (_each, _total)
        # The same argument name twice would make no difference to the model; a list needs a name of its own.
        argument = rng.choice(ARGUMENT_NAMES["list"]) if over_list else first_argument
        caller = form(rng, first, argument)
        first_inputs = sample_inputs(rng, body.takes, body.edges, 3)
        inputs = sample_inputs(rng, caller.takes, caller.edges, 3)
        tests = [check_value(first, v, body.meaning(v)) for v in first_inputs]
        tests += [check_value(second, v, caller.meaning(body.meaning, v)) for v in inputs]
        return Draft(
            prompt=(
                f"Write {first}({first_argument}) that returns {body.asked}. "
                f"Then write {second}({argument}) that returns {caller.asked}."
            ),
            reference="\n".join(
                [
                    function_text(first, first_argument, body.written),
                    function_text(second, argument, caller.written),
                ]
            ),
            tests=(*tests, check_calls(first, second, inputs[0])),
        )

    return draw


EASY_CALLERS: tuple[CallerForm, ...] = (_shifted, _scaled, _twice)
MEDIUM_CALLERS: tuple[CallerForm, ...] = (_each, _total, _shifted)
HARD_CALLERS: tuple[CallerForm, ...] = (_guarded, _folded, _folded_twice, _folded_twice, _total)

TASK = Task(
    name="code_pro",
    description="two functions, the second calling the first, like HumanEval-Pro",
    levels=(
        _level(INT_EASY, EASY_CALLERS),
        _level((*INT_EASY, *INT_MEDIUM), MEDIUM_CALLERS),
        _level(INT_MEDIUM, HARD_CALLERS),
    ),
    beyond=_level(INT_MEDIUM, (_guarded_shift,)),
)
