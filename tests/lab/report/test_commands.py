"""The command that a page shows makes the result again: it says what is no default, and can be parsed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from expertshare.cli import app, load_verb
from expertshare.errors import InputError
from expertshare.lab.bench.cases import find_case
from expertshare.lab.report.sources import Source, read_source
from lab.report.conftest import RESULTS, stored


def readable() -> list[Source]:
    """Every stored result of this repository that a report reads."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        try:
            found.append(read_source(path))
        except InputError:  # of another kind
            continue
    return found


def given(command: str) -> dict[str, Any]:
    """The values of a line for a shell, as the command line reads them; nothing runs."""
    words = shlex.split(command)[1:]
    context = click.Context(typer.main.get_command(app))
    group: Any = load_verb(words.pop(0))
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    context = group.make_context("expertshare", words, parent=context)
    values: dict[str, Any] = context.params
    return values


@pytest.mark.parametrize("source", readable(), ids=lambda source: Path(source.name).stem)
def test_a_shown_command_can_be_given(source: Source) -> None:
    if source.command.startswith("python "):
        assert (RESULTS.parent.parent / source.command.split()[1]).is_file()
        return
    values = given(source.command)
    for name in (values.get("case") or "").split(","):
        assert not name or find_case(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forward-mini-half", "--masked 16 --report FILE"),
        ("forward-mini", "block-max:budget=16 --report FILE"),
        ("generate-mini-float32", "--policies vanilla,des-vote:budget=16 --dtype float32 --report FILE"),
        ("generate-reference", "--policies vanilla,des-vote --report FILE"),
        ("experts-mini-width", "--case llada2.0-mini --experts 64,128,256,512 --unique 32 --report FILE"),
        ("experts-mini-tokens", "--tokens 8,16,32,64 --report FILE"),
        ("tuning", "--quality accuracy --trials 100 --recorded-prompts 48 --search-share 0.25 --json"),
    ],
)
def test_what_is_not_the_default_is_said(name: str, words: str) -> None:
    assert read_source(stored(name)).command.endswith(words)


def test_the_decoding_of_a_comparison_is_said(changed: Callable[..., Path]) -> None:
    def slower(value: dict[str, Any]) -> None:
        value["config"]["decoding"] |= {"threshold": None, "steps_per_block": 8, "temperature": 0.5}

    command = read_source(changed("policies", slower)).command
    assert command.endswith("--gen-length 64 --steps 8 --threshold none --temperature 0.5 --json")


def test_a_benchmark_of_a_gpu_says_so(changed: Callable[..., Path]) -> None:
    def on_a_card(value: dict[str, Any]) -> None:
        value["results"]["machine"]["gpu"] = {"name": "NVIDIA H200"}

    command = read_source(changed("forward-mini", on_a_card)).command
    assert given(command)["device"] == "cuda"
