"""Benchmarks by way of lm-evaluation-harness: its prompts and its scoring, our decoding, items and sandbox."""

from expertshare.evaluation.harness.benchmarks import BENCHMARKS, Benchmark
from expertshare.evaluation.harness.source import HarnessSource

__all__ = ["BENCHMARKS", "Benchmark", "HarnessSource"]
