"""The capacity model against figures worked out by hand, and against a plain re-count token by token."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertshare.convert.sizes import likeness, sizes_like
from expertshare.errors import ConfigError, InputError
from expertshare.experts.recording import RoutingRecord
from expertshare.lab.simulate.capacity import Simulation, part_seconds, simulate_replica
from expertshare.lab.simulate.deployment import CARDS, Cluster, Demand, find_card
from expertshare.lab.simulate.placement import PLACEMENTS, BlockTrace, cut_into_blocks, draw_blocks, place, run_layer

MINI = sizes_like(likeness("llada2.0-mini"))
CARD = replace(find_card("h100"), bytes_per_s=1e12, flops_per_s=2e14, link_bytes_per_s=1e11, network_bytes_per_s=1e10)
SLAB = 3 * 512 * 2048 * 2


def trace_of(experts: np.ndarray, num_experts: int = 256) -> BlockTrace:
    return BlockTrace("hand-made", num_experts, experts.astype(np.int64))


def random_trace(seed: int, *, layers: int = 2, blocks: int = 5, experts: int = 256, length: int = 32) -> BlockTrace:
    rng = np.random.default_rng(seed)
    shape = (layers, blocks, length)
    return trace_of(np.stack([rng.permutation(experts)[:8] for _ in range(np.prod(shape))]).reshape(*shape, 8), experts)


def test_one_gpu_by_hand() -> None:
    """One block whose tokens all use experts 0..7: reads 8 experts, 256 pairs, sends nothing."""
    trace = trace_of(np.broadcast_to(np.arange(8), (1, 1, 32, 8)))
    replica = simulate_replica(MINI, trace, Cluster(card=CARD, sequences=1), Demand(), num_gpus=1)
    reading = (8 * SLAB + 2 * 32 * 2048 * 2) / 1e12
    computing = 256 * 3 * 512 * 2048 / 1e14
    assert replica.experts_s == pytest.approx(19 * max(reading, computing))
    assert (replica.exchange_s, replica.exchange_bytes, replica.pairs.mean) == (0.0, 0.0, 1.0)
    assert replica.experts_per_gpu == 8
    assert replica.ranks_per_token == 1
    assert replica.memory.experts == 19 * 256 * SLAB
    assert replica.memory.cache == 2 * 20 * 4 * 128 * 512 * 2
    summed = simulate_replica(MINI, trace, Cluster(card=CARD, sequences=1, overlap=0.0), Demand(), num_gpus=1)
    assert summed.experts_s == pytest.approx(19 * (reading + computing))


def test_traffic_of_two_gpus_by_hand() -> None:
    """Tokens of both GPUs use experts 0 (GPU 0) and 1, 3 (GPU 1): half of the tokens cross once, not twice."""
    experts = np.broadcast_to(np.array([0, 1, 3, -1, -1, -1, -1, -1]), (1, 1, 32, 8))
    cluster = Cluster(card=CARD, sequences=1, placement="round-robin")
    replica = simulate_replica(MINI, trace_of(experts), cluster, Demand(), num_gpus=2)
    one_way = 32 * 2048 * 2  # of GPU 0's tokens to GPU 1, and as much the other way
    assert replica.exchange_bytes == 19 * 2 * 2 * one_way
    assert replica.exchange_s == pytest.approx(19 * 2 * one_way / 1e11)
    assert replica.network_bytes == 0
    assert replica.ranks_per_token == 2
    assert replica.pairs.mean == pytest.approx(4 / 3)  # 64 pairs of 0, 128 of 1 and 3
    apart = replace(cluster, card=replace(CARD, gpus_per_node=1))
    far = simulate_replica(MINI, trace_of(experts), apart, Demand(), num_gpus=2)
    assert far.network_bytes == far.exchange_bytes == replica.exchange_bytes
    assert far.exchange_s == pytest.approx(10 * replica.exchange_s)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    name=st.sampled_from(sorted(PLACEMENTS)),
    copies=st.integers(0, 5),
)
def test_steps_equal_a_count_token_by_token(seed: int, ranks: int, name: str, copies: int) -> None:
    trace = random_trace(seed, layers=1, blocks=3, experts=16, length=4)
    experts = trace.experts_NXLK[0].copy()
    experts[0, 1, 3:] = -1  # a token with fewer
    experts[1, 2] = -1  # padding
    placement = place(name, trace.load_NE()[0], ranks, copies if name == "replicated" else 0)
    assert set(placement.expert_of_S) == set(range(16))
    draws = draw_blocks(3, num_ranks=ranks, per_rank=2, steps=2, seed=seed)
    ran = run_layer(experts, placement, draws)
    for step, draw in enumerate(draws):
        slots: set[int] = set()
        pairs, tokens = np.zeros(ranks, dtype=int), np.zeros((ranks, ranks), dtype=int)
        for home in range(ranks):
            for block in draw[home]:
                for position, ids in enumerate(experts[block]):
                    reached = set()
                    for expert in ids[ids >= 0]:
                        own = [slot for slot, held in enumerate(placement.expert_of_S) if held == expert]
                        slot = own[position % len(own)]
                        slots.add(slot)
                        pairs[placement.rank_of_S[slot]] += 1
                        reached.add(placement.rank_of_S[slot])
                    for rank in reached:
                        tokens[home, rank] += 1
        assert ran.pairs_PR[step].tolist() == pairs.tolist()
        assert ran.tokens_PRR[step].tolist() == tokens.tolist()
        unique = [sum(placement.rank_of_S[slot] == rank for slot in slots) for rank in range(ranks)]
        assert ran.unique_PR[step].tolist() == unique


def test_placements() -> None:
    load = np.array([9, 1, 8, 1, 1, 1, 1, 1])
    in_turn = place("round-robin", load, 2, 0)
    assert in_turn.rank_of_S.tolist() == [0, 1] * 4
    even = place("balanced", load, 2, 0)
    assert np.bincount(even.rank_of_S).tolist() == [4, 4]
    heavy = np.bincount(even.rank_of_S, weights=load)
    assert heavy.max() < np.bincount(in_turn.rank_of_S, weights=load).max()
    copied = place("replicated", load, 2, 2)
    assert np.bincount(copied.expert_of_S).tolist() == [2, 1, 2, 1, 1, 1, 1, 1]
    for expert in (0, 2):
        assert set(copied.rank_of_S[copied.expert_of_S == expert]) == {0, 1}
    assert copied.most_slots() == 5
    with pytest.raises(ConfigError, match="Did you mean 'balanced'"):
        place("balance", load, 2, 0)
    with pytest.raises(InputError, match=r"1\.\.8"):
        place("balanced", load, 9, 0)
    with pytest.raises(InputError, match="--copies"):
        place("balanced", load, 2, 1)


def test_balancing_and_copies_even_out_a_skewed_trace() -> None:
    rng = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, 257) ** 1.5  # the busiest expert alone is more than the share of a GPU
    picks = [rng.choice(256, 8, replace=False, p=weight / weight.sum()) for _ in range(8 * 32)]
    trace = trace_of(np.stack(picks).reshape(1, 8, 32, 8))
    spread = {
        name: simulate_replica(
            MINI, trace, Cluster(card=CARD, placement=name, copies=copies), Demand(), num_gpus=16
        ).pairs.mean
        for name, copies in (("round-robin", 0), ("balanced", 0), ("replicated", 32))
    }
    assert 1.0 <= spread["replicated"] < spread["balanced"] < spread["round-robin"]


def test_fewer_unique_experts_never_take_longer_and_save_no_traffic_by_themselves() -> None:
    vanilla = random_trace(0)
    shared = trace_of(vanilla.experts_NXLK % 16)
    for degree in (1, 4):
        one = simulate_replica(MINI, vanilla, Cluster(card=CARD), Demand(), num_gpus=degree)
        other = simulate_replica(MINI, shared, Cluster(card=CARD), Demand(), num_gpus=degree)
        assert other.experts_s < one.experts_s
        assert other.dense_s == one.dense_s
        assert other.memory == one.memory


def test_capacity_by_hand() -> None:
    demand = Demand(requests_per_s=50.0, prompt_length=64, gen_length=96, steps_per_block=8, load=0.5)
    simulation = Simulation(MINI, random_trace(1), Cluster(card=CARD, sequences=4), demand, steps=4)
    two = simulation.capacity(2)
    step = two.replica.step_s
    assert step == two.replica.dense_s + two.replica.experts_s + two.replica.exchange_s
    assert two.tokens_per_s == pytest.approx(8 * 32 / (9 * step))
    assert two.requests_per_s == pytest.approx(8 / ((3 * 9 + 2) * step))
    assert two.replicas == int(np.ceil(50 / (0.5 * two.requests_per_s)))
    assert two.gpus == 2 * two.replicas
    json.dumps(two.to_json(), allow_nan=False)
    point = simulation.best(7, [2])
    assert (point.replicas, point.expert_parallel) == (3, 2)
    assert point.tokens_per_s == pytest.approx(3 * two.tokens_per_s)
    small = Simulation(MINI, random_trace(1), Cluster(card=replace(CARD, memory_bytes=1e9)), demand, steps=1)
    assert small.best(4).expert_parallel is None
    assert simulation.degrees(1_000_000) == [2**n for n in range(9)]


def test_full_attention_computes_the_whole_canvas() -> None:
    sizes = sizes_like(likeness("llada-moe"))
    trace = random_trace(2, experts=64)
    demand = Demand(prompt_length=64, gen_length=64, steps_per_block=4)
    assert demand.blocks_at_work(sizes) == 4
    assert demand.steps_per_request(sizes) == 2 * 4
    replica = simulate_replica(sizes, trace, Cluster(card=CARD, sequences=1), demand, num_gpus=1, steps=2)
    macs = 4 * 32 * 8 * sizes.config.num_expert_parameters
    assert replica.experts_s >= 16 * macs / 1e14
    assert replica.memory.cache == 0


def test_a_part_takes_its_longer_limit_or_the_sum() -> None:
    rates = CARD.rates(0.5)
    assert part_seconds(1e12, 1e13, rates, 1.0) == pytest.approx(2.0)
    assert part_seconds(1e12, 1e13, rates, 0.0) == pytest.approx(2.2)
    assert part_seconds(0.0, 1e14, rates, 1.0) == pytest.approx(2.0)


def test_cards_say_where_their_figures_are_from() -> None:
    assert {"a100", "h100", "h200", "b200", "mi300x", "l40s"} == set(CARDS)
    for card in CARDS.values():
        assert "data sheet" in card.source
        assert card.network_bytes_per_s <= card.link_bytes_per_s < card.bytes_per_s < card.flops_per_s
    with pytest.raises(ConfigError, match="Did you mean 'h100'"):
        find_card("h10")


def test_records_that_do_not_serve_are_told() -> None:
    without = RoutingRecord(1, 4, (((0, 1),),))
    with pytest.raises(InputError, match="which token"):
        cut_into_blocks(without, 2, "old")
    record = RoutingRecord(1, 4, (((0, 1),),), ((((0,), (1,), ()),),))
    with pytest.raises(InputError, match="multiple of the block length 2"):
        cut_into_blocks(record, 2, "odd")
    blocks = cut_into_blocks(RoutingRecord(1, 4, (((0, 1),),), ((((0,), (1,), (), ()),),)), 2, "even")
    assert blocks.experts_NXLK.tolist() == [[[[0], [1]]]]  # the padded block is left out
    assert blocks.mean_unique() == 2
    with pytest.raises(InputError, match="expected 256"):
        simulate_replica(MINI, blocks, Cluster(card=CARD), Demand(), num_gpus=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster(card=CARD, sequences=0), "sequences"),
        (lambda: Cluster(card=CARD, efficiency=0.0), "efficiency"),
        (lambda: Cluster(card=CARD, overlap=2.0), "overlap"),
        (lambda: Demand(steps_per_block=0), "steps per block"),
        (lambda: Demand(requests_per_s=0.0), "rate"),
        (lambda: Demand(load=0.0), "load"),
        (lambda: replace(CARD, memory_bytes=0), "memory_bytes"),
    ],
)
def test_settings_that_cannot_be_are_told(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()
