"""Which expert is in which slot: bookkeeping only, without bytes and without opinions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertshare.experts.forecast import Bools, Ints


class SlotTable:
    """Slots that all layers share.

    slot_of_NE: the slot of each expert, -1 for none. layer_S, expert_S: who is in a slot, -1 for nobody. ready_S:
    whether its bytes are there. states_S: the same for whoever computes meanwhile, as Arrivals has it; the only array
    that other threads write. Whenever slot_of_NE names a slot, that slot's owner is that expert, even if an
    interrupt stops one of the methods half way; bytes count only where ready_S says so.
    """

    def __init__(self, num_slots: int, num_layers: int, num_experts: int) -> None:
        self.slot_of_NE: Ints = np.full((num_layers, num_experts), -1, dtype=np.int64)
        self.layer_S: Ints = np.full(num_slots, -1, dtype=np.int64)
        self.expert_S: Ints = np.full(num_slots, -1, dtype=np.int64)
        self.ready_S: Bools = np.zeros(num_slots, dtype=np.bool_)
        self.states_S: NDArray[np.uint8] = np.zeros(num_slots, dtype=np.uint8)
        self.ahead_S: Bools = np.zeros(num_slots, dtype=np.bool_)
        """Fetched ahead, and not borrowed since."""

    @property
    def num_slots(self) -> int:
        """Free or not."""
        return len(self.layer_S)

    def place(self, slot: int, layer: int, expert: int, *, ahead: bool) -> None:
        """Give a slot to an expert whose bytes are not there yet; who was in it is out."""
        self.clear(slot)
        self.states_S[slot] = 0
        self.ahead_S[slot] = ahead
        self.expert_S[slot] = expert
        self.layer_S[slot] = layer
        self.slot_of_NE[layer, expert] = slot

    def tell(self, slot: int, came: bool) -> None:
        """The bytes of a slot's expert are there, or will not come. From any thread."""
        self.states_S[slot] = 1 if came else 2

    def clear(self, slot: int) -> None:
        """Nobody is in the slot."""
        self.ready_S[slot] = False
        layer, expert = self.layer_S[slot], self.expert_S[slot]
        if layer >= 0 and self.slot_of_NE[layer, expert] == slot:
            self.slot_of_NE[layer, expert] = -1
        self.layer_S[slot] = -1
