"""Running the model for some rows, by the model's kind of attention, and accounting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expertshare.decoding.cache import KeyValueCache, visible
from expertshare.decoding.row import Row, Window
from expertshare.kernels import Past
from expertshare.measure.cost import ForwardKind, Turn
from expertshare.models.runtime import ForwardInput, ForwardOutput, RoutingTrace, Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import policy_at
from expertshare.types import Coreset


class Ledger(Protocol):
    """Notes what forwards asked of the experts: measure.cost.CostLedger, or a server's own."""

    def record(
        self,
        kind: ForwardKind,
        turns: Sequence[Turn],
        *,
        load_NE: Tensor,
        group_experts_NG: Tensor,
        live_G: Tensor,
    ) -> None:
        """Note one forward; see CostLedger. The groups of each turn lie together, in the order of `turns`."""
        ...


class Watcher(Protocol):
    """Hears of a decoding from inside it. What it is given stays as it is; reading it waits for the device, so that it
    is better kept and read between steps."""

    def hear_forward(self, kind: ForwardKind, rows: Sequence[Row], routing: RoutingTrace) -> None:
        """A forward in which `rows` took part; their steps and forwards do not count it yet."""
        ...

    def hear_step(self, rows: Sequence[Row], window: Window, confidence_RL: Tensor) -> None:
        """A denoising step has written its tokens. window: the blocks as they are now. confidence_RL: float32, of what
        was proposed for each position, -inf where nothing was. The rows' steps do not count it yet."""
        ...


@dataclass(frozen=True, slots=True)
class AccountedModel:
    """The model and how to run it, with the ledger and the watcher that are told of every forward."""

    model: MoETransformer
    runtime: Runtime
    ledger: Ledger
    watcher: Watcher | None = None

    def __call__(
        self, kind: ForwardKind, rows: Sequence[Row], inputs: ForwardInput, past: Sequence[Past] | None = None
    ) -> ForwardOutput:
        """One forward in which `rows` take part.

        Where a layer's policy reuses coresets, a row selects in steps 0, reuse, 2 * reuse, ... of each block, and in
        prefill and commit forwards; in the others it keeps what it used last.
        """
        policy, num_layers = self.runtime.policy, self.model.config.num_moe_layers
        layers = range(num_layers if kind == "denoise" else 0)
        reuse_N = [policy_at(policy, layer, num_layers).reuse or 1 for layer in layers]
        reuses = max(reuse_N, default=1) > 1
        if reuses:
            groups = inputs.tokens_BS.shape[1] // inputs.block_length
            previous = tuple(_kept_coresets(rows, layer, reuse, groups) for layer, reuse in enumerate(reuse_N))
            inputs = replace(inputs, previous=previous)
        output: ForwardOutput = self.model(inputs, self.runtime, past)
        if reuses:
            _keep_coresets(rows, output.routing.coresets)
        live_G = inputs.live_BS.reshape(-1, inputs.block_length).any(dim=1)
        self.account(kind, rows, output.routing, live_G)
        return output

    def account(self, kind: ForwardKind, rows: Sequence[Row], routing: RoutingTrace, live_G: Tensor) -> None:
        """Note a forward in which `rows` took part, wherever it was run. live_G: as in Ledger."""
        self.ledger.record(
            kind,
            [row.turn(kind) for row in rows],
            load_NE=routing.load_NE,
            group_experts_NG=routing.group_experts_NG,
            live_G=live_G,
        )
        if self.watcher is not None:
            self.watcher.hear_forward(kind, rows, routing)
        for row in rows:
            row.forwards += 1


def _kept_coresets(rows: Sequence[Row], layer: int, reuse: int, num_groups: int) -> Coreset | None:
    """What the rows' groups keep in a layer: empty for a group that has to select."""
    kept = {row.number: _fitted(row.coresets[layer], num_groups) for row in rows if row.steps % reuse != 0}
    if not kept:
        return None
    empty_GE = torch.zeros_like(next(iter(kept.values())))
    return Coreset(torch.cat([kept.get(row.number, empty_GE) for row in rows]))


def _fitted(member_GE: Tensor, num_groups: int) -> Tensor:
    """A row's coresets in a forward as long as its longest row: that one may have left, or have come, since."""
    missing = num_groups - len(member_GE)
    return member_GE[:num_groups] if missing <= 0 else F.pad(member_GE, (0, 0, 0, missing))


def _keep_coresets(rows: Sequence[Row], coresets: Sequence[Coreset | None]) -> None:
    nothing = (torch.empty(0),) * len(rows)
    by_layer = [nothing if coreset is None else coreset.member_GE.chunk(len(rows)) for coreset in coresets]
    for row, members in zip(rows, zip(*by_layer, strict=True), strict=True):
        row.coresets = members


class Forwards(Protocol):
    """How a kind of attention runs the steps of decoding."""

    def prefill(self, rows: Sequence[Row]) -> None:
        """Take in new rows, and do what their prompts allow before the first block."""
        ...

    def denoise(self, rows: Sequence[Row], window: Window) -> Tensor:
        """Hidden states of each row's current block, which `window` shows: [R, L, D]."""
        ...

    def commit(self, rows: Sequence[Row]) -> None:
        """Take in the final tokens of each row's current block, before the next one begins."""
        ...


