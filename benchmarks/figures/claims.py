"""The papers' claims beside what was measured (benchmarks/claims.toml), for docs/claims.md."""

from __future__ import annotations

from collections import Counter

from writing import ROOT, line

from expertshare.lab.report import Claim, resolve_claims
from expertshare.lab.report.claims import VERDICTS

BLOCKS = ("claim_counts", "claims")


def claim_counts() -> str:
    """How many claims have which verdict."""
    resolved = resolve_claims(ROOT)
    found = Counter(claim.verdict for claim in resolved)
    return f"{len(resolved)} claims: " + ", ".join(
        f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict]
    )


def claims() -> str:
    """A row for each claim."""
    head = ("claim", "published", "measured here", "verdict", "why", "command and files")
    return "\n".join([line(head), "|---" * len(head) + "|", *(_row(claim) for claim in resolve_claims(ROOT))])


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
