"""Benchmarks by way of lm-evaluation-harness: its prompts and its scoring, our decoding, items and sandbox."""
