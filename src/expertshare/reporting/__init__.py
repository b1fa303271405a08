"""One page from stored results: figures, tables, and the papers' claims beside what was measured."""

from expertshare.reporting.claims import Claim, claims_json, resolve_claims, shipped_claims
from expertshare.reporting.claims_page import claims_markdown
from expertshare.reporting.kinds import KINDS
from expertshare.reporting.page import WrittenReport, write_report
from expertshare.reporting.sources import Source, read_source, read_sources

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
