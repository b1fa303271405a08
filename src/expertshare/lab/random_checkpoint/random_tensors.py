"""Random tensors of a real model's shapes, each drawn when it is asked for, and experts drawn from a pool.

Nothing is kept: a tensor is a function of the seed and its name. docs/memory.md describes the method. Many distinct
experts come from a few: expert e is pool member e mod P with its rows rolled. Turn t = e // P rolls the gate and up
rows by t * F / turns alike, and the down rows by t * D / turns, turns = E / P rounded up. Hidden units then meet other
columns of the down projection, and outputs other features: every expert is a function of its own with exactly the
statistics of its member. Rolling moves whole rows, so it commutes with every quantisation whose scales belong to rows
or to groups within rows: the pool is drawn and quantised once.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.convert.source import DTYPES, TensorEntry, is_expert
from expertshare.kernels.quantise import from_panels, to_panels
from expertshare.lab.bench.weights import fill
from expertshare.models.family import Target, family_named
from expertshare.models.transformer import MoETransformer
from expertshare.types import ExpertBank, QuantisedBank, QuantisedWeight, RoutingPlan


class ExpertPool:
    """P drawn members standing for E experts of one layer. bank: float32 or bfloat16, [P, ...] each."""

    def __init__(self, bank: ExpertBank, num_experts: int) -> None:
        self.bank = bank
        self._size = bank.down_EDF.shape[0]
        self._turns = -(-num_experts // self._size)

    def member(self, expert: int) -> int:
        """Which member an expert is made from."""
        return expert % self._size

    def shifts(self, expert: int) -> tuple[int, int]:
        """By how many rows gate and up are rolled, and by how many down is."""
        turn, (_, hidden, inner) = expert // self._size, self.bank.down_EDF.shape
        return turn * inner // self._turns, turn * hidden // self._turns

    def expert(self, expert: int, bank: ExpertBank | QuantisedBank | None = None) -> ExpertBank | QuantisedBank:
        """One expert as a bank of one, from this pool's weights or from `bank`, the same pool quantised."""
        member, (inner_shift, hidden_shift) = self.member(expert), self.shifts(expert)
        source = self.bank if bank is None else bank
        if isinstance(source, ExpertBank):
            gate_up = _roll_halves(source.gate_up_EHD[member], inner_shift)
            return ExpertBank(gate_up[None], source.down_EDF[member].roll(hidden_shift, 0)[None])
        return QuantisedBank(
            _moved(source.gate_up, member, inner_shift, halves=True),
            _moved(source.down, member, hidden_shift, halves=False),
        )

    def compute(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """What the experts of the plan make of the tokens, float32 [T, D], without building any of them.

        A rolled expert's hidden units are its member's, rolled; so each member runs its gate and up once for all
        tokens, and its down projection once for all of its pairs.
        """
        y_TD = torch.zeros_like(x_TD)
        _, hidden, inner = self.bank.down_EDF.shape
        ids_TK = plan.expert_ids_TK
        for member in range(self._size):
            tokens_P, slots_P = ((ids_TK >= 0) & (ids_TK % self._size == member)).nonzero(as_tuple=True)
            if len(tokens_P) == 0:
                continue
            gate_TF, up_TF = F.linear(x_TD, self.bank.gate_up_EHD[member].float()).chunk(2, dim=1)
            hidden_PF = (F.silu(gate_TF) * up_TF)[tokens_P]
            turns_P = ids_TK[tokens_P, slots_P] // self._size
            hidden_PF = _rolled_columns(hidden_PF, turns_P * inner // self._turns)
            out_PD = F.linear(hidden_PF, self.bank.down_EDF[member].float())
            out_PD = _rolled_columns(out_PD, turns_P * hidden // self._turns)
            y_TD.index_add_(0, tokens_P, out_PD * plan.weights_TK[tokens_P, slots_P].unsqueeze(1))
        return y_TD


def _roll_halves(rows: Tensor, shift: int) -> Tensor:
    """Gate rows and up rows, rolled alike."""
    return torch.cat([half.roll(shift, 0) for half in rows.chunk(2)])


def _rolled_columns(values_PC: Tensor, shifts_P: Tensor) -> Tensor:
    """Row p rolled by shifts_P[p], as Tensor.roll does it."""
    columns = values_PC.shape[1]
    index_PC = (torch.arange(columns) - shifts_P.unsqueeze(1)) % columns
    return values_PC.gather(1, index_PC)


def _moved(weight: QuantisedWeight, member: int, shift: int, *, halves: bool) -> QuantisedWeight:
    def roll(panels_EPX: Tensor) -> Tensor:
        rows = from_panels(panels_EPX[member])
        return to_panels(_roll_halves(rows, shift) if halves else rows.roll(shift, 0)).unsqueeze(0)

    minima = None if weight.minima_EPG is None else roll(weight.minima_EPG)
    return replace(weight, codes_EPC=roll(weight.codes_EPC), scales_EPG=roll(weight.scales_EPG), minima_EPG=minima)


POOL_SIZE = 8
"""Experts drawn per layer."""
COMMON_SHARE = 0.2
"""Share of an embedding's variance that all tokens have in common: what a concentrated router can hold on to."""
MASK_GAIN = 0.5
"""Size of the mask's embedding, which is the common direction and nothing else: a mask says nothing of its own."""
SHARPNESS = 3.0
"""Norm weight of queries and keys: logits of attention spread by its square, so that positions look elsewhere."""
ATTENTION_GAIN = 2.0
"""Of what attention adds over what experts add: masks differ by nothing but where they look."""
TEXT_GAIN = 3.0
"""Head rows of printable characters are this much larger, so that answers are text."""
SILU_PRODUCT_RMS = 0.6
"""Root mean square of silu(a) * b for independent normal a and b."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides about every byte. unique: experts per block and layer that vanilla routing should use."""

    config: ModelConfig
    unique: int
    seed: int
    dtype: str = "BF16"
    pool_size: int = POOL_SIZE


class RandomTensors:
    """Draws dense tensors by Hugging Face name and pools by layer."""

    def __init__(self, recipe: Recipe, text_ids: range) -> None:
        self.recipe, self._text_ids = recipe, text_ids
        family = family_named(recipe.config.family)
        self.places = {place.name: place for place in family.targets(recipe.config) if not is_expert(place)}
        with torch.device("meta"):
            state = MoETransformer(recipe.config).state_dict()
        self.entries = tuple(
            TensorEntry(name, self._dtype(place), tuple(place.of(state[place.entry]).shape))
            for name, place in self.places.items()
        )
        self._shapes = {entry.name: entry for entry in self.entries}

    def draw(self, name: str) -> Tensor:
        """One dense tensor; routers as they are before they are concentrated."""
        entry, place = self._shapes[name], self.places[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if place.entry.endswith("router.bias"):
            return tensor.zero_()
        if place.entry.endswith("norm.weight"):
            sharp = place.entry.endswith(("q_norm.weight", "k_norm.weight"))
            return tensor.fill_(SHARPNESS if sharp else 1.0)
        fill(tensor, self._std(place, entry), self._generator(name))
        if place.entry == "embed.weight":
            self._share_direction(tensor)
        if place.entry == "head.weight":
            self._prefer_text(tensor)
        return tensor

    def pool(self, moe_layer: int) -> ExpertPool:
        """The drawn experts of one layer."""
        config, recipe = self.recipe.config, self.recipe
        size, dtype = min(recipe.pool_size, config.router.num_experts), DTYPES[recipe.dtype]
        inner, hidden = config.expert_hidden, config.hidden_size
        generator = self._generator(f"experts {moe_layer}")
        gate_up = fill(torch.empty(size, 2 * inner, hidden, dtype=dtype), hidden**-0.5, generator)
        std = self._residual_gain() / SILU_PRODUCT_RMS * inner**-0.5
        return ExpertPool(
            ExpertBank(gate_up, fill(torch.empty(size, hidden, inner, dtype=dtype), std, generator)),
            config.router.num_experts,
        )

    def _dtype(self, place: Target) -> str:
        return "F32" if ".router." in place.entry else self.recipe.dtype

    def _std(self, place: Target, entry: TensorEntry) -> float:
        """Projections keep the size of what they are given; those that write to the residual stream are damped."""
        if place.entry == "embed.weight":
            return math.sqrt(1.0 - COMMON_SHARE)
        std = 1.0 / math.sqrt(entry.shape[-1])
        if place.entry.endswith("attention.out.weight"):
            return std * self._residual_gain() * ATTENTION_GAIN
        if place.entry.endswith("down.weight"):
            return std * self._residual_gain() / SILU_PRODUCT_RMS
        return std

    def _residual_gain(self) -> float:
        """1 / sqrt(2 * layers): all contributions together are as large as an embedding."""
        return 1.0 / math.sqrt(2 * self.recipe.config.num_layers)

    def _share_direction(self, embedding_VD: Tensor) -> None:
        """One direction in every embedding, and nothing else in that of the mask."""
        direction_D = torch.empty(embedding_VD.shape[1])
        fill(direction_D, math.sqrt(COMMON_SHARE), self._generator("common direction"))
        embedding_VD[self.recipe.config.mask_id].zero_()
        for rows in torch.split(embedding_VD, 4096):
            rows.add_(direction_D.to(rows.dtype))
        embedding_VD[self.recipe.config.mask_id].mul_(MASK_GAIN)

    def _prefer_text(self, head_VD: Tensor) -> None:
        head_VD[self._text_ids.start : self._text_ids.stop].mul_(TEXT_GAIN)
        for token in {*self.recipe.config.eos_ids, self.recipe.config.mask_id}:
            head_VD[token].zero_()

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.recipe.seed, zlib.crc32(name.encode())]))
