"""What the task files of this folder call: pass@1, by our sandbox instead of a metric from a hub."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from expertshare.evaluation.harness.benchmarks import verdict


def _score(benchmark: str, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"pass_at_1": float(verdict(benchmark, doc, results[0]).passed)}


humaneval = partial(_score, "humaneval")
mbpp = partial(_score, "mbpp")
humaneval_pro = partial(_score, "humaneval_pro")
mbpp_pro = partial(_score, "mbpp_pro")
