"""Claims: every number is from a stored result, and what is shipped and documented is what the generator writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertshare.errors import InputError
from expertshare.lab.report import claims_json, claims_markdown, resolve_claims, shipped_claims
from expertshare.lab.report.claims import VERDICTS, look_up
from lab.report.conftest import ROOT, content

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
    claims = shipped_claims()
    assert [words for words in LISTED if not any(words in claim.claim for claim in claims)] == []
    assert all(claim.verdict in VERDICTS and claim.published and claim.measured and claim.command for claim in claims)
    assert all(claim.files or claim.verdict == "not testable here" for claim in claims)
    assert all(claim.why for claim in claims if claim.verdict != "reproduced")


def test_what_is_shipped_and_documented_is_what_the_results_say() -> None:
    claims = resolve_claims(ROOT)
    assert claims == shipped_claims(), "run: python benchmarks/claims.py"
    stored = json.loads((ROOT / "src" / "expertshare" / "reporting" / "claims.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(claims_json(claims)))
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == claims_markdown(claims)


def test_numbers_in_the_text_are_those_of_the_files() -> None:
    measured = {claim.id: claim.measured for claim in shipped_claims()}
    runs = {run["label"]: run for run in content("policies")["runs"]}
    assert f"{100 * runs['des-vote:budget=28']['retained_capped']:.1f} %" in measured["des-activations"]
    cases = [case for case in content("experts-mini-1")["results"]["cases"] if case["backend"] == "cpu"]
    ms = {case["unique"]: case["ms"] for case in cases}
    assert f"{100 * (ms[70] - ms[32]) / ms[70]:.1f} %" in measured["des-latency"]
    r = content("weight-against-loss")["results"]["replaced"]["weights"]["sum"]["pearson_r"]
    assert f"r = {r:.2f} over" in measured["weight-loss"]


def test_a_claim_without_its_results_is_refused(tmp_path: Path) -> None:
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
