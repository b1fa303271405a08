"""Reading stored results: each is known for what it is, whole, or refused by name. And what papers claim beside what
was measured: benchmarks/results/claims.json, which `make figures` writes from benchmarks/claims.toml and the results
that it names. Neither comes with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import InputError
from expertshare.evaluation.run_directory import REPORT, RUN
from expertshare.lab.report.commands import command_line
from expertshare.lab.report.kinds import ENVIRONMENT, KINDS, NUMBER, Each, check_shape, known_kinds
from expertshare.measure.report import SCHEMA_VERSION
from expertshare.tuning.policy_file import FORMAT

CLAIMS = "benchmarks/results/claims.json"
VERDICTS = ("reproduced", "not reproduced", "not testable here", "not tested")
_ENVELOPE = {"schema_version", "command", "environment", "seeds", "config", "results"}
_BESIDE_RUNS = {"environment", "config", "seeds", "peak_memory_bytes", "peak_anonymous_bytes"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One stored result. name: the path as given; kind: a name of KINDS; command: the line that makes it again, as far
    as the file says. environment: None where the file holds none."""

    name: str
    kind: str
    command: str
    environment: Mapping[str, Any] | None
    seeds: Mapping[str, Any]
    config: Mapping[str, Any]
    results: Mapping[str, Any]


def read_sources(paths: Sequence[str | Path]) -> list[Source]:
    """All of them, in their order. Raises InputError for none, one given twice, or one that is no known result."""
    if not paths:
        raise InputError(f"expected at least one stored result, got none. Known: {known_kinds()}")
    names = [Path(path).resolve() for path in paths]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"expected every result once, got {path} again: leave one out")
    return [read_source(path) for path in paths]


def read_source(path: str | Path) -> Source:
    """The result at `path`: a file, or the run directory of an evaluation. Raises InputError naming it and what is
    known."""
    given = Path(path)
    file = _report_of_run(given) if given.is_dir() else given
    value = _read_object(file, str(path))
    kind, parts = _recognise(value, str(path))
    known = KINDS[kind]
    shapes = {
        "config": known.config,
        "seeds": Each(NUMBER),
        "results": known.results,
        "environment": (None, ENVIRONMENT),
    }
    for name, shape in shapes.items():
        check_shape(parts[name], shape, name, str(path))
    fault = known.fault(parts["config"], parts["results"])
    if fault is not None:
        raise InputError(f"{path}: expected {fault}: cut off, edited, or too old")
    command = command_line(kind, parts["config"], parts["results"], parts["seeds"])
    return Source(name=str(path), kind=kind, command=command, **parts)


def _report_of_run(directory: Path) -> Path:
    if not (directory / RUN).is_file():
        raise InputError(
            f"expected a file, or the run directory of an evaluation, got {directory}, which has no {RUN}: "
            f"name the files in it that you want. Known: {known_kinds()}"
        )
    if not (directory / REPORT).is_file():
        raise InputError(
            f"expected a finished evaluation, got {directory} without {REPORT}: give the same `expertshare eval` again"
        )
    return directory / REPORT


def _read_object(file: Path, name: str) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"expected a stored result that can be read, got {name}: {reason}") from error
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise InputError(f"expected a JSON file, got {name}: {error}. Known: {known_kinds()}") from error
    if not isinstance(value, dict):
        raise _unknown(name, f"a {type(value).__name__}")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _recognise(value: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """The kind, and its environment, seeds, config and results."""
    if value.get("format") == FORMAT:
        return "tune", _tuning(value["evidence"] if isinstance(value.get("evidence"), dict) else {})
    if value.keys() >= _ENVELOPE:
        return _of_envelope(value, name)
    if value.keys() >= {"runs", "reference", "num_prompts"}:
        if not value.keys() >= {"environment", "config", "seeds"}:
            raise _unknown(name, "a comparison without environment, config and seeds")
        rest = {key: entry for key, entry in value.items() if key not in _BESIDE_RUNS}
        return "compare", {**{key: value[key] for key in ("environment", "seeds", "config")}, "results": rest}
    if value.keys() >= {"certified", "claim", "chosen", "tested"}:
        return "tune", _tuning(value)
    raise _unknown(name, f"an object with {', '.join(sorted(value)[:6]) or 'nothing in it'}")


def _of_envelope(value: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    if value["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"expected schema version {SCHEMA_VERSION}, got {value['schema_version']!r} in {name}: "
            "read it with the version of expertshare that wrote it"
        )
    if not isinstance(value["command"], str) or value["command"] not in KINDS:
        raise _unknown(name, f"a report of {value['command']!r}")
    return value["command"], {key: value[key] for key in ("environment", "seeds", "config", "results")}


def _tuning(value: dict[str, Any]) -> dict[str, Any]:
    parts = {"environment": value.get("environment"), "results": value}
    return {**parts, "seeds": value.get("seeds", {}), "config": value.get("config", {})}


def _unknown(name: str, what: str) -> InputError:
    return InputError(f"expected a stored result of a known kind, got {name}, which is {what}. Known: {known_kinds()}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One row. measured: in words, with the numbers in place; machine: of the files, as they name it; why: behind the
    verdict; files: paths from the repository's root."""

    id: str
    claim: str
    source: str
    published: str
    measured: str
    model: str
    machine: str
    verdict: str
    why: str
    command: str
    files: tuple[str, ...]


def stored_claims() -> list[Claim]:
    """The claims of the clone that this is run in, or that the package is from. Raises InputError outside of one."""
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents):
        if (folder / CLAIMS).is_file():
            entries = json.loads((folder / CLAIMS).read_text(encoding="utf-8"))["claims"]
            return [Claim(**{**entry, "files": tuple(entry["files"])}) for entry in entries]
    raise InputError(
        f"expected a clone of the repository for the papers' claims, whose numbers are in its results: {CLAIMS} is "
        "neither here nor beside the package. Run it in a clone, or leave the claims out (--no-claims)"
    )
