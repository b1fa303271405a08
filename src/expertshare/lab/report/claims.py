"""What papers claim beside what was measured in the repository: benchmarks/results/claims.json, which `make figures`
writes from benchmarks/claims.toml and the results that it names. Neither comes with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from expertshare.errors import InputError

CLAIMS = "benchmarks/results/claims.json"
VERDICTS = ("reproduced", "not reproduced", "not testable here", "not tested")


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
