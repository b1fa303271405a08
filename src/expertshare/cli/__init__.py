"""The command line: one file per verb."""

from expertshare.cli.app import app, load_verb, main

__all__ = ["app", "load_verb", "main"]
