"""Kinds `code` (HumanEval-like): write one short function, and `code_pro` (HumanEval-Pro-like): write a second one too,
which must call the first. Unit tests decide.

Level 1 of `code` is one operation, level 2 two, level 3 three or one whose constant has to be computed first, with no
line to write the computation on. The tests of `code_pro` call both functions, and one more replaces the first by a
recorder and sees whether the second reaches it.

What an expression means is a Python function of its own, never evaluated from the written text, so that the tests made
from it check the text independently.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from expertshare.lab.tasks.types import MAX_OPERAND, MAX_VALUE, PRODUCTS, Draft, Draw, Task

InputKind = Literal["int", "list", "str"]
FUNCTION_NAMES = ("f", "g", "h", "run", "calc", "work", "apply", "make")
ARGUMENT_NAMES: dict[InputKind, tuple[str, ...]] = {
    "int": ("x", "n", "y", "k", "a", "num"),
    "list": ("items", "values", "nums", "data", "row", "xs"),
    "str": ("text", "word", "s", "name", "line", "title"),
}
SAMPLE_WORDS = ("Moss", "river", "Ab", "LEVEL", "tea", "x", "Quiet", "bOOk")
Operation = tuple[str, str, Callable[[int, int], int]]  # as it is asked for, as it is written, what it means
PLUS: Operation = ("plus", "+", operator.add)
MINUS: Operation = ("minus", "-", operator.sub)
TIMES: Operation = ("times", "*", operator.mul)
MODULO: Operation = ("modulo", "%", operator.mod)
ABOVE: Operation = ("above", ">", operator.gt)
BELOW: Operation = ("below", "<", operator.lt)


@dataclass(frozen=True, slots=True)
class Expression:
    """One function body: how it is asked for, how it is written, what it means (of the input; a body that calls the
    first function also gets what that means, first). `edges` are inputs worth testing (around a threshold, say); they
    come first."""

    asked: str
    written: str
    meaning: Callable[..., Any]
    edges: tuple[Any, ...] = ()


Form = Callable[[Random, str], Expression]
CallerForm = Callable[[Random, str, str], Expression]


def _either(rng: Random, one: Operation, other: Operation) -> Operation:
    return one if rng.random() < 0.5 else other


def _operate(a: str, operation: Operation, c: int, edges: tuple[int, ...] = ()) -> Expression:
    word, symbol, meaning = operation
    return Expression(f"{a} {word} {c}", f"{a} {symbol} {c}", lambda v: meaning(v, c), edges)


def _shift(rng: Random, a: str) -> Expression:
    c = rng.randint(1, MAX_VALUE)
    return _operate(a, _either(rng, PLUS, MINUS), c)


def _scale(rng: Random, a: str) -> Expression:
    c = rng.randint(2, MAX_VALUE)
    operation = _either(rng, TIMES, MODULO)
    return _operate(a, operation, c, (c, c + 1, -1) if operation is MODULO else ())


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
    return Expression(asked.format(a=a), written.format(a=a), meaning, ([7, -2, 30, 4],))


def _text_call(rng: Random, a: str) -> Expression:
    if rng.random() < 0.4:
        c = rng.randint(2, 9)
        return Expression(f"{a} repeated {c} times", f"{a} * {c}", lambda v: "".join([v] * c))
    asked, written, meaning = rng.choice(TEXT_CALLS)
    return Expression(asked.format(a=a), written.format(a=a), meaning, ("Noon Day",))


def _scale_shift(rng: Random, a: str) -> Expression:
    c, d = rng.randint(2, 9), rng.randint(1, 9)
    word, symbol, meaning = _either(rng, PLUS, MINUS)
    return Expression(f"{a} times {c} {word} {d}", f"{a} * {c} {symbol} {d}", lambda v: meaning(c * v, d))


def _map(rng: Random, a: str) -> Expression:
    c = rng.randint(2, 9)
    word, symbol, meaning = _either(rng, PLUS, TIMES)
    asked, written = f"each of {a} {word} {c}", f"[v {symbol} {c} for v in {a}]"
    return Expression(asked, written, lambda vs: [meaning(v, c) for v in vs])


def _around(c: int) -> tuple[list[int], list[int]]:
    """Lists that a filter at `c` must get right."""
    return [c - 1, c, c + 1, 25], [c + 2, -3, c]


def _filter(rng: Random, a: str) -> Expression:
    c = rng.randint(1, 9)
    word, symbol, meaning = _either(rng, ABOVE, BELOW)
    asked, written = f"those of {a} {word} {c}", f"[v for v in {a} if v {symbol} {c}]"
    return Expression(asked, written, lambda vs: [v for v in vs if meaning(v, c)], _around(c))


def _choose(rng: Random, a: str) -> Expression:
    c, d = rng.randint(1, 9), rng.randint(0, 9)
    asked, written = f"{a} if {a} is above {c}, else {d}", f"{a} if {a} > {c} else {d}"
    return Expression(asked, written, lambda v: (d, v)[v > c], (c - 1, c, c + 1))


def _folded(rng: Random, a: str) -> Expression:
    """Two operations asked for, one to be written: its constant is a shared arithmetic fact."""
    if rng.random() < 0.3:
        fact = rng.choice(PRODUCTS)
        c, d = fact.left, fact.right
        return Expression(f"{a} times {c} and then times {d}, in one step", f"{a} * {c * d}", lambda v: v * c * d)
    d = rng.randint(1, MAX_OPERAND)
    word, _, meaning = _either(rng, PLUS, MINUS)
    c = rng.randint(1, MAX_VALUE - d) if word == "plus" else rng.randint(d + 1, MAX_VALUE)
    asked, written = f"{a} plus {c} and then {word} {d}, in one step", f"{a} + {meaning(c, d)}"
    return Expression(asked, written, lambda v: meaning(v + c, d))


def _folded_twice(rng: Random, a: str) -> Expression:
    """Three operations asked for, one to be written: c + d and c + d - e are facts with results of at least 1."""
    d, e = rng.randint(1, MAX_OPERAND), rng.randint(1, MAX_OPERAND)
    c = rng.randint(max(1, e - d + 1), MAX_VALUE - d)
    asked = f"{a} plus {c} and then plus {d} and then minus {e}, in one step"
    return Expression(asked, f"{a} + {c + d - e}", lambda v: v + c + d - e)


def _choose_between(rng: Random, a: str) -> Expression:
    c, d, e = rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 9)
    asked = f"{a} plus {d} if {a} is above {c}, else {a} times {e}"
    written = f"{a} + {d} if {a} > {c} else {a} * {e}"
    return Expression(asked, written, lambda v: (v * e, v + d)[v > c], (c, c + 1, -2))


def _map_filter(rng: Random, a: str) -> Expression:
    c, d = rng.randint(2, 9), rng.randint(1, 9)
    if rng.random() < 0.5:
        asked, written = f"each of {a} above {d}, times {c}", f"[v * {c} for v in {a} if v > {d}]"
        return Expression(asked, written, lambda vs: [c * v for v in vs if v - d > 0], _around(d))
    asked, written = f"the sum of those of {a} above {d}, plus {c}", f"sum(v for v in {a} if v > {d}) + {c}"
    return Expression(asked, written, lambda vs: c + sum(v for v in vs if v - d > 0), _around(d))


def _map_twice_filter(rng: Random, a: str) -> Expression:
    """Level 4: a filter with two operations, where training has one."""
    c, d, e = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    asked, written = f"each of {a} above {d}, times {c} plus {e}", f"[v * {c} + {e} for v in {a} if v > {d}]"
    return Expression(asked, written, lambda vs: [e + c * v for v in vs if v - d > 0], _around(d))


def _of_result(form: Form) -> CallerForm:
    """The form over what the first function gives for the argument."""

    def call(rng: Random, f: str, a: str) -> Expression:
        body = form(rng, f"{f}({a})")
        return Expression(body.asked, body.written, lambda first, v: body.meaning(first(v)))

    return call


def _add_twice(rng: Random, a: str) -> Expression:
    d = rng.randint(1, MAX_OPERAND)
    c = rng.randint(1, MAX_VALUE - d)
    return Expression(f"{a} plus {c} and then plus {d}, in one step", f"{a} + {c + d}", lambda v: v + c + d)


def _twice(_rng: Random, f: str, a: str) -> Expression:
    return Expression(f"{f}({f}({a}))", f"{f}({f}({a}))", lambda first, v: first(first(v)))


def _each(_rng: Random, f: str, a: str) -> Expression:
    return Expression(f"{f} of each of {a}", f"[{f}(v) for v in {a}]", lambda first, vs: list(map(first, vs)))


def _total(_rng: Random, f: str, a: str) -> Expression:
    asked, written = f"the sum of {f} of each of {a}", f"sum({f}(v) for v in {a})"
    return Expression(asked, written, lambda first, vs: sum(map(first, vs)))


def _guarded(rng: Random, f: str, a: str) -> Expression:
    c = rng.randint(1, 9)
    asked, written = f"{f}({a}) if {a} is above {c}, else {a}", f"{f}({a}) if {a} > {c} else {a}"
    return Expression(asked, written, lambda first, v: first(v) if v >= c + 1 else v, (c + 1, c, c - 1))


def _guarded_shift(rng: Random, f: str, a: str) -> Expression:
    """Level 4: a guard and a shift together, where training has either."""
    c, d = rng.randint(1, 9), rng.randint(1, 9)
    asked, written = f"{f}({a}) plus {d} if {a} is above {c}, else {a}", f"{f}({a}) + {d} if {a} > {c} else {a}"
    return Expression(asked, written, lambda first, v: first(v) + d if v >= c + 1 else v, (c + 1, c, c - 1))


INT_EASY: tuple[Form, ...] = (_shift, _scale)
INT_MEDIUM: tuple[Form, ...] = (_scale_shift, _choose)
EASY: tuple[Form, ...] = (_shift, _shift, _scale, _scale, _list_call, _text_call)
MEDIUM: tuple[Form, ...] = (_scale_shift, _map, _filter, _choose)
HARD: tuple[Form, ...] = (_folded, _folded_twice, _folded_twice, _choose_between, _map_filter)
_INPUT_KINDS: dict[Form | CallerForm, InputKind] = {
    **dict.fromkeys((_list_call, _map, _filter, _map_filter, _map_twice_filter, _each, _total), "list"),
    _text_call: "str",
}  # all others take an int

_multiplied = _of_result(lambda rng, a: _operate(a, TIMES, rng.randint(2, 9)))
_shifted, _folded_result = _of_result(_shift), _of_result(_folded_twice)
EASY_CALLERS: tuple[CallerForm, ...] = (_shifted, _multiplied, _twice)
MEDIUM_CALLERS: tuple[CallerForm, ...] = (_each, _total, _shifted)
HARD_CALLERS: tuple[CallerForm, ...] = (_guarded, _of_result(_add_twice), _folded_result, _folded_result, _total)


def _compose(rng: Random, forms: tuple[Form, ...]) -> tuple[InputKind, str, Expression]:
    """Draw what the function takes, what it calls that, and an expression over it."""
    form = rng.choice(forms)
    takes = _INPUT_KINDS.get(form, "int")
    argument = rng.choice(ARGUMENT_NAMES[takes])
    return takes, argument, form(rng, argument)


SAMPLERS: dict[InputKind, Callable[[Random], Any]] = {
    "int": lambda rng: rng.randint(-9, 40),
    "list": lambda rng: [*rng.sample(range(-4, 20), rng.randint(2, 5)), 25],  # on both sides of every threshold
    "str": lambda rng: "".join(rng.sample(SAMPLE_WORDS, 2)),
}


def _sample_inputs(rng: Random, takes: InputKind, edges: tuple[Any, ...], count: int) -> list[Any]:
    """`count` distinct inputs, the edges first."""
    chosen = list(edges[:count])
    while len(chosen) < count:
        if (value := SAMPLERS[takes](rng)) not in chosen:
            chosen.append(value)
    return chosen


def _check_value(name: str, value: Any, expected: Any) -> str:
    """The assert statement for one call. The type is compared too, for True == 1."""
    want = repr(expected)
    return f"assert {name}({value!r}) == {want} and type({name}({value!r})) is {type(expected).__name__}"


def _check_calls(first: str, second: str, value: Any) -> str:
    """Statements that fail unless `second(value)` calls the global `first`; they put `first` back."""
    recorder = f"def {first}(value):\n    _seen.append(value)\n    return _kept(value)"
    return f"_kept, _seen = {first}, []\n{recorder}\n{second}({value!r})\n{first} = _kept\nassert _seen"


def _function_text(name: str, argument: str, written: str) -> str:
    """The one layout in which every function is written."""
    return f"def {name}({argument}):\n    return {written}"


def _one_function(forms: tuple[Form, ...]) -> Draw:
    def draw(rng: Random) -> Draft:
        name = rng.choice(FUNCTION_NAMES)
        takes, argument, body = _compose(rng, forms)
        inputs = _sample_inputs(rng, takes, body.edges, 4)
        return Draft(
            prompt=f"Write {name}({argument}) that returns {body.asked}.",
            reference=_function_text(name, argument, body.written),
            tests=tuple(_check_value(name, v, body.meaning(v)) for v in inputs),
        )

    return draw


def _two_functions(first_forms: tuple[Form, ...], second_forms: tuple[CallerForm, ...]) -> Draw:
    def draw(rng: Random) -> Draft:
        first, second = rng.sample(FUNCTION_NAMES, 2)
        first_takes, first_argument, body = _compose(rng, first_forms)
        form = rng.choice(second_forms)
        takes = _INPUT_KINDS.get(form, "int")
        # The same argument name twice would make no difference to the model; a list needs a name of its own.
        argument = rng.choice(ARGUMENT_NAMES["list"]) if takes == "list" else first_argument
        caller = form(rng, first, argument)
        first_inputs = _sample_inputs(rng, first_takes, body.edges, 3)
        inputs = _sample_inputs(rng, takes, caller.edges, 3)
        tests = [_check_value(first, v, body.meaning(v)) for v in first_inputs]
        tests += [_check_value(second, v, caller.meaning(body.meaning, v)) for v in inputs]
        asked = f"Write {first}({first_argument}) that returns {body.asked}."
        written = _function_text(first, first_argument, body.written)
        return Draft(
            prompt=f"{asked} Then write {second}({argument}) that returns {caller.asked}.",
            reference=f"{written}\n{_function_text(second, argument, caller.written)}",
            tests=(*tests, _check_calls(first, second, inputs[0])),
        )

    return draw


TASK = Task(
    name="code",
    levels=(_one_function(EASY), _one_function(MEDIUM), _one_function(HARD)),
    beyond=_one_function((_map_twice_filter,)),
)
SELF_INVOKING = Task(
    name="code_pro",
    levels=(
        _two_functions(INT_EASY, EASY_CALLERS),
        _two_functions((*INT_EASY, *INT_MEDIUM), MEDIUM_CALLERS),
        _two_functions(INT_MEDIUM, HARD_CALLERS),
    ),
    beyond=_two_functions(INT_MEDIUM, (_guarded_shift,)),
)
