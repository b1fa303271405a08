"""What forwards asked of the experts, for each row and for the whole server."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from expertshare.measure.cost import FORWARD_KINDS, ForwardKind, Turn


@dataclass(slots=True)
class EngineCounts:
    """Since the engine began; only its thread writes. N MoE layers.

    forwards, expert_bytes: by kind of forward. row_steps: denoising steps of rows (one forward is a step of every row
    in it). unique_sum_N over unique_blocks: unique experts of blocks in denoising forwards, by layer. finished: rows by
    how they ended.
    """

    num_layers: int
    forwards: Counter[ForwardKind] = field(default_factory=Counter)
    expert_bytes: Counter[ForwardKind] = field(default_factory=Counter)
    row_steps: int = 0
    unique_blocks: int = 0
    unique_sum_N: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.unique_sum_N = [0] * self.num_layers


@dataclass(slots=True)
class UsageLedger:
    """A ledger of one session that keeps sums and no history. bytes_per_expert: of one layer."""

    counts: EngineCounts
    bytes_per_expert: int
    _unique: dict[int, Counter[ForwardKind]] = field(default_factory=lambda: defaultdict(Counter))
    _blocks: dict[int, Counter[ForwardKind]] = field(default_factory=lambda: defaultdict(Counter))

    def record(
        self,
        kind: ForwardKind,
        turns: Sequence[Turn],
        *,
        load_NE: Tensor,
        group_experts_NG: Tensor,
        live_G: Tensor,
    ) -> None:
        """Add one forward to the sums."""
        live_RG = live_G.view(len(turns), -1)
        unique_NRG = group_experts_NG.masked_fill(~live_G, 0).view(len(group_experts_NG), *live_RG.shape)
        unique_R, blocks_R = unique_NRG.sum(dim=(0, 2)).tolist(), live_RG.sum(dim=1).tolist()
        for turn, unique, blocks in zip(turns, unique_R, blocks_R, strict=True):
            self._unique[turn.row][kind] += unique
            self._blocks[turn.row][kind] += blocks
        counts = self.counts
        counts.forwards[kind] += 1
        counts.expert_bytes[kind] += int((load_NE > 0).sum()) * self.bytes_per_expert
        if kind == "denoise":
            counts.row_steps += len(turns)
            counts.unique_blocks += sum(blocks_R)
            by_layer = unique_NRG.sum(dim=(1, 2)).tolist()
            counts.unique_sum_N = [old + new for old, new in zip(counts.unique_sum_N, by_layer, strict=True)]

    def unique_experts(self, row: int) -> Mapping[ForwardKind, float]:
        """Mean of a row so far, by kind of forward."""
        unique, blocks, layers = self._unique[row], self._blocks[row], self.counts.num_layers
        return {kind: unique[kind] / max(1, blocks[kind] * layers) for kind in FORWARD_KINDS}

    def forget(self, row: int) -> None:
        """Keep nothing of a row that has left."""
        self._unique.pop(row, None)
        self._blocks.pop(row, None)
