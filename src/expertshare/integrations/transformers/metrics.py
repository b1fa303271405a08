"""What a model under a policy asked of its experts, counted without waiting for the device after every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.integrations.transformers.calls import Call
from expertshare.integrations.transformers.sharing import SharedChoice
from expertshare.integrations.transformers.sites import RouterSite
from expertshare.routing import count_load
from expertshare.types import RoutingPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerUse:
    """One MoE layer's share.

    name: of its router. forwards: calls. unique_experts: of one block, mean over forwards and blocks with a live token.
    union_experts: of the whole batch, mean over forwards. pairs: (token, expert) pairs. expert_bytes: of the union's
    weights, summed over forwards. multiplied: experts that the implementation "expertshare" multiplied, summed over
    forwards; None where another one computed.
    """

    name: str
    forwards: int
    unique_experts: float
    union_experts: float
    pairs: int
    expert_bytes: int
    multiplied: int | None


class RoutingMetrics:
    """Counts between entering and leaving `Handle.metrics()`; can be read inside it, too."""

    def __init__(self, sites: Sequence[RouterSite]) -> None:
        self._sites = tuple(sites)
        self._counts: list[list[Tensor]] = [[] for _ in sites]
        self._multiplied: list[list[Tensor]] = [[] for _ in sites]

    def record(self, index: int, call: Call, choice: SharedChoice) -> None:
        """One forward of the layer at `index`."""
        grouped_PK = call.grouped(choice.run_TK + 1, fill=0).flatten(0, 1) - 1
        live_G = call.live_groups().any(dim=-1)
        load_E, unique_G = count_load(RoutingPlan(grouped_PK, grouped_PK, choice.active_E), len(live_G))
        counts = ((unique_G * live_G).sum(), live_G.sum(), (load_E > 0).sum(), load_E.sum())
        self._counts[index].append(torch.stack(counts))

    def record_multiplied(self, index: int, active_E: Tensor) -> None:
        """What the experts implementation really ran in one forward of the layer at `index`."""
        self._multiplied[index].append(active_E.sum())

    @property
    def by_layer(self) -> tuple[LayerUse, ...]:
        """In the order of the model's modules."""
        return tuple(self._layer(index) for index in range(len(self._sites)))

    @property
    def forwards(self) -> int:
        """Calls of a stack of layers: most often one per forward of the model (two in DiffusionGemma's)."""
        return sum(len(self._counts[i]) for i, site in enumerate(self._sites) if site.layer == 0)

    @property
    def unique_experts(self) -> float:
        """Experts that one block uses in one MoE layer: mean over forwards, layers and blocks."""
        layers = self.by_layer
        return _mean([(use.unique_experts, use.forwards) for use in layers])

    @property
    def union_experts(self) -> float:
        """Experts that the whole batch uses in one MoE layer: mean over forwards and layers."""
        return _mean([(use.union_experts, use.forwards) for use in self.by_layer])

    @property
    def pairs(self) -> int:
        """(token, expert) pairs, summed over forwards and layers."""
        return sum(use.pairs for use in self.by_layer)

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts of the union, summed over forwards and layers."""
        return sum(use.expert_bytes for use in self.by_layer)

    @property
    def multiplied(self) -> int | None:
        """Experts that the implementation "expertshare" multiplied, summed likewise; None where another computed."""
        layers = [use.multiplied for use in self.by_layer if use.multiplied is not None]
        return sum(layers) if layers else None

    def _layer(self, index: int) -> LayerUse:
        site, rows = self._sites[index], self._counts[index]
        totals = torch.stack(rows).sum(dim=0).tolist() if rows else [0, 0, 0, 0]
        unique, groups, union, pairs = totals
        multiplied = self._multiplied[index]
        return LayerUse(
            name=site.name,
            forwards=len(rows),
            unique_experts=unique / max(1, groups),
            union_experts=union / max(1, len(rows)),
            pairs=pairs,
            expert_bytes=union * site.bytes_per_expert,
            multiplied=int(torch.stack(multiplied).sum()) if multiplied else None,
        )


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in weighted) / max(1, sum(weight for _, weight in weighted))
