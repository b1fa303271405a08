"""Measurement as values: clocks, traces and reports are passed and returned, never global."""
