"""Hit rates of the expert store on recorded traces, beside LRU and the best possible, as a table.

Example: python benchmarks/expert_hits.py models/reference examples/prompts.jsonl --policies vanilla,des-vote:budget=16
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from expertshare.api import load
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.evaluation.prompts import read_prompts
from expertshare.evaluation.runner import encode_prompts
from expertshare.experts import ResidentExperts
from expertshare.experts.slots import Bools, simulate
from expertshare.models import LoadedModel, Runtime
from expertshare.routing import RoutingPolicy, parse_policies
from expertshare.types import Loan

Trace = list[tuple[int, Bools]]
SHARES = (0.4, 0.5, 0.75, 1.0, 1.25)


class RecordingStore:
    """A store that lends everything, and remembers what was asked for."""

    resident = False  # it hears of no step that is replayed

    def __init__(self, layers: list[ResidentExperts]) -> None:
        self._layers = layers
        self.trace: Trace = []

    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> AbstractContextManager[Loan]:
        self.trace.append((layer, active_E.numpy().copy()))
        return self._layers[layer].borrow(layer, active_E, early=early)


def record(loaded: LoadedModel, prompts: list[list[int]], policy: RoutingPolicy) -> Trace:
    """The experts of every layer of every forward, one prompt after another, one token a step."""
    store = RecordingStore([module for module in loaded.model.modules() if isinstance(module, ResidentExperts)])
    options = DecodingOptions(gen_length=64, threshold=None)
    decoder = BlockDecoder(loaded.model, Runtime(policy=policy, store=store), options)
    for prompt in prompts:
        for _ in decoder.blocks([prompt]):
            pass
    return store.trace


def lru(trace: Trace, num_slots: int) -> float:
    """Out goes what was unused for longest."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = total = 0
    for layer, member_E in trace:
        keys = [(layer, expert) for expert in np.flatnonzero(member_E).tolist()]
        hits, total = hits + sum(key in cache for key in keys), total + len(keys)
        for key in keys:
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > num_slots:
            cache.popitem(last=False)
    return hits / total


def best(trace: Trace, num_slots: int) -> float:
    """Belady's rule: out goes what is needed last, known from the whole trace."""
    coming: dict[tuple[int, int], int] = {}
    turns = []
    for turn in range(len(trace) - 1, -1, -1):
        layer, member_E = trace[turn]
        keys = [(layer, expert) for expert in np.flatnonzero(member_E).tolist()]
        turns.append({key: coming.get(key, len(trace)) for key in keys})
        coming.update(dict.fromkeys(keys, turn))
    cache: dict[tuple[int, int], int] = {}
    hits = total = 0
    for keys_now in reversed(turns):
        hits, total = hits + sum(key in cache for key in keys_now), total + len(keys_now)
        cache.update(keys_now)
        others = sorted((key for key in cache if key not in keys_now), key=lambda key: cache[key])
        for key in others[max(0, num_slots - len(keys_now)) :]:
            del cache[key]
    return hits / total


def rows(loaded: LoadedModel, prompts: list[list[int]], policy: RoutingPolicy, label: str) -> Iterator[str]:
    """A line for each size of the store, as a share of what one round of all layers needs."""
    trace = record(loaded, prompts, policy)
    num_layers, num_experts = loaded.config.num_moe_layers, loaded.config.router.num_experts
    counts = [int(member_E.sum()) for _, member_E in trace]
    a_round = num_layers * float(np.mean(counts))
    for share in SHARES:
        num_slots = max(int(share * a_round), max(counts))
        layers = simulate(trace, num_slots=num_slots, num_layers=num_layers, num_experts=num_experts)
        hits = sum(layer.hits or 0 for layer in layers) / sum(counts)
        rates = f"{lru(trace, num_slots):.3f} | {hits:.3f} | {best(trace, num_slots):.3f}"
        yield f"| {label} | {np.mean(counts):.1f} | {num_slots} ({num_slots / a_round:.2f}) | {rates} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--policies", default="vanilla,des-vote:budget=16")
    parser.add_argument("--limit", type=int, default=8)
    arguments = parser.parse_args()
    loaded = load(arguments.model, dtype="float32")
    texts = [record.prompt for record in read_prompts(arguments.prompts)[: arguments.limit]]
    prompts = encode_prompts(loaded, texts, None)
    print("| policy | experts per layer | slots (of a round) | LRU | ours | best possible |\n|---|--:|--:|--:|--:|--:|")
    for policy in parse_policies([arguments.policies]):
        for row in rows(loaded, prompts, policy, policy.name):
            print(row, flush=True)


if __name__ == "__main__":
    main()
