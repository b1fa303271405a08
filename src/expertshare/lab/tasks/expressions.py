"""Named expressions for the code kinds: how one is asked for, how it is written, what it means.

The meaning is a Python function of its own, never evaluated from the written text, so that the tests made
from it check the text independently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

InputKind = Literal["int", "list", "str"]
FUNCTION_NAMES = ("f", "g", "h", "run", "calc", "work", "apply", "make")
ARGUMENT_NAMES: dict[InputKind, tuple[str, ...]] = {
    "int": ("x", "n", "y", "k", "a", "num"),
    "list": ("items", "values", "nums", "data", "row", "xs"),
    "str": ("text", "word", "s", "name", "line", "title"),
}
SAMPLE_WORDS = ("Moss", "river", "Ab", "LEVEL", "tea", "x", "Quiet", "bOOk")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """One function body. `edges` are inputs worth testing (around a threshold, say); they come first."""

    takes: InputKind
    asked: str
    written: str
    meaning: Callable[[Any], Any]
    edges: tuple[Any, ...] = ()


def sample_input(rng: Random, takes: InputKind) -> Any:
    """A random value of the given kind; lists are non-empty with values on both sides of every threshold."""
    if takes == "int":
        return rng.randint(-9, 40)
    if takes == "list":
        return [*rng.sample(range(-4, 20), rng.randint(2, 5)), 25]
    return "".join(rng.sample(SAMPLE_WORDS, 2))


def sample_inputs(rng: Random, takes: InputKind, edges: tuple[Any, ...], count: int) -> list[Any]:
    """`count` distinct inputs, the edges first."""
    chosen = list(edges[:count])
    while len(chosen) < count:
        value = sample_input(rng, takes)
        if value not in chosen:
            chosen.append(value)
    return chosen


def check_value(name: str, value: Any, expected: Any) -> str:
    """The assert statement for one call. The type is compared too, for True == 1."""
    want = repr(expected)
    return f"assert {name}({value!r}) == {want} and type({name}({value!r})) is {type(expected).__name__}"


def function_text(name: str, argument: str, written: str) -> str:
    """The one layout in which every function is written."""
    return f"def {name}({argument}):\n    return {written}"
