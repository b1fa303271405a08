"""Which experts a layer will want next, learned from what it wanted before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_BINS = 32
_PRIOR_VISITS = 64.0


class ReuseForecast:
    """For every expert the chance that its layer uses it at the next visit, and from that, when it will be needed.

    Each expert carries its recent use: the sum over visits, newest first, of 1/2, 1/4, ... where it was used, which is
    in effect a record of the last few visits. How often experts with such a record were used next is counted while
    running, over all layers, so that stable coresets and restless ones both get their own odds.

    Layers run 0 .. N-1, 0 .. N-1: the one that has just run is the one that needs its experts last. So a cache that
    is smaller than one round must not drop what was used longest ago (that comes next), but what is needed last.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.last_NE: Bools = np.zeros((num_layers, num_experts), dtype=np.bool_)
        self._recent_NE: Floats = np.zeros((num_layers, num_experts))
        self._visits_B: Floats = np.full(_BINS, _PRIOR_VISITS)
        self._uses_B: Floats = _PRIOR_VISITS * (np.arange(_BINS) + 0.5) / _BINS
        self._num_layers = num_layers

    def observe(self, layer: int, member_E: Bools) -> None:
        """The layer uses exactly these experts now."""
        bins_E = _bins(self._recent_NE[layer])
        self._visits_B += np.bincount(bins_E, minlength=_BINS)
        self._uses_B += np.bincount(bins_E, weights=member_E, minlength=_BINS)
        self._recent_NE[layer] = (self._recent_NE[layer] + member_E) / 2
        self.last_NE[layer] = member_E

    def layers_until_use(self, now: int, layers_X: Ints | int, experts_X: Ints) -> Floats:
        """How many layers after layer `now` each expert will be needed, on average: 1 is the very next layer.

        With the chance p of being used at each visit, the first use is 1/p - 1 rounds after the next visit.
        """
        bins_X = _bins(self._recent_NE[layers_X, experts_X])
        chance_X = self._uses_B[bins_X] / self._visits_B[bins_X]
        next_visit_X = (np.asarray(layers_X) - now - 1) % self._num_layers + 1
        until_X: Floats = next_visit_X + self._num_layers * (1.0 / chance_X - 1.0)
        return until_X


def _bins(recent_X: Floats) -> NDArray[Any]:
    return np.minimum((recent_X * _BINS).astype(np.int64), _BINS - 1)
