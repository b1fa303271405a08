"""Stored results are known for what they are, or refused by name with what is known."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertshare.errors import InputError
from expertshare.lab.report.kinds import KINDS
from expertshare.lab.report.page import render, sections
from expertshare.lab.report.sources import read_source, read_sources
from lab.report.conftest import NAMES, content, stored


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_result_is_known(name: str) -> None:
    source = read_source(stored(name))
    assert source.kind in KINDS
    assert source.name == str(stored(name))
    assert source.command.startswith(("expertshare ", "python benchmarks/"))


def test_a_policy_file_is_a_tuning_run(tmp_path: Path) -> None:
    environment = content("policies")["environment"]
    evidence = {**content("tuning"), "environment": environment, "seeds": {"search": 0}, "config": {"model": "m"}}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"format": "expertshare policy", "format_version": 1, "evidence": evidence}))
    source = read_source(path)
    assert (source.kind, source.environment) == ("tune", environment)
    assert source.command.startswith("expertshare tune m ")


UNKNOWN = [
    ("[]", "which is a list"),
    ("{}", "nothing in it"),
    ('{"model": "x", "points": []}', "an object with model, points"),
    ('{"runs": [], "reference": {}, "num_prompts": 1}', "without environment, config and seeds"),
    ("{", "expected a JSON file"),
    ('{"a": NaN}', "NaN is no JSON number"),
]


@pytest.mark.parametrize(("text", "message"), UNKNOWN)
def test_an_unknown_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "strange.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_source(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert all(kind in str(refused.value) for kind in KINDS)


def _drop(*keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def _set(new: Any, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = new

    return change


DAMAGED = [
    ("policies", _drop("runs", 3, "accuracy"), "results.runs[3] to have 'accuracy'"),
    ("policies", _set("much", "runs", 0, "unique_experts", "denoise"), "runs[0].unique_experts.denoise to be a number"),
    ("policies", _set(None, "config", "model"), "config.model to be a string, got None"),
    ("policies", _set({}, "runs"), "results.runs to be a list"),
    ("tuning", _set("yes", "certified"), "results.certified to be true or false"),
    ("forward-mini", _set(2, "schema_version"), "expected schema version 1, got 2"),
    ("forward-mini", _set("generate", "command"), "a report of 'generate'"),
    ("forward-mini", _drop("environment", "cpu"), "environment to have 'cpu'"),
    ("experts-mini-width", _drop("results", "fits"), "results to have 'fits'"),
    ("steps-distribution", _drop("results", "runs", 1, "histogram_by_layer", 2, 0), "histograms of one length"),
    ("expert-growth", _set([], "results", "points"), "at least one point"),
    ("experts-mini-width", _set([1.0], "results", "cases", 0, "ms_quartiles"), "to be a list of 2 numbers"),
    ("weight-against-loss", _drop("results", "dropped", "weights", "max"), "weights to have 'max'"),
    ("forward-mini", _set("x", "results", "forwards", 0, "ms_by_part"), "ms_by_part to be an object"),
    ("steps-distribution", _set([["a"]], "results", "runs", 0, "histogram_by_layer"), "histogram_by_layer[0][0]"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGED)
def test_a_damaged_result_is_refused(changed: Callable[..., Path], name: str, change: Any, message: str) -> None:
    path = changed(name, change)
    with pytest.raises(InputError) as refused:
        read_source(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_places_that_hold_no_result(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "has no run.json"),
    ):
        with pytest.raises(InputError, match=message):
            read_source(path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"without report\.json: give the same"):
        read_source(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="it is not text"):
        read_source(tmp_path / "binary")


def test_none_and_the_same_twice() -> None:
    with pytest.raises(InputError, match="at least one stored result"):
        read_sources([])
    with pytest.raises(InputError, match="again: leave one out"):
        read_sources([stored("tuning"), stored("tuning").parent / "." / "tuning.json"])


PUT_IN = ("$x^$ <b>", {}, [], True, None, -1, 0, 1e300, [1], {"a": "b"})


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    found = [(*place, key) for key, _ in inner]
    return found + [deeper for key, entry in inner for deeper in _places(entry, (*place, key))]


def test_any_single_change_is_read_or_refused_never_stumbled_over(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "result.json"
    read = refused = 0
    places = {name: _places(content(name)) for name in NAMES}
    for _ in range(200):
        name = draw.choice(NAMES)
        value, place = content(name), draw.choice(places[name])
        change = _drop(*place) if draw.random() < 0.2 else _set(draw.choice(PUT_IN), *place)
        change(value)
        path.write_text(json.dumps(value))
        try:
            source = read_source(path)
        except InputError as error:
            refused += str(path) in str(error)
        else:
            read += 1
            assert render([source], sections([source]), {}, title="", claims=[])
    assert read + refused == 200
    assert min(read, refused) > 50
