"""What computes a model: the operations that every backend has, and the choice of one.

Models call these and never ask which backend they have. `TorchBackend` (torch_backend.py) says what each operation is;
`CpuBackend` (cpu_backend.py) and `TritonBackend` (triton/backend.py) override what they make faster, and
tests/kernels/test_backends.py compares every override with it.

Shapes: B rows, S positions, G sharing groups of L tokens, T tokens, D features, E experts, K experts per token, H query
heads, P positions that are attended to, C positions of a cache, R rows of hidden states, V vocabulary. Features and
weights are float32 or bfloat16, both the same; results have that dtype, sums are float32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.errors import ConfigError, nearest
from expertshare.routing import RoutingPolicy
from expertshare.types import Arrivals, Bank, Coreset, QuantisedTable, Routed, RoutingPlan

if TYPE_CHECKING:
    from expertshare.kernels.triton.graphs import Graphs

AUTO = "auto"
BACKENDS = ("torch", "cpu", "triton")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheSlice:
    """Where keys and values of new positions belong: [B, key/value heads, C, head dim] each, row b's from position
    starts[b] on."""

    keys_BHCD: Tensor
    values_BHCD: Tensor
    starts: Sequence[int]

    def reach(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values as far as the longest row goes with `length` new positions: views."""
        end = max(self.starts) + length
        return self.keys_BHCD[:, :, :end], self.values_BHCD[:, :, :end]


@dataclass(frozen=True, slots=True)
class LayerKeyValues:
    """Keys (rotated) and values of one layer: [B, key/value heads, positions, head dim] each. As a `Past`: what is
    cached, with no memory behind it."""

    keys_BHSD: Tensor
    values_BHSD: Tensor

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        """All of these, then the new ones, in memory of their own."""
        return LayerKeyValues(
            torch.cat((self.keys_BHSD, new.keys_BHSD), dim=2), torch.cat((self.values_BHSD, new.values_BHSD), dim=2)
        )

    def cache_slice(self) -> None:
        """There is no memory behind these."""


class Past(Protocol):
    """What a layer of a forward may attend to beside its own positions."""

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        """Cached and new keys and values, in the order of the forward's mask."""

    def cache_slice(self) -> CacheSlice | None:
        """Where new keys and values belong, for a backend that writes them there instead of calling `extended_by`;
        None where there is no memory for them, or only the device knows where."""


