"""A capacity model for many GPUs, fed by recorded routing: `expertshare simulate` (docs/scaling.md)."""

from expertshare.lab.simulate.capacity import GPU_COUNTS, Capacity, Simulation, SweepPoint
from expertshare.lab.simulate.deployment import ASSUMPTIONS, CARDS, Card, Cluster, Demand, find_card
from expertshare.lab.simulate.placement import PLACEMENTS, BlockTrace, cut_into_blocks
from expertshare.lab.simulate.replica import Replica, part_seconds, simulate_replica

__all__ = [
    "ASSUMPTIONS",
    "CARDS",
    "GPU_COUNTS",
    "PLACEMENTS",
    "BlockTrace",
    "Capacity",
    "Card",
    "Cluster",
    "Demand",
    "Replica",
    "Simulation",
    "SweepPoint",
    "cut_into_blocks",
    "find_card",
    "part_seconds",
    "simulate_replica",
]
