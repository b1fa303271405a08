"""Kind `code` (HumanEval-like): write one short function; unit tests decide.

Level 1 is one operation, level 2 two, level 3 three or one whose constant has to be computed first, without space to
write the computation down.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from expertshare.lab.tasks.expressions import (
    ARGUMENT_NAMES,
    FUNCTION_NAMES,
    Expression,
    InputKind,
    check_value,
    function_text,
    sample_inputs,
)
from expertshare.lab.tasks.facts import MAX_OPERAND, MAX_VALUE, PRODUCTS
from expertshare.lab.tasks.types import Draft, Draw, Task

NUM_TESTS = 4
Form = Callable[[Random, str], Expression]


def _shift(rng: Random, a: str) -> Expression:
    c = rng.randint(1, MAX_VALUE)
    if rng.random() < 0.5:
        return Expression(takes="int", asked=f"{a} plus {c}", written=f"{a} + {c}", meaning=lambda v: v + c)
    return Expression(takes="int", asked=f"{a} minus {c}", written=f"{a} - {c}", meaning=lambda v: v - c)


def _scale(rng: Random, a: str) -> Expression:
    c = rng.randint(2, MAX_VALUE)
    if rng.random() < 0.5:
        return Expression(takes="int", asked=f"{a} times {c}", written=f"{a} * {c}", meaning=lambda v: v * c)
    return Expression(
        takes="int",
        asked=f"{a} modulo {c}",
        written=f"{a} % {c}",
        meaning=lambda v: v % c,
        edges=(c, c + 1, -1),
    )


LIST_CALLS: tuple[tuple[str, str, Callable[[list[int]], object]], ...] = (
    ("the largest of {a}", "max({a})", max),
    ("the smallest of {a}", "min({a})", min),
    ("the sum of {a}", "sum({a})", sum),
    ("the length of {a}", "len({a})", len),
    ("{a} sorted", "sorted({a})", sorted),
    ("{a} reversed", "{a}[::-1]", lambda v: list(reversed(v))),
    ("the first of {a}", "{a}[0]", lambda v: next(iter(v))),
    ("the last of {a}", "{a}[-1]", lambda v: next(reversed(v))),
)
TEXT_CALLS: tuple[tuple[str, str, Callable[[str], object]], ...] = (
    ("{a} reversed", "{a}[::-1]", lambda v: "".join(reversed(v))),
    ("{a} in upper case", "{a}.upper()", str.upper),
    ("{a} in lower case", "{a}.lower()", str.lower),
    ("the length of {a}", "len({a})", len),
)


def _list_call(rng: Random, a: str) -> Expression:
    asked, written, meaning = rng.choice(LIST_CALLS)
    return Expression(
        takes="list",
        asked=asked.format(a=a),
        written=written.format(a=a),
        meaning=meaning,
        edges=([7, -2, 30, 4],),
    )


def _text_call(rng: Random, a: str) -> Expression:
    if rng.random() < 0.4:
        c = rng.randint(2, 9)
        return Expression(
            takes="str",
            asked=f"{a} repeated {c} times",
            written=f"{a} * {c}",
            meaning=lambda v: "".join([v] * c),
        )
    asked, written, meaning = rng.choice(TEXT_CALLS)
    return Expression(
        takes="str",
        asked=asked.format(a=a),
        written=written.format(a=a),
        meaning=meaning,
        edges=("Noon Day",),
    )


def _scale_shift(rng: Random, a: str) -> Expression:
    c, d = rng.randint(2, 9), rng.randint(1, 9)
    if rng.random() < 0.5:
        return Expression(
            takes="int",
            asked=f"{a} times {c} plus {d}",
            written=f"{a} * {c} + {d}",
            meaning=lambda v: c * v + d,
        )
    return Expression(
        takes="int", asked=f"{a} times {c} minus {d}", written=f"{a} * {c} - {d}", meaning=lambda v: c * v - d
    )


def _map(rng: Random, a: str) -> Expression:
    c = rng.randint(2, 9)
    if rng.random() < 0.5:
        asked, written = f"each of {a} plus {c}", f"[v + {c} for v in {a}]"
        return Expression(takes="list", asked=asked, written=written, meaning=lambda vs: [v + c for v in vs])
    asked, written = f"each of {a} times {c}", f"[v * {c} for v in {a}]"
    return Expression(takes="list", asked=asked, written=written, meaning=lambda vs: [c * v for v in vs])


def _filter(rng: Random, a: str) -> Expression:
    c = rng.randint(1, 9)
    edges = ([c - 1, c, c + 1, 25], [c + 2, -3, c])
    if rng.random() < 0.5:
        asked, written = f"those of {a} above {c}", f"[v for v in {a} if v > {c}]"
        return Expression(
            takes="list",
            asked=asked,
            written=written,
            meaning=lambda vs: [v for v in vs if v >= c + 1],
            edges=edges,
        )
    asked, written = f"those of {a} below {c}", f"[v for v in {a} if v < {c}]"
    return Expression(
        takes="list",
        asked=asked,
        written=written,
        meaning=lambda vs: [v for v in vs if v <= c - 1],
        edges=edges,
    )


def _choose(rng: Random, a: str) -> Expression:
    c, d = rng.randint(1, 9), rng.randint(0, 9)
    asked, written = f"{a} if {a} is above {c}, else {d}", f"{a} if {a} > {c} else {d}"
    return Expression(
        takes="int", asked=asked, written=written, meaning=lambda v: (d, v)[v > c], edges=(c - 1, c, c + 1)
    )


def _folded(rng: Random, a: str) -> Expression:
    """Two operations asked for, one to be written: its constant is a shared arithmetic fact."""
    if rng.random() < 0.3:
        fact = rng.choice(PRODUCTS)
        c, d = fact.left, fact.right
        asked = f"{a} times {c} and then times {d}, in one step"
        return Expression(takes="int", asked=asked, written=f"{a} * {c * d}", meaning=lambda v: v * c * d)
    d = rng.randint(1, MAX_OPERAND)
    if rng.random() < 0.5:
        c = rng.randint(1, MAX_VALUE - d)
        asked, written = f"{a} plus {c} and then plus {d}, in one step", f"{a} + {c + d}"
        return Expression(takes="int", asked=asked, written=written, meaning=lambda v: v + c + d)
    c = rng.randint(d + 1, MAX_VALUE)
    asked, written = f"{a} plus {c} and then minus {d}, in one step", f"{a} + {c - d}"
    return Expression(takes="int", asked=asked, written=written, meaning=lambda v: v + c - d)


def _folded_twice(rng: Random, a: str) -> Expression:
    """Three operations asked for, one to be written: two shared facts in a row."""
    c, d, e = fold_two(rng)
    asked = f"{a} plus {c} and then plus {d} and then minus {e}, in one step"
    return Expression(takes="int", asked=asked, written=f"{a} + {c + d - e}", meaning=lambda v: v + c + d - e)


def fold_two(rng: Random) -> tuple[int, int, int]:
    """Constants c, d, e such that c + d and c + d - e are facts with results of at least 1."""
    d, e = rng.randint(1, MAX_OPERAND), rng.randint(1, MAX_OPERAND)
    return rng.randint(max(1, e - d + 1), MAX_VALUE - d), d, e


def _choose_between(rng: Random, a: str) -> Expression:
    c, d, e = rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 9)
    asked = f"{a} plus {d} if {a} is above {c}, else {a} times {e}"
    written = f"{a} + {d} if {a} > {c} else {a} * {e}"
    return Expression(
        takes="int",
        asked=asked,
        written=written,
        meaning=lambda v: (v * e, v + d)[v > c],
        edges=(c, c + 1, -2),
    )


def _map_filter(rng: Random, a: str) -> Expression:
    c, d = rng.randint(2, 9), rng.randint(1, 9)
    edges = ([d - 1, d, d + 1, 25], [d + 2, -3, d])
    if rng.random() < 0.5:
        asked = f"each of {a} above {d}, times {c}"
        written = f"[v * {c} for v in {a} if v > {d}]"
        return Expression(
            takes="list",
            asked=asked,
            written=written,
            meaning=lambda vs: [c * v for v in vs if v - d > 0],
            edges=edges,
        )
    asked = f"the sum of those of {a} above {d}, plus {c}"
    written = f"sum(v for v in {a} if v > {d}) + {c}"
    return Expression(
        takes="list",
        asked=asked,
        written=written,
        meaning=lambda vs: c + sum(v for v in vs if v - d > 0),
        edges=edges,
    )


def _map_twice_filter(rng: Random, a: str) -> Expression:
    """Level 4: a filter with two operations, where training has one."""
    c, d, e = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    return Expression(
        takes="list",
        asked=f"each of {a} above {d}, times {c} plus {e}",
        written=f"[v * {c} + {e} for v in {a} if v > {d}]",
        meaning=lambda vs: [e + c * v for v in vs if v - d > 0],
        edges=([d - 1, d, d + 1, 25], [d + 2, -3, d]),
    )


INT_EASY: tuple[Form, ...] = (_shift, _scale)
INT_MEDIUM: tuple[Form, ...] = (_scale_shift, _choose)
EASY: tuple[Form, ...] = (_shift, _shift, _scale, _scale, _list_call, _text_call)
MEDIUM: tuple[Form, ...] = (_scale_shift, _map, _filter, _choose)
HARD: tuple[Form, ...] = (_folded, _folded_twice, _folded_twice, _choose_between, _map_filter)
_INPUT_KINDS: dict[Form, InputKind] = {
    _list_call: "list",
    _map: "list",
    _filter: "list",
    _map_filter: "list",
    _map_twice_filter: "list",
    _text_call: "str",
}


def compose(rng: Random, forms: tuple[Form, ...]) -> tuple[str, Expression]:
    """Draw an argument name and an expression over it."""
    form = rng.choice(forms)
    argument = rng.choice(ARGUMENT_NAMES[_INPUT_KINDS.get(form, "int")])
    return argument, form(rng, argument)


def _level(forms: tuple[Form, ...]) -> Draw:
    def draw(rng: Random) -> Draft:
        name = rng.choice(FUNCTION_NAMES)
        argument, expression = compose(rng, forms)
        inputs = sample_inputs(rng, expression.takes, expression.edges, NUM_TESTS)
        tests = tuple(check_value(name, v, expression.meaning(v)) for v in inputs)
        return Draft(
            prompt=f"Write {name}({argument}) that returns {expression.asked}.",
            reference=function_text(name, argument, expression.written),
            tests=tests,
        )

    return draw


TASK = Task(
    name="code",
    description="one short Python function, checked by unit tests, like HumanEval",
    levels=(_level(EASY), _level(MEDIUM), _level(HARD)),
    beyond=_level((_map_twice_filter,)),
)
