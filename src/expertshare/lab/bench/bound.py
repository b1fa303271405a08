"""What an expert layer must cost at least: bytes over bandwidth, or multiplications over peak."""

from __future__ import annotations

from dataclasses import dataclass

from expertshare.lab.bench.machine import Peaks


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One call of an expert layer. num_bytes: weights of the unique experts, tokens read and written once. num_macs:
    multiply-accumulates of the three projections of every (token, expert) pair.
    """

    num_bytes: int
    num_macs: int

    def bound_s(self, peaks: Peaks) -> float:
        """Seconds below which no implementation that reads each weight once can come on this machine."""
        return max(self.num_bytes / peaks.bytes_per_s, self.num_macs / peaks.macs_per_s)


def expert_work(
    *, tokens: int, top_k: int, unique: int, hidden: int, inner: int, itemsize: int, expert_bytes: int | None = None
) -> Work:
    """Work of one layer; itemsize in bytes, of activations, and of weights unless expert_bytes says what one expert
    takes."""
    weights = unique * (3 * hidden * inner * itemsize if expert_bytes is None else expert_bytes)
    activations = 2 * tokens * hidden * itemsize
    return Work(num_bytes=weights + activations, num_macs=tokens * top_k * 3 * hidden * inner)