class Backend(Protocol):
    """The operations of a model. All raise ConfigError for what the backend cannot take."""

    @property
    def name(self) -> str:
        """As the command line and reports have it."""

    @property
    def takes_arrivals(self) -> bool:
        """Whether `moe_ffn` computes while experts of a loan are still on their way, instead of waiting for them."""

    def graphs(self, device: torch.device) -> Graphs | str:
        """How steps on this device are captured and replayed; or why they cannot be, for people: a graph holds only
        what needs no word from the host."""

    def route(
        self,
        x_GLD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        policy: RoutingPolicy,
        spec: RouterSpec,
        live_GL: Tensor,
        *,
        masked_GL: Tensor | None = None,
        previous: Coreset | None = None,
    ) -> Routed:
        """A layer's routing: router scores, coreset, plan, counts.

        weight_ED float32 or bfloat16, bias_E float32: scores are float32. live_GL, masked_GL bool, as in RouterScores.
        previous: a coreset to keep in the place of a selection.
        """

    def moe_ffn(self, x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
        """Run each token through the experts of its plan and mix the outputs with its weights: [T, D].

        bank: floats in the tokens' dtype, or quantised. arrivals: of the loan that the bank came with, if some of its
        experts are on their way.
        """

    def linear(self, x: Tensor, weight_ND: Tensor) -> Tensor:
        """x [..., D] times the transpose of weight_ND: [..., N]."""

    def swiglu(self, x: Tensor, gate_up_HD: Tensor, down_DF: Tensor) -> Tensor:
        """down(silu(gate x) * up x) with the F gate rows first in gate_up, H = 2F: the shape of x [..., D]."""

    def rms_norm(self, x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        """scale * (x / root mean square of x), the mean taken in float32 over the last dimension."""

    def add_and_norm(self, x: Tensor, delta: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + delta, and `rms_norm` of that."""

    def prepare_heads(
        self,
        qkv_BSHD: Tensor,
        num_heads: int,
        scales: tuple[Tensor, Tensor],
        eps: float,
        tables: tuple[Tensor, Tensor],
        past: Past | None,
    ) -> tuple[Tensor, LayerKeyValues, LayerKeyValues]:
        """Norm and rotate the heads of queries and keys, and put the new keys and values behind the past.

        qkv: heads of queries, keys and values side by side; may be overwritten. scales: of queries and keys, [head dim]
        each. tables: cosine and sine, [B, 1, S, rotated features] each. Returns queries [B, H, S, head dim], the new
        keys and values, and all that may be attended to.
        """

    def attention(self, q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> Tensor:
        """Softmax attention, grouped heads, scaled by 1 / sqrt(head dim): [B, S, H * head dim].

        mask: bool, True where a query sees a key, at least one each; None: all.
        """

    def embed(self, tokens: Tensor, weight_VD: Tensor | QuantisedTable, dtype: torch.dtype) -> Tensor:
        """Embeddings of token ids [...]: [..., D], those of an int8 table widened to `dtype`."""

    def logits(self, hidden: Tensor, weight_VD: Tensor | QuantisedTable) -> Tensor:
        """Scores of the whole vocabulary [..., V] from hidden states [..., D]."""

    def best_token(
        self, hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The id of each row's largest logit, int64 [R], the lowest one where several are, and its probability under
        the softmax, float32 [R]: NaN where a logit is not finite. `excluded` ids have no part in either."""


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend of this name for a model on `device`; "auto" is the fastest one for inference there.

    Where our own kernel would be the fastest but was not built, that is said once, in one line of the log. Raises
    ConfigError for a name that does not exist, and for "cpu" or "triton" where they cannot run.
    """
    from expertshare.kernels.torch_backend import TorchBackend

    if name == AUTO:
        reason = native.unavailable_reason() if device.type == "cpu" else ""
        name = "cpu" if reason is None else "torch"
        if reason:
            _say_once(f"experts are computed by torch, more slowly than by our own kernel: {reason}")
    if name == "torch":
        return TorchBackend()
    if name == "cpu":
        from expertshare.kernels.cpu_backend import CpuBackend

        native.library()
        _check_device(name, device, "cpu")
        return CpuBackend()
    if name == "triton":
        from expertshare.kernels.triton import check_available, interpreted
        from expertshare.kernels.triton.backend import TritonBackend

        check_available()
        if interpreted():
            _check_device(name, device, "cpu", " (TRITON_INTERPRET is set)")
        else:
            _check_device(name, device, "cuda")
        return TritonBackend()
    if name in ("grouped", "reference"):
        raise ConfigError(f"unknown expert backend {name!r}: it is 'torch' now. Use 'torch' or 'auto'.")
    raise ConfigError(f"unknown expert backend {name!r}. {nearest(name, [AUTO, *BACKENDS])}")


def _check_device(name: str, device: torch.device, runs_on: str, why: str = "") -> None:
    if device.type != runs_on:
        raise ConfigError(
            f"the backend {name!r} expects a model on the device {runs_on!r}{why}, got one on {device.type!r}: use "
            f"--device {runs_on}, or the backend 'auto'."
        )


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def check_excluded(excluded: Sequence[int], vocabulary: int) -> None:
    """ConfigError for ids that `best_token` is to exclude and that are none, or where no id is left."""
    if any(not 0 <= token < vocabulary for token in excluded):
        raise ConfigError(f"excluded ids must lie in 0..{vocabulary - 1}, got {list(excluded)}.")
    if len(set(excluded)) == vocabulary:
        raise ConfigError(f"all {vocabulary} ids of the vocabulary are excluded: expected one at least to choose from.")
