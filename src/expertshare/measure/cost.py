"""What decoding costs: experts, counted without waiting for the device after every forward, and time by part."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

ForwardKind = Literal["prefill", "denoise", "commit"]
FORWARD_KINDS: tuple[ForwardKind, ...] = get_args(ForwardKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One row's part in a forward. block counts the row's decoded blocks from 0 (None: prefill); step its
    denoising steps in that block from 0 (None: prefill and commit)."""

    row: int
    block: int | None
    step: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardCost:
    """One forward. groups: live sharing groups in it. Per MoE layer: unique_experts, the mean over those
    groups; active_experts, the union over the batch, which is what is loaded; pairs, token-expert pairs."""

    kind: ForwardKind
    turns: tuple[Turn, ...]
    groups: int
    unique_experts: tuple[float, ...]
    active_experts: tuple[int, ...]
    pairs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Totals by kind of forward. Every mapping has all three kinds; means are 0.0 where `forwards` is 0.

    unique_experts: experts that one sharing group uses in one layer, mean over forwards, layers and live
    groups. union_experts: experts that the whole batch uses in one layer, mean over forwards and layers.
    expert_bytes: bytes of those experts, summed over forwards and layers. pairs: token-expert pairs, summed
    likewise.
    """

    forwards: Mapping[ForwardKind, int]
    unique_experts: Mapping[ForwardKind, float]
    union_experts: Mapping[ForwardKind, float]
    expert_bytes: Mapping[ForwardKind, int]
    pairs: Mapping[ForwardKind, int]
    unique_experts_by_layer: Mapping[ForwardKind, tuple[float, ...]]
    steps: tuple[ForwardCost, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, by the names of the fields, ready for json.dumps."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


@dataclass(slots=True)
class CostLedger:
    """Collects forwards as small tensors; `cost()` reads them in one transfer. bytes_per_expert: of one
    layer."""

    num_layers: int
    bytes_per_expert: int
    _pending: list[tuple[ForwardKind, tuple[Turn, ...], Tensor]] = field(default_factory=list)
    _settled: list[ForwardCost] = field(default_factory=list)

    def record(
        self,
        kind: ForwardKind,
        turns: Sequence[Turn],
        *,
        load_NE: Tensor,
        group_experts_NG: Tensor,
        live_G: Tensor,
    ) -> None:
        """Note one forward. load_NE: pairs per layer and expert; group_experts_NG: unique experts per group,
        both int64; live_G: bool, False for groups of nothing but padding, which count nowhere."""
        groups_N = live_G.sum().expand(load_NE.shape[0])
        unique_N = group_experts_NG.masked_fill(~live_G, 0).sum(dim=1)
        figures_4N = torch.stack((groups_N, unique_N, (load_NE > 0).sum(dim=1), load_NE.sum(dim=1)))
        self._pending.append((kind, tuple(turns), figures_4N))

    def cost(self) -> Cost:
        """Everything recorded so far. Waits for the device once."""
        self._settle()
        by_kind = {kind: [step for step in self._settled if step.kind == kind] for kind in FORWARD_KINDS}
        by_layer = {kind: self._mean_unique_by_layer(steps) for kind, steps in by_kind.items()}
        active = {kind: sum(sum(s.active_experts) for s in steps) for kind, steps in by_kind.items()}
        return Cost(
            forwards={kind: len(steps) for kind, steps in by_kind.items()},
            unique_experts={kind: sum(layers) / self.num_layers for kind, layers in by_layer.items()},
            union_experts={k: active[k] / max(1, len(steps) * self.num_layers) for k, steps in by_kind.items()},
            expert_bytes={kind: count * self.bytes_per_expert for kind, count in active.items()},
            pairs={kind: sum(sum(s.pairs) for s in steps) for kind, steps in by_kind.items()},
            unique_experts_by_layer=by_layer,
            steps=tuple(self._settled),
        )

    def _settle(self) -> None:
        if not self._pending:
            return
        figures = torch.stack([figures_4N for _, _, figures_4N in self._pending]).tolist()
        for (kind, turns, _), (groups, unique, active, pairs) in zip(self._pending, figures, strict=True):
            forward = ForwardCost(
                kind=kind,
                turns=turns,
                groups=groups[0],
                unique_experts=tuple(total / max(1, groups[0]) for total in unique),
                active_experts=tuple(active),
                pairs=tuple(pairs),
            )
            self._settled.append(forward)
        self._pending.clear()

    def _mean_unique_by_layer(self, steps: Sequence[ForwardCost]) -> tuple[float, ...]:
        groups = sum(step.groups for step in steps)
        totals = [sum(step.unique_experts[n] * step.groups for step in steps) for n in range(self.num_layers)]
        return tuple(total / max(1, groups) for total in totals)


PARTS = ("router", "experts", "attention", "head", "other")


class _Charge:
    """A `with` block whose time goes to one part. No generator: a forward has dozens, and caches are cold at each."""

    __slots__ = ("_name", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start


@dataclass(slots=True)
class PartClock:
    """Adds up wall-clock seconds by part of the model. Parts do not nest; "other" is what no part claimed.

    Host time: on a GPU, where kernels run behind the host, it is the time to launch them.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS[:-1], 0.0))

    def part(self, name: str) -> AbstractContextManager[None]:
        """Charge the body of the `with` block to part `name`."""
        return _Charge(self.seconds, name)

    def shares(self, total_s: float) -> dict[str, float]:
        """Seconds by part, with the rest of `total_s` as "other"."""
        return {**self.seconds, "other": max(0.0, total_s - sum(self.seconds.values()))}
