"""Ctrl-C may come between any two lines of the store: what it lends afterwards must still be right."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from expertshare.experts import BudgetedStore
from expertshare.types import ExpertBank

from .conversion import FORM, random_model, random_slabs

LAYERS, EXPERTS = 3, 6
ROOM = str(Path("expertshare") / "experts")


class _InterruptAt:
    """Raises KeyboardInterrupt before the `count`-th line of the expert stores that this thread runs."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, frame: FrameType, event: str, _: Any) -> _InterruptAt | None:
        if ROOM not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_after_an_interrupt_anywhere_every_expert_is_right(tmp_path: Path) -> None:
    layout = random_model(tmp_path, LAYERS, EXPERTS)
    expected = [FORM.bank(random_slabs(FORM, layer, EXPERTS)) for layer in range(LAYERS)]
    generator = torch.Generator().manual_seed(0)
    interrupted = turn = 0

    def use(store: BudgetedStore, layer: int, active_E: torch.Tensor) -> None:
        with store.borrow(layer, active_E) as loan:
            found, right = loan.bank, expected[layer]
            assert isinstance(found, ExpertBank)
            assert isinstance(right, ExpertBank)
            assert loan.slot_of_E is not None
            lent = found.down_EDF[loan.slot_of_E[active_E]]
            assert torch.equal(lent.view(torch.int32), right.down_EDF[active_E].view(torch.int32))

    with BudgetedStore(tmp_path, layout, 5 * FORM.slab_bytes) as store:
        for count in range(1, 400):
            for interrupting in (True, False, False):
                active_E = torch.zeros(EXPERTS, dtype=torch.bool)
                active_E[torch.randperm(EXPERTS, generator=generator)[:4]] = True
                if interrupting:
                    sys.settrace(_InterruptAt(count))
                try:
                    use(store, turn % LAYERS, active_E)
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    sys.settrace(None)
                turn += 1
        assert interrupted > 100
        assert not store._leases
    assert not any(thread.name.startswith("expert-reader") for thread in threading.enumerate())
