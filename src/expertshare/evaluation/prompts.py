"""Prompts with what their answers are judged by, and their files: JSONL, one object per line with "prompt" and
optionally "reference", "task", "tests"."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from expertshare.errors import InputError, nearest

KEYS = ("prompt", "reference", "task", "tests")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """One line of a prompt file; only `prompt` is required there.

    task: a name of `scoring.ANSWER_RULES`. tests: Python statements that must run without an exception after the
    answer's code.
    """

    task: str | None = None
    prompt: str
    reference: str | None = None
    tests: tuple[str, ...] = ()


def write_prompts(path: str | Path, items: Iterable[PromptRecord]) -> None:
    """One line per item, in a form that read_prompts takes back; keys without a value are left out."""
    present = ({key: value for key in KEYS if (value := getattr(item, key)) not in (None, ())} for item in items)
    lines = (json.dumps(values, ensure_ascii=False) + "\n" for values in present)
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def read_prompts(source: str | Path | TextIO) -> list[PromptRecord]:
    """The records of a file or an open text stream; empty lines are skipped.

    Raises InputError, with the source's name and the line number, for anything but such records, and for a
    source without any.
    """
    name, text = _text(source)
    lines = enumerate(text.split("\n"), 1)
    records = [_record(line, f"{name}, line {number}") for number, line in lines if line.strip()]
    if not records:
        raise InputError(f'expected at least one JSON object with "prompt" in {name}, got none')
    return records


def _text(source: str | Path | TextIO) -> tuple[str, str]:
    if not isinstance(source, str | Path):
        name = getattr(source, "name", "<stream>")
        try:
            return name, source.read()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: expected UTF-8 text, got {error.reason}; re-encode it") from error
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        reason = f"got {source}: {error.strerror}"
        raise InputError(f"expected a readable prompt file, {reason}; check the path") from error
    try:
        return str(source), data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"{source}, line {line}"
        raise InputError(f"{place}: expected UTF-8 text, got {error.reason}; re-encode it") from error


def _record(line: str, place: str) -> PromptRecord:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place}: expected one JSON object, got invalid JSON ({error.msg}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers too long, or too deep, for Python
        raise InputError(f"{place}: expected one JSON object that can be read, got {error}") from error
    if not isinstance(value, dict):
        raise InputError(f'{place}: expected a JSON object with "prompt", got {_kind(value)}')
    for key in value:
        if key not in KEYS:
            raise InputError(f"{place}: expected only known keys, got {key!r}. {nearest(key, KEYS)}")
    if "prompt" not in value:
        raise InputError(f'{place}: expected the key "prompt", got {sorted(value)}; add it')
    for key in ("prompt", "reference", "task"):
        if not isinstance(value.get(key, ""), str):
            raise InputError(f'{place}: expected "{key}" to be a string, got {_kind(value[key])}')
    if not value["prompt"].strip():
        raise InputError(f'{place}: expected a "prompt" with text, got an empty one; fill or remove it')
    tests = value.get("tests", [])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f'{place}: expected "tests" to be a list of strings, got {_kind(tests)}')
    return PromptRecord(**{**value, "tests": tuple(tests)})


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
