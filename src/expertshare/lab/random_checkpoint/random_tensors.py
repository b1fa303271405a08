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
from expertshare.models.family import family_named
from expertshare.models.transformer import MoETransformer
from expertshare.types import ExpertBank, QuantisedBank, QuantisedWeight, RoutingPlan

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


class ExpertPool:
    """P drawn members standing for E experts of one layer. bank: float32 or bfloat16, [P, ...] each."""

    def __init__(self, bank: ExpertBank, num_experts: int) -> None:
        self.bank = bank
        self._size = bank.down_EDF.shape[0]
        self._turns = -(-num_experts // self._size)

    def expert(self, expert: int, bank: ExpertBank | QuantisedBank | None = None) -> ExpertBank | QuantisedBank:
        """One expert as a bank of one, from this pool's weights or from `bank`, the same pool quantised."""
        turn, member = divmod(expert, self._size)
        _, hidden, inner = self.bank.down_EDF.shape
        up_shift, down_shift = turn * inner // self._turns, turn * hidden // self._turns
        source = self.bank if bank is None else bank
        if isinstance(source, ExpertBank):
            gate_up, down = source.gate_up_EHD[member], source.down_EDF[member]
            return ExpertBank(_rolled(gate_up, up_shift, 2)[None], _rolled(down, down_shift, 1)[None])
        return QuantisedBank(
            _rolled_codes(source.gate_up, member, up_shift, 2), _rolled_codes(source.down, member, down_shift, 1)
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


def _rolled(rows: Tensor, shift: int, parts: int) -> Tensor:
    """Rows rolled within each of so many parts: gate rows and up rows alike."""
    return torch.cat([part.roll(shift, 0) for part in rows.chunk(parts)])


def _rolled_columns(values_PC: Tensor, shifts_P: Tensor) -> Tensor:
    """Row p rolled by shifts_P[p], as Tensor.roll does it."""
    columns = values_PC.shape[1]
    index_PC = (torch.arange(columns) - shifts_P.unsqueeze(1)) % columns
    return values_PC.gather(1, index_PC)


def _rolled_codes(weight: QuantisedWeight, member: int, shift: int, parts: int) -> QuantisedWeight:
    """One member's, row by row as its floats would be."""

    def roll(panels_EPX: Tensor) -> Tensor:
        return to_panels(_rolled(from_panels(panels_EPX[member]), shift, parts)).unsqueeze(0)

    minima = None if weight.minima_EPG is None else roll(weight.minima_EPG)
    return replace(weight, codes_EPC=roll(weight.codes_EPC), scales_EPG=roll(weight.scales_EPG), minima_EPG=minima)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomModel:
    """What decides about every byte. unique: experts per block and layer that vanilla routing should use."""

    config: ModelConfig
    unique: int
    seed: int
    dtype: str = "BF16"
    pool_size: int = POOL_SIZE


class RandomTensors:
    """Draws dense tensors by Hugging Face name and pools by layer."""

    def __init__(self, model: RandomModel, text_ids: range) -> None:
        self._model, self._text_ids, config = model, text_ids, model.config
        self._residual_gain = 1.0 / math.sqrt(2 * config.num_layers)
        """All contributions to the residual stream together are as large as an embedding."""
        every = family_named(config.family).targets(config)
        self.targets = {target.name: target for target in every if not is_expert(target)}
        with torch.device("meta"):
            state = MoETransformer(config).state_dict()
        self.entries = {
            name: TensorEntry(
                name, "F32" if ".router." in target.entry else model.dtype, tuple(target.of(state[target.entry]).shape)
            )
            for name, target in self.targets.items()
        }

    def draw(self, name: str) -> Tensor:
        """One dense tensor; routers as they are before they are concentrated. Projections keep the size of what they
        are given; those that write to the residual stream are damped."""
        shape, entry = self.entries[name].shape, self.targets[name].entry
        tensor = torch.empty(shape, dtype=DTYPES[self.entries[name].dtype])
        if entry.endswith("router.bias"):
            return tensor.zero_()
        if entry.endswith("norm.weight"):
            return tensor.fill_(SHARPNESS if entry.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
        std = 1.0 / math.sqrt(shape[-1])
        if entry == "embed.weight":
            std = math.sqrt(1.0 - COMMON_SHARE)
        elif entry.endswith("attention.out.weight"):
            std = std * self._residual_gain * ATTENTION_GAIN
        elif entry.endswith("down.weight"):
            std = std * self._residual_gain / SILU_PRODUCT_RMS
        fill(tensor, std, self._generator(name))
        if entry == "embed.weight":
            self._share_direction(tensor)
        if entry == "head.weight":
            self._prefer_text(tensor)
        return tensor

    def pool(self, moe_layer: int) -> ExpertPool:
        """The drawn experts of one layer."""
        config, dtype = self._model.config, DTYPES[self._model.dtype]
        size = min(self._model.pool_size, config.router.num_experts)
        inner, hidden = config.expert_hidden, config.hidden_size
        generator = self._generator(f"experts {moe_layer}")
        gate_up = fill(torch.empty(size, 2 * inner, hidden, dtype=dtype), hidden**-0.5, generator)
        std = self._residual_gain / SILU_PRODUCT_RMS * inner**-0.5
        down = fill(torch.empty(size, hidden, inner, dtype=dtype), std, generator)
        return ExpertPool(ExpertBank(gate_up, down), config.router.num_experts)

    def _share_direction(self, embedding_VD: Tensor) -> None:
        """One direction in every embedding, and nothing else in that of the mask."""
        direction_D = torch.empty(embedding_VD.shape[1])
        fill(direction_D, math.sqrt(COMMON_SHARE), self._generator("common direction"))
        embedding_VD[self._model.config.mask_id].zero_()
        for rows in torch.split(embedding_VD, 4096):
            rows.add_(direction_D.to(rows.dtype))
        embedding_VD[self._model.config.mask_id].mul_(MASK_GAIN)

    def _prefer_text(self, head_VD: Tensor) -> None:
        head_VD[self._text_ids.start : self._text_ids.stop].mul_(TEXT_GAIN)
        for token in {*self._model.config.eos_ids, self._model.config.mask_id}:
            head_VD[token].zero_()

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._model.seed, zlib.crc32(name.encode())]))
