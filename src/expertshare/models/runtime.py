"""What a forward needs beside the weights, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from expertshare.kernels import Backend, LayerKeyValues, TorchBackend
from expertshare.measure.cost import PartClock
from expertshare.routing import RoutingPolicy
from expertshare.types import Coreset, ExpertStore, RoutingPlan

PlanListener = Callable[[int, RoutingPlan], None]
"""Is told the plan of an MoE layer, 0-based among MoE layers, before its experts run."""

_UNTIMED: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How to run a model: passed to every forward, never found in a global.

    policy: bound to the model's router. backend: what computes (`choose_backend`). store: where experts live, None for
    the model's own parameters; bytes_per_expert: of one in the store, where it is not in the model's dtype. clock: adds
    up time by part if given. on_plan: hears every plan. graphs: decoding may capture its steps in graphs, on a device
    that has them.
    """

    policy: RoutingPolicy
    backend: Backend = field(default_factory=TorchBackend)
    store: ExpertStore | None = None
    bytes_per_expert: int | None = None
    clock: PartClock | None = None
    on_plan: PlanListener | None = None
    graphs: bool = True

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Charge the body to `part`, where there is a clock."""
        return _UNTIMED if self.clock is None else self.clock.part(part)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardInput:
    """A batch of sequences, or of parts of sequences, cut into sharing groups of `block_length` positions.

    tokens_BS int64; positions_BS int64, absolute; live_BS bool, False for padding. mask_BSP bool [B, S, keys], True
    where a query may attend to a key, keys in the order of `Past.extended_by`; None where every query may attend to
    every key. S is a multiple of block_length. masked_BS: bool, positions that are still to be decided; None
    where there are none. previous: per MoE layer, the coresets to keep (see `route`); None where all are selected.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    live_BS: Tensor
    mask_BSP: Tensor | None
    block_length: int
    masked_BS: Tensor | None = None
    previous: tuple[Coreset | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """What one forward asked of the experts, as tensors on the model's device (reading them synchronises).

    load_NE: int64, (token, expert) pairs per MoE layer and expert; an expert with any is active. group_experts_NG:
    int64, unique experts of each sharing group. coresets: what the groups agreed on, per MoE layer; None where
    the native library chose it.
    """

    load_NE: Tensor
    group_experts_NG: Tensor
    coresets: tuple[Coreset | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """hidden_BSD: after the final norm, ready for the head. key_values: one per layer."""

    hidden_BSD: Tensor
    key_values: tuple[LayerKeyValues, ...]
    routing: RoutingTrace
