"""The smallest models that route as the three families do."""

from __future__ import annotations

from dataclasses import replace

from expertshare.config import RouterSpec
from expertshare.lab.bench.cases import CASES

TINY_LLADA2 = CASES["tiny"].config
TINY_LLADA_MOE = replace(
    TINY_LLADA2,
    family="llada_moe",
    num_layers=2,
    num_dense_layers=0,
    dense_hidden=0,
    shared_hidden=0,
    router=RouterSpec(num_experts=16, top_k=4, activation="softmax", renormalise=False),
)
TINY_SDAR = replace(
    TINY_LLADA_MOE,
    family="sdar_moe",
    router=RouterSpec(num_experts=24, top_k=4, activation="softmax", renormalise=True),
)
