"""How many requests hit, on traces recorded from the reference model, beside LRU and the best that is possible."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.errors import ExpertMemoryError
from expertshare.evaluation.prompts import read_prompts
from expertshare.evaluation.runner import encode_prompts
from expertshare.experts import BudgetedStore, ResidentExperts
from expertshare.experts.slots import ReuseForecast, simulate
from expertshare.models import Runtime, load_model
from expertshare.routing import parse_policy
from expertshare.types import Loan

from .conversion import FORM, random_model

ROOT = Path(__file__).parents[2]
Trace = list[tuple[int, frozenset[int]]]


class _Recording:
    """A store that lends everything, and remembers what was asked for."""

    resident = True

    def __init__(self, layers: list[ResidentExperts]) -> None:
        self._layers, self.trace = layers, cast(Trace, [])

    def borrow(self, layer: int, active_E: torch.Tensor, *, early: bool = False) -> AbstractContextManager[Loan]:
        self.trace.append((layer, frozenset(active_E.nonzero().flatten().tolist())))
        return self._layers[layer].borrow(layer, active_E, early=early)


def record(policy: str) -> Trace:
    """The experts of every layer of every forward, over four prompts."""
    loaded = load_model(ROOT / "models" / "reference", torch.float32)
    store = _Recording([module for module in loaded.model.modules() if isinstance(module, ResidentExperts)])
    texts = [record.prompt for record in read_prompts(ROOT / "examples" / "prompts.jsonl")[:4]]
    runtime = Runtime(policy=parse_policy(policy), store=store)
    options = DecodingOptions(gen_length=32, threshold=None, steps_per_block=16)
    decoder = BlockDecoder(loaded.model, runtime, options)
    for prompt in encode_prompts(loaded, texts, None):
        for _ in decoder.blocks([prompt]):
            pass
    return store.trace


def longest_unused_out(trace: Trace, num_slots: int) -> float:
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = total = 0
    for layer, experts in trace:
        keys = [(layer, expert) for expert in experts]
        hits += sum(key in cache for key in keys)
        total += len(keys)
        for key in keys:
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > num_slots:
            cache.popitem(last=False)
    return hits / total


def best_possible(trace: Trace, num_slots: int) -> float:
    """Belady's rule: out goes what is needed last, known from the whole trace."""
    coming: dict[tuple[int, int], int] = {}
    turns = []
    for turn in range(len(trace) - 1, -1, -1):
        keys = [(trace[turn][0], expert) for expert in trace[turn][1]]
        turns.append({key: coming.get(key, len(trace)) for key in keys})
        coming.update(dict.fromkeys(keys, turn))
    cache: dict[tuple[int, int], int] = {}
    hits = total = 0
    for turn in reversed(turns):
        hits += sum(key in cache for key in turn)
        total += len(turn)
        cache.update(turn)
        others = sorted((key for key in cache if key not in turn), key=lambda key: cache[key])
        for key in others[max(0, num_slots - len(turn)) :]:
            del cache[key]
    return hits / total


def ours(directory: Path, trace: Trace, num_slots: int) -> float:
    layout = random_model(directory, 3, 64)
    with BudgetedStore(directory, layout, num_slots * FORM.slab_bytes, prefetch=False) as store:
        for layer, experts in trace:
            active_E = torch.zeros(64, dtype=torch.bool)
            active_E[list(experts)] = True
            with store.borrow(layer, active_E):
                pass
        total, layers = store.statistics().total, store.statistics().layers
    members = [(layer, np.isin(np.arange(64), list(experts))) for layer, experts in trace]
    simulated = simulate(members, num_slots=num_slots, num_layers=3, num_experts=64)
    assert [(s.requests, s.hits, s.reads) for s in simulated] == [(s.requests, s.hits, s.reads) for s in layers]
    rate = total.hit_rate
    assert rate is not None
    return rate


@pytest.mark.parametrize("policy", ["vanilla", "des-vote:budget=16"])
def test_hits_come_close_to_the_best_possible(policy: str, tmp_path: Path) -> None:
    trace = record(policy)
    mean = np.mean([len(experts) for _, experts in trace])
    most = max(len(experts) for _, experts in trace)
    for share_of_round in (0.5, 0.75, 1.0, 1.5):
        num_slots = max(most, int(3 * mean * share_of_round))
        found, best = ours(tmp_path, trace, num_slots), best_possible(trace, num_slots)
        assert longest_unused_out(trace, num_slots) - 0.01 <= found <= best + 1e-9
        assert found >= 0.85 * best


def test_a_simulation_with_too_few_slots_is_refused() -> None:
    with pytest.raises(ExpertMemoryError, match="needs 3 experts at once"):
        simulate([(0, np.ones(3, dtype=np.bool_))], num_slots=2, num_layers=1, num_experts=3)


def test_a_forecast_by_hand() -> None:
    forecast = ReuseForecast(4, 3)
    experts = np.arange(3)
    for _ in range(500):
        forecast.observe(2, np.array([True, False, False]))
        forecast.observe(2, np.array([True, False, True]))
    always, never, sometimes = forecast.layers_until_use(0, 2, experts)
    assert always == pytest.approx(2.0, abs=0.5)  # two layers on, and used at every visit
    assert never > 100
    assert sometimes > 2 + 4  # it skips the next visit
    forecast.observe(2, np.array([True, False, False]))
    assert forecast.layers_until_use(0, 2, experts)[2] == pytest.approx(2.0, abs=0.5)
    assert forecast.layers_until_use(2, 2, experts)[0] == pytest.approx(4.0, abs=0.5)  # it has just run
    assert forecast.layers_until_use(1, 2, experts)[0] == pytest.approx(1.0, abs=0.5)
