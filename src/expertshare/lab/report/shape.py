"""What a stored report must hold: a shape is checked once, so that what draws it later can rely on it."""

from __future__ import annotations

from collections.abc import Mapping
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


def numbers(*names: str) -> dict[str, Any]:
    """The shape of an object with a number under each name."""
    return dict.fromkeys(names, NUMBER)


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
