"""One page from stored results: figures, tables, and the papers' claims beside what was measured."""

from expertshare.lab.report.claims import Claim, claims_json, resolve_claims, shipped_claims
from expertshare.lab.report.claims_page import claims_markdown
from expertshare.lab.report.kinds import KINDS
from expertshare.lab.report.page import WrittenReport, write_report
from expertshare.lab.report.sources import Source, read_source, read_sources

__all__ = [
    "KINDS",
    "Claim",
    "Source",
    "WrittenReport",
    "claims_json",
    "claims_markdown",
    "read_source",
    "read_sources",
    "resolve_claims",
    "shipped_claims",
    "write_report",
]
