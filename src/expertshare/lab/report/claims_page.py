"""The claims as Markdown: docs/claims.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from expertshare.lab.report.claims import VERDICTS, Claim

_TOP = """# Claims: what papers say, and what was measured here

Written by `python benchmarks/claims.py` from [claims.toml](../src/expertshare/lab/report/claims.toml), with every
measured number read from the result files named; do not edit it. The same rows are in every page of `expertshare
report` ([report.md](report.md)).

- *reproduced*: what is claimed was seen here, on the model and machine named; `why` says what that leaves out.
- *not reproduced*: it was measured and came out otherwise, for the most part because the reference model is small (3 M
  parameters, 64 experts, 8 per token) and was not trained for sharing.
- *not testable here*: needs checkpoints or data that were not at hand. *not tested*: could be done here and was not;
  what was measured instead is given, and decides nothing.
"""


def claims_markdown(claims: Sequence[Claim]) -> str:
    """The whole page."""
    found = Counter(claim.verdict for claim in claims)
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict])
    head = "| claim | published | measured here | verdict | why | command and files |\n|---|---|---|---|---|---|"
    return f"{_TOP}\n{len(claims)} claims: {counts}.\n\n{head}\n" + "".join(f"{_row(claim)}\n" for claim in claims)


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
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