class BlockCausal:
    """Block diffusion: the current block of each row attends to itself and to a cache of all blocks before it.

    The cache holds keys and values of final tokens only: full prompt blocks from the prefill, decoded blocks from a
    forward of their own after their last token.
    """

    def __init__(self, run: AccountedModel, cache: KeyValueCache | None = None) -> None:
        """cache: one that holds no row; by default of its own."""
        self._run = run
        model = run.model
        self.cache = cache or KeyValueCache(
            model.config, num_rows=0, capacity=0, dtype=model.dtype, device=model.device
        )
        self._mask_RLP: Tensor | None = None
        self._mask_is_for: list[int] = []

    def prefill(self, rows: Sequence[Row]) -> None:
        """Reserve memory for new rows and cache their full prompt blocks in one forward, of those that have any."""
        self.cache.add([row.number for row in rows], max(row.geometry.canvas_length for row in rows))
        rows = [row for row in rows if row.start > 0]
        if not rows:
            return
        starts, block_length = [row.start for row in rows], rows[0].geometry.block_length
        tokens_BS = pad_sequence([row.tokens_C[: max(starts)] for row in rows], batch_first=True)
        live_BS = visible(starts, tokens_BS.device)
        inputs = ForwardInput(
            tokens_BS=tokens_BS,
            positions_BS=torch.arange(max(starts), device=tokens_BS.device).expand_as(tokens_BS),
            live_BS=live_BS,
            mask_BSP=block_causal_mask(live_BS, block_length),
            block_length=block_length,
        )
        self._forward("prefill", rows, inputs, [0] * len(rows))

    def denoise(self, rows: Sequence[Row], window: Window) -> Tensor:
        """Run the current blocks as they stand. Every step overwrites what the one before left in the cache."""
        self.cache.keep([row.number for row in rows])
        return self._blocks("denoise", rows, window).hidden_BSD

    def commit(self, rows: Sequence[Row]) -> None:
        """Run the finished blocks once more, from their final tokens: those keys and values stay."""
        if rows:
            self._blocks("commit", rows, Window.of(rows))

    def _blocks(self, kind: ForwardKind, rows: Sequence[Row], window: Window) -> ForwardOutput:
        inputs = ForwardInput(
            tokens_BS=window.tokens_RL,
            positions_BS=window.index_RL,
            live_BS=torch.ones_like(window.masked_RL),
            mask_BSP=self._mask(rows),
            block_length=window.tokens_RL.shape[1],
            masked_BS=window.masked_RL,
        )
        return self._forward(kind, rows, inputs, [row.start for row in rows])

    def _forward(
        self, kind: ForwardKind, rows: Sequence[Row], inputs: ForwardInput, starts: Sequence[int]
    ) -> ForwardOutput:
        numbers = [row.number for row in rows]
        views = self.cache.views(numbers, starts)
        output = self._run(kind, rows, inputs, views)
        self.cache.put_back(numbers, views)
        return output

    def _mask(self, rows: Sequence[Row]) -> Tensor | None:
        """A block attends to everything before it and to all of itself, undecided positions included. None where the
        blocks of all rows are equally far; made once for as long as the rows stay at their blocks."""
        ends = [row.end for row in rows]
        if len(set(ends)) == 1:
            return None
        if ends != self._mask_is_for:
            seen_RP = visible(ends, rows[0].tokens_C.device)
            self._mask_RLP = seen_RP.unsqueeze(1).expand(-1, rows[0].geometry.block_length, -1)
            self._mask_is_for = ends
        return self._mask_RLP


class FullAttention:
    """Masked diffusion: every step runs the whole canvas, prompt and undecided answer included. There is no cache,
    since every position attends to every live one, so that nothing of a step can be kept exactly."""

    def __init__(self, run: AccountedModel) -> None:
        self._run = run

    def prefill(self, rows: Sequence[Row]) -> None:
        """Nothing: what the prompt's positions compute depends on the answer."""

    def denoise(self, rows: Sequence[Row], window: Window) -> Tensor:
        """Run the canvases of the rows that are still decoding, as far as the longest of them."""
        mask_id = self._run.model.config.mask_id
        tokens_BS = pad_sequence([row.tokens_C for row in rows], batch_first=True, padding_value=mask_id)
        bounds = [(row.geometry.padding, row.geometry.canvas_length) for row in rows]
        padding_B, end_B = torch.tensor(bounds, device=tokens_BS.device).unbind(dim=1)
        index_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        live_BS = (index_S >= padding_B.unsqueeze(1)) & (index_S < end_B.unsqueeze(1))
        all_live = all(bound == (0, tokens_BS.shape[1]) for bound in bounds)
        inputs = ForwardInput(
            tokens_BS=tokens_BS,
            positions_BS=(index_S - padding_B.unsqueeze(1)).clamp_min(0),
            live_BS=live_BS,
            mask_BSP=None if all_live else live_BS.unsqueeze(1).expand(-1, live_BS.shape[1], -1),
            block_length=rows[0].geometry.block_length,
            masked_BS=pad_sequence([row.masked_C for row in rows], batch_first=True),
        )
        hidden_BSD = self._run("denoise", rows, inputs).hidden_BSD
        return hidden_BSD.gather(1, window.index_RL.unsqueeze(2).expand(-1, -1, hidden_BSD.shape[2]))

    def commit(self, rows: Sequence[Row]) -> None:
        """Nothing: there is no cache."""


def block_causal_mask(live_RS: Tensor, block_length: int) -> Tensor:
    """Keys of the own block and of those before it, padding left out: bool [R, S, S]."""
    block_S = torch.arange(live_RS.shape[1], device=live_RS.device) // block_length
    causal_SS = block_S.unsqueeze(1) >= block_S
    # padding sees itself, else its softmax would have nothing to sum over
    itself_SS = torch.eye(live_RS.shape[1], dtype=torch.bool, device=live_RS.device)
    return (causal_SS & live_RS.unsqueeze(1)) | itself_SS
