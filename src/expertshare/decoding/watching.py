"""Who looks on while a batch is decoded: told of every forward and every step, never asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from expertshare.decoding.canvas import Window
from expertshare.decoding.row import Row
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import RoutingTrace


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
