"""Seconds per block, measured so that a machine that slows down for a while slows down everybody."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from expertshare.decoding import DecodingOptions
from expertshare.evaluation import Setup, answer_prompts
from expertshare.models import LoadedModel
from expertshare.types import RoutingPolicy

ROUNDS, PROMPTS = 5, 8


def seconds_per_block(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[RoutingPolicy],
    options: DecodingOptions,
    setup: Setup,
) -> list[float]:
    """For each policy the median over rounds of decoding time per decoded block; in each round every policy decodes
    the same prompts once, in an order that moves on from round to round. The first round only warms up."""
    measured: list[list[float]] = [[] for _ in policies]
    for turn in range(ROUNDS + 1):
        for place in range(len(policies)):
            which = (place + turn) % len(policies)
            blocks = 0

            def count(_: object) -> None:
                nonlocal blocks
                blocks += 1

            run = answer_prompts(loaded, prompts[:PROMPTS], policies[which], options, setup=setup, on_block=count)
            if turn:
                measured[which].append(run.elapsed_s / blocks)
    return [statistics.median(times) for times in measured]
