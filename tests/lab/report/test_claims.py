"""Claims: every number is from a stored result, and they are read from the repository (docs/claims.md: tests/docs)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expertshare.errors import InputError
from expertshare.lab.report import sources
from expertshare.lab.report.sources import VERDICTS, stored_claims
from lab.report.conftest import ROOT, content

sys.path.append(str(ROOT / "benchmarks" / "figures"))
from claims import SOURCE, look_up, resolve_claims

# A word of every claim that the sources make, as they were listed when this page was planned.
LISTED = (
    "more memory-bound than dense",
    "nearly linearly",
    "more than 55 %",
    "up to 38 %",
    "Pareto front",
    "union of the experts that each token chooses",
    "does not reduce the union",
    "HumanEval, MBPP, MATH500 and GSM8K",
    "accuracy on MBPP",
    "69.5 → 14.6",
    "76.64 to 79.84 %",
    "1.14 to 1.66 times",
    "Top-4, DES-S and DES-V",
    "16 to 18 %",
    "Pearson's r 0.46",
    "from 8 to 32",
    "pass@1 on self-invoking code",
)


def test_every_listed_claim_has_a_row() -> None:
    claims = stored_claims()
    assert [words for words in LISTED if not any(words in claim.claim for claim in claims)] == []
    assert all(claim.verdict in VERDICTS and claim.published and claim.measured and claim.command for claim in claims)
    assert all(claim.files or claim.verdict == "not testable here" for claim in claims)
    assert all(claim.why for claim in claims if claim.verdict != "reproduced")


def test_claims_are_found_in_a_clone_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")
    assert stored_claims() == resolve_claims(ROOT), "run: make figures"
    monkeypatch.chdir(tmp_path)
    assert stored_claims()  # the package is of a clone
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "site-packages" / "claims.py"))
    with pytest.raises(InputError, match=r"expected a clone .* \(--no-claims\)"):
        stored_claims()


def test_numbers_in_the_text_are_those_of_the_files() -> None:
    measured = {claim.id: claim.measured for claim in resolve_claims(ROOT)}
    runs = {run["label"]: run for run in content("policies")["runs"]}
    assert f"{100 * runs['des-vote:budget=28']['retained_capped']:.1f} %" in measured["des-activations"]
    cases = [case for case in content("experts-mini-1")["results"]["cases"] if case["backend"] == "cpu"]
    ms = {case["unique"]: case["ms"] for case in cases}
    assert f"{100 * (ms[70] - ms[32]) / ms[70]:.1f} %" in measured["des-latency"]
    r = content("weight-against-loss")["results"]["replaced"]["weights"]["sum"]["pearson_r"]
    assert f"r = {r:.2f} over" in measured["weight-loss"]


def test_a_claim_without_its_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the claims in"):
        resolve_claims(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / SOURCE).write_text((ROOT / SOURCE).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match="expected a result that can be read"):
        resolve_claims(tmp_path)


VALUE = {"a": {"b": 2.5, "yes": True}, "rows": [{"x": "p:q=1,r=0.5", "n": 1}, {"x": "s", "n": 2}, {"x": "s", "n": 3}]}


def test_keys() -> None:
    assert look_up(VALUE, "rows[n=2][x=s].n", "f") == 2  # one is left before the last filter
    assert look_up(VALUE, "a.b", "f") == 2.5
    assert look_up(VALUE, "rows[x=p:q=1,r=0.5].n", "f") == 1
    assert look_up(VALUE, "rows[x=s][n=3].n", "f") == 3


@pytest.mark.parametrize(
    "key", ["a.c", "a", "a.yes", "a[x=s].n", "rows[x=t].n", "rows[x=s].n", "rows", "rows[n=2][x=t].n"]
)
def test_a_key_that_names_no_single_number_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="f: expected"):
        look_up(VALUE, key, "f")
