"""Latency as a line: b for every unique expert, a for every (token, expert) pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyFit:
    """latency = b * unique + a * pairs. residuals_s: measured minus fitted, in the order of the points.

    r_squared: share of the variance over the points that the line explains. Where all points have one number of
    pairs, a * pairs is simply the line's height at zero experts.
    """

    b_s: float
    a_s: float
    r_squared: float
    residuals_s: tuple[float, ...]

    def to_json(self, *, bytes_per_expert: int, macs_per_pair: int) -> dict[str, Any]:
        """With what b and a would mean as a bandwidth and a rate (None where they are not positive)."""
        return {
            "us_per_expert": 1e6 * self.b_s,
            "us_per_pair": 1e6 * self.a_s,
            "gb_per_s": bytes_per_expert / self.b_s / 1e9 if self.b_s > 0 else None,
            "gmac_per_s": macs_per_pair / self.a_s / 1e9 if self.a_s > 0 else None,
            "r_squared": self.r_squared,
            "residuals_ms": [1e3 * residual for residual in self.residuals_s],
        }


def fit_latency(unique: Sequence[int], pairs: Sequence[int], seconds: Sequence[float]) -> LatencyFit | None:
    """Least squares over the points; None for fewer than three points or a single number of unique experts."""
    if len(seconds) < 3 or len(set(unique)) < 2:
        return None
    design = np.column_stack([np.asarray(unique, dtype=float), np.asarray(pairs, dtype=float)])
    measured = np.asarray(seconds, dtype=float)
    (b, a), *_ = np.linalg.lstsq(design, measured, rcond=None)
    residuals = measured - design @ np.array([b, a])
    variance = float(((measured - measured.mean()) ** 2).sum())
    r_squared = 1.0 - float((residuals**2).sum()) / variance if variance > 0 else 1.0
    return LatencyFit(
        b_s=float(b), a_s=float(a), r_squared=r_squared, residuals_s=tuple(float(value) for value in residuals)
    )
