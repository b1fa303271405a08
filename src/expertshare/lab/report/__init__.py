"""One page from stored results: figures, tables, and the papers' claims beside what was measured."""

from expertshare.lab.report.claims import Claim, stored_claims
from expertshare.lab.report.kinds import KINDS
from expertshare.lab.report.page import WrittenReport, write_report
from expertshare.lab.report.sources import Source, read_source, read_sources

__all__ = [
    "KINDS",
    "Claim",
    "Source",
    "WrittenReport",
    "read_source",
    "read_sources",
    "stored_claims",
    "write_report",
]
