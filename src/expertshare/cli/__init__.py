"""The command line: one file per verb."""

from expertshare.cli.app import app, main

__all__ = ["app", "main"]
