"""One page from stored results: figures, tables, and the papers' claims beside what was measured."""

from expertshare.lab.report.claims import Claim, clone_root, resolve_claims
from expertshare.lab.report.kinds import KINDS
from expertshare.lab.report.page import WrittenReport, write_report
from expertshare.lab.report.sources import Source, read_source, read_sources

__all__ = [
    "KINDS",
    "Claim",
    "Source",
    "WrittenReport",
    "clone_root",
    "read_source",
    "read_sources",
    "resolve_claims",
    "write_report",
]
