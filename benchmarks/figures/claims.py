"""The papers' claims beside what was measured: every number is read from a stored result by its key.

benchmarks/claims.toml holds the claims; `resolve_claims` reads the numbers. docs/claims.md is made from
that, and benchmarks/results/claims.json, which `expertshare report` shows.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from writing import ROOT, line

from expertshare.errors import InputError
from expertshare.lab.report.sources import CLAIMS, VERDICTS, Claim

BLOCKS = ("claim_counts", "claims")
SOURCE = "benchmarks/claims.toml"
_STEP = re.compile(r"([^.\[\]]+)|\[([^=\]]+)=([^\]]*)\]")
_REQUIRED = {"id", "claim", "source", "published", "verdict", "measured", "model", "command"}
_ALLOWED = _REQUIRED | {"why", "value", "files", "machine"}


@functools.cache
def resolved() -> tuple[Claim, ...]:
    """The claims of this repository."""
    return tuple(resolve_claims(ROOT))


def stored() -> tuple[Path, str]:
    """Where the report reads them, and the text that belongs there."""
    return ROOT / CLAIMS, json.dumps({"claims": [asdict(claim) for claim in resolved()]}, indent=2) + "\n"


def claim_counts() -> str:
    """How many claims have which verdict."""
    found = Counter(claim.verdict for claim in resolved())
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict])
    return f"{len(resolved())} claims: {counts}"


def claims() -> str:
    """A row for each claim."""
    head = ("claim", "published", "measured here", "verdict", "why", "command and files")
    return "\n".join([line(head), "|---" * len(head) + "|", *(_row(claim) for claim in resolved())])


def _row(claim: Claim) -> str:
    files = ", ".join(f"[{file.rpartition('/')[2]}](../{file})" for file in claim.files)
    cells = (
        f"{claim.claim} <sub>{claim.source}</sub>",
        claim.published,
        claim.measured + (f" <sub>{claim.model}; {claim.machine}</sub>" if claim.model != "none" else ""),
        f"**{claim.verdict}**",
        claim.why,
        f"`{claim.command}`" + (f" {files}" if files else ""),
    )
    return line([cell.replace("|", "\\|") for cell in cells])


def resolve_claims(root: Path) -> list[Claim]:
    """The claims of claims.toml with numbers from the results below `root`, the repository.

    Raises InputError for a file or key that is not there, a number that no text uses, and an unknown verdict.
    """
    try:
        entries = tomllib.loads((root / SOURCE).read_text(encoding="utf-8"))["claim"]
    except OSError as error:
        raise InputError(f"expected the claims in {root / SOURCE}: {error.strerror}") from error
    names = [entry.get("id") for entry in entries]
    if len(set(names)) < len(names):
        raise InputError(f"claims.toml: expected every id once, got {names}")
    return [_resolve(entry, root) for entry in entries]


def _resolve(entry: Mapping[str, Any], root: Path) -> Claim:
    name = entry.get("id", "?")
    missing, strange = sorted(_REQUIRED - entry.keys()), sorted(entry.keys() - _ALLOWED)
    if missing or strange:
        raise InputError(f"claim {name}: expected {sorted(_REQUIRED)}, missing {missing}, got {strange}")
    if entry["verdict"] not in VERDICTS:
        raise InputError(f"claim {name}: expected a verdict of {', '.join(VERDICTS)}, got {entry['verdict']!r}")
    values, files = _values(entry, root)
    files = list(dict.fromkeys([*files, *entry.get("files", [])]))
    for file in files:
        if not (root / file).is_file():
            raise InputError(f"claim {name}: expected the result {file}, it is not there")
    return Claim(
        id=name,
        claim=entry["claim"],
        source=entry["source"],
        published=entry["published"],
        measured=_filled(entry, values),
        model=entry["model"],
        machine=entry.get("machine") or _machine([root / file for file in files]),
        verdict=entry["verdict"],
        why=entry.get("why", ""),
        command=entry["command"],
        files=tuple(files),
    )


def _values(entry: Mapping[str, Any], root: Path) -> tuple[dict[str, float], list[str]]:
    """The claim's numbers by name, and the files they are from. A value is "FILE#KEY", or a rule and two names."""
    values: dict[str, float] = {}
    files: list[str] = []
    for name, how in entry.get("value", {}).items():
        if isinstance(how, str):
            file, _, key = how.partition("#")
            files.append(file)
            values[name] = look_up(_load(root / file), key, file)
        else:
            rule, first, second = how
            values[name] = _RULES[rule](values[first], values[second])
    return values, files


def _filled(entry: Mapping[str, Any], values: Mapping[str, float]) -> str:
    """The text with its numbers; every number is used, there or by a rule."""
    text: str = entry["measured"]
    by_rules = {name for how in entry.get("value", {}).values() if isinstance(how, list) for name in how[1:]}
    for name in values:
        if name not in by_rules and not re.search(rf"\{{{name}[:}}]", text):
            raise InputError(f"claim {entry['id']}: expected the text to use {name}, it does not: leave the value out")
    try:
        filled = text.format(**values)
    except (KeyError, ValueError) as error:
        raise InputError(f"claim {entry['id']}: the text uses {error}, which is no value of it") from error
    return re.sub(r"(?<=\d)%", " %", filled)


_RULES: dict[str, Callable[[float, float], float]] = {
    "reduction": lambda before, after: 1 - after / before,
    "ratio": lambda first, second: first / second,
}


def look_up(value: Any, key: str, file: str) -> float:
    """The number at `key`: names parted by dots; `[name=value]` picks the entries of a list that have it.

    Raises InputError where there is none, where there are several, and where it is no number.
    """
    found = value
    for name, field, wanted in _STEP.findall(key):
        if name:
            if not isinstance(found, Mapping) or name not in found:
                raise InputError(f"{file}: expected {name!r} of {key!r}, it is not there")
            found = found[name]
            continue
        if isinstance(found, Mapping) and str(found.get(field)) == wanted:
            continue  # the only one that earlier filters left
        if not isinstance(found, list):
            raise InputError(f"{file}: expected a list at [{field}={wanted}] of {key!r}, got {type(found).__name__}")
        found = [entry for entry in found if str(entry.get(field)) == wanted]
        if not found:
            raise InputError(f"{file}: expected an entry with {field} = {wanted} for {key!r}, got none")
        found = found[0] if len(found) == 1 else found
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise InputError(f"{file}: expected a number at {key!r}, got {type(found).__name__}")
    return found


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a result that can be read, got {path}: {error}") from error


def _machine(files: list[Path]) -> str:
    """Processor and threads, as the files say."""
    found = []
    for file in files:
        value = _load(file)
        environment = value.get("environment") if isinstance(value, Mapping) else None
        if environment:
            device = environment["device"]
            processor = f"{environment['cpu']}, {environment['cpu_count']} processors"
            found.append(processor if device == "cpu" else f"{device}; {processor}")
    return "; ".join(dict.fromkeys(found)) or ("not recorded in the file" if files else "none")
