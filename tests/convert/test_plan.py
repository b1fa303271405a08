"""Bytes against sums done by hand, hit rates against a cache worked out by hand, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expertshare.api import generate
from expertshare.convert import convert
from expertshare.convert.plan import (
    Plan,
    Step,
    Workload,
    experts_per_block,
    make_plan,
    mean_at_once,
    most_at_once,
    replay,
    seconds_per_forward,
    tokens_per_s,
)
from expertshare.convert.rates import Rates, storage_speed
from expertshare.convert.sizes import cache_bytes, likeness, sizes_like, sizes_of
from expertshare.errors import ExpertMemoryError, InputError
from expertshare.experts import ExpertMemory, StoreOptions
from expertshare.experts.recording import RoutingRecord, read_record
from expertshare.lab.random_checkpoint.make_checkpoint import make_checkpoint
from expertshare.models.loading import check_fits
from expertshare.routing import Layerwise, parse_policy

from .models import LLADA2, save_random

GIB = 2**30
RATES = Rates(memory_bytes_per_s=20e9, macs_per_s=100e9, storage_bytes_per_s=2e9, storage_direct=True)
MINI = likeness("llada2.0-mini")


def plan(memory: float, policy: str = "vanilla", **more: object) -> Plan:
    """For LLaDA2.0-mini."""
    bound = parse_policy(policy).bind(MINI.router)
    return make_plan(sizes_like(MINI), int(memory * GIB), bound, RATES, process_bytes=0, **more)  # type: ignore[arg-type]


def value(made: Plan, name: str) -> float:
    return made.figures[name].value


def test_bytes_of_mini_are_those_worked_out_by_hand() -> None:
    made = plan(64)
    # an expert: gate, up and down of 512 x 2048, in bfloat16
    assert value(made, "expert (none)") == 3 * 512 * 2048 * 2 == 6_291_456
    assert value(made, "all experts (none)") == 6_291_456 * 19 * 256 == 30_601_641_984
    # int8: a byte a weight, and a float32 for each of 1024 + 2048 rows
    assert value(made, "expert (int8)") == 3 * 512 * 2048 + (1024 + 2048) * 4
    # 4 bits: half a byte a weight, and a float16 for 32 weights, with or without a minimum of the same size
    assert value(made, "expert (int4)") in (3 * 512 * 2048 // 2 + n * 3 * 512 * 2048 // 32 * 2 for n in (1, 2))
    # 16.26 B parameters in all, of which these are not experts; routers take 4 bytes a weight
    embeddings = 2 * 157_184 * 2048
    attention = 20 * (3072 * 2048 + 2048 * 2048 + 2 * 128 + 2 * 2048)
    dense_layer, shared = 3 * 5120 * 2048, 19 * 3 * 512 * 2048
    routers = 19 * (256 * 2048 + 256)
    weights = embeddings + attention + dense_layer + shared + 2048
    assert value(made, "dense weights") == 2 * weights + 4 * routers
    # keys and values: 20 layers, 4 heads of 128, two bytes, 512 positions
    assert value(made, "key-value cache") == 2 * 20 * 4 * 128 * 2 * 512
    assert made.store == "all"
    assert made.scheme == "none"


@pytest.mark.parametrize(
    ("memory", "policy", "prompt", "store", "scheme"),
    [
        (64, "vanilla", 256, "all", "none"),
        (24, "vanilla", 256, "all", "int8"),
        (14, "vanilla", 256, "all", "int4"),
        (4, "vanilla", 256, "budget", "int4"),
        (2.2, "vanilla", 256, "none", "int4"),
        (2.2, "des-vote:budget=16", 64, "budget", "int4"),
        (1, "des-vote:budget=16", 64, "none", "int4"),
    ],
)
def test_what_is_recommended_for_mini(memory: float, policy: str, prompt: int, store: str, scheme: str) -> None:
    made = plan(memory, policy, workload=Workload(prompt_length=prompt))
    assert (made.store, made.scheme) == (store, scheme)
    assert (made.expert_memory is None) == (store == "none")
    assert made.advice


def test_smallest_budgets_are_those_of_the_largest_forward() -> None:
    """A prompt of 64 tokens is prefilled as two blocks at once; vanilla may then ask for every expert."""
    made = plan(6, "des-vote:budget=16", workload=Workload(prompt_length=64))
    assert value(made, "experts at once (policy)") == 2 * 16
    assert value(made, "experts at once (vanilla)") == 256
    assert value(made, "smallest budget (policy)") == 32 * value(made, "expert (int4)")
    assert int(made.expert_memory or 0) % value(made, "expert (int4)") == 0
    assert int(made.expert_memory or 0) <= value(made, "room for experts")


def test_figures_say_where_they_come_from_and_the_range_is_open_without_a_record() -> None:
    made = plan(6, "des-vote:budget=16")
    assert {figure.origin for figure in made.figures.values()} == {"given", "measured", "derived"}
    assert value(made, "tokens per second (no hits)") < value(made, "tokens per second (all hits)")
    assert "hit rate" not in made.figures
    json.dumps(made.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("vanilla", 256),
        ("des-vote:budget=20", 20),
        ("top-k-cap:experts_per_token=2", 64),
        ("des-seq", 32),
        ("block-top-p", 256),
    ],
)
def test_most_experts_of_a_block(policy: str, expected: int) -> None:
    assert experts_per_block(parse_policy(policy).bind(MINI.router), MINI.router, 32) == expected
    layers = Layerwise(layers=(parse_policy("des-vote:budget=18"), parse_policy(policy))).bind(MINI.router)
    assert experts_per_block(layers, MINI.router, 32) == expected


def test_the_formula_by_hand() -> None:
    """1 GB dense and 100 experts of 10 MB from memory at 20 GB/s: 0.1 s; half of the experts from storage: 0.25 s."""
    step = Step(
        dense_bytes=10**9,
        dense_parameters=5 * 10**8,
        experts=100,
        slab_bytes=10**7,
        pair_parameters=10**8,
        positions=10,
    )
    assert seconds_per_forward(step, RATES, hit_rate=1.0) == pytest.approx(0.1)
    assert seconds_per_forward(step, RATES, hit_rate=0.5) == pytest.approx(0.1 + 0.25)
    # 10 positions x 0.6 G products at 1 G a second take longer than reading
    slow = replace(RATES, macs_per_s=1e9)
    assert seconds_per_forward(step, slow, hit_rate=1.0) == pytest.approx(6.0)
    assert seconds_per_forward(step, replace(RATES, storage_bytes_per_s=None), hit_rate=0.5) is None
    # 32 tokens at one a step: 32 forwards and one to commit
    assert tokens_per_s(0.1, MINI, batch_size=1, per_step=1.0) == pytest.approx(32 / 3.3)
    assert tokens_per_s(0.1, MINI, batch_size=2, per_step=4.0) == pytest.approx(64 / 0.9)


def test_a_record_replayed_by_hand() -> None:
    """Two layers of 4 experts; with room for all, only first uses miss: 4 of 12 requests."""
    forwards = (((0, 1), (2,)), ((0, 1), (2,)), ((0, 1), (3,)), ((0, 1), (2,)))
    record = RoutingRecord(2, 4, forwards)
    everything = replay(record, 8)
    assert everything.total.hit_rate == pytest.approx(8 / 12)
    assert [layer.hit_rate for layer in everything.layers] == pytest.approx([6 / 8, 2 / 4])
    assert most_at_once(record) == 2
    assert mean_at_once(record) == pytest.approx(1.5)
    # two slots hold one layer's experts at a time: layer 1 takes a slot of layer 0, which then misses one of two
    tight = replay(record, 2)
    assert tight.layers[1].hit_rate == 0.0
    assert tight.total.hit_rate < everything.total.hit_rate


def test_a_recorded_generation_is_replayed(tmp_path: Path) -> None:
    config = replace(LLADA2, vocab_size=400, mask_id=399, eos_ids=(398,), pad_id=398)
    make_checkpoint(config, tmp_path / "made", unique=12, dtype="F32")
    record_path = tmp_path / "routing.jsonl"
    made_path, prompt = str(tmp_path / "made"), "Some words to begin with"
    run = generate(made_path, prompt, gen_length=16, store=StoreOptions(), record_routing=record_path)
    record = read_record(record_path)
    assert len(record.forwards) == sum(run.cost.forwards.values())
    active = [list(map(len, layers)) for layers in record.forwards]
    assert active == [list(step.active_experts) for step in run.cost.steps]
    pairs = [[sum(map(len, tokens)) for tokens in layers] for layers in record.tokens]
    assert pairs == [list(step.pairs) for step in run.cost.steps]
    assert {len(tokens) % config.block_length for layers in record.tokens for tokens in layers} == {0}
    sizes = sizes_of(tmp_path / "made")
    bound = parse_policy("vanilla").bind(config.router)
    base = sizes.dense_bytes + cache_bytes(sizes, positions=32, batch_size=1) + 8 * 400 * 16
    slab = sizes.slabs["none"]
    work = Workload(prompt_length=16, gen_length=16)
    memory = int((base + 24 * slab) / 0.95) + slab // 2
    made = make_plan(sizes, memory, bound, RATES, workload=work, record=record, process_bytes=0)
    assert (made.store, made.expert_memory) == ("budget", str(24 * slab))
    assert value(made, "hit rate") == replay(record, 24).total.hit_rate
    assert value(made, "experts at once (record)") == max(max(row) for row in active)
    store = generate(
        made_path,
        prompt,
        gen_length=16,
        store=StoreOptions(memory=ExpertMemory(kind="budget", num_bytes=24 * slab), prefetch=False),
    ).run.expert_store
    assert store is not None
    assert store.total.hit_rate == pytest.approx(value(made, "hit rate"), abs=0.02)
    with pytest.raises(InputError, match="record this model"):
        make_plan(sizes_like(MINI), 8 * GIB, parse_policy("vanilla").bind(MINI.router), RATES, record=record)


@pytest.mark.parametrize("text", ["", "{}", '{"routing_record":1,"num_layers":1,"num_experts":4}', "nonsense"])
def test_a_file_that_is_no_record_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="record"):
        read_record(tmp_path / "file")
    bad = '{"routing_record":1,"num_layers":1,"num_experts":4}\n{"layers":[[4]]}'
    (tmp_path / "file").write_text(bad, encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        read_record(tmp_path / "file")
    head, older = bad.splitlines()[0], '{"layers":[[3]]}'
    (tmp_path / "file").write_text(f"{head}\n{older}\n", encoding="utf-8")
    assert read_record(tmp_path / "file").tokens == ()
    for tokens in ("[[[3],[2]]]", "[[3]]", "[[[3]],[[3]]]", "3"):
        (tmp_path / "file").write_text(f'{head}\n{{"layers":[[3]],"tokens":{tokens}}}\n', encoding="utf-8")
        with pytest.raises(InputError, match="line 2"):
            read_record(tmp_path / "file")
    (tmp_path / "file").write_text(f'{head}\n{older}\n{{"layers":[[3]],"tokens":[[[3]]]}}\n', encoding="utf-8")
    with pytest.raises(InputError, match="1 of 2 forwards"):
        read_record(tmp_path / "file")


def test_sizes_of_a_directory_are_those_of_its_tensors(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    convert(source, tmp_path / "experts", quantise="int8")
    tensors = load_file(source / "model.safetensors")
    dense = sum(t.nbytes for name, t in tensors.items() if ".mlp.experts." not in name)
    plain, converted = sizes_of(source), sizes_of(tmp_path / "experts")
    assert plain.dense_bytes == converted.dense_bytes == dense
    assert plain.dense_parameters == converted.dense_parameters == sizes_like(LLADA2).dense_parameters
    assert (plain.stored, converted.stored) == (None, "int8")
    assert plain.slabs["int8"] == converted.slabs["int8"]
    file = tmp_path / "experts" / "experts-00000.safetensors"
    assert abs(file.stat().st_size - 16 * converted.slabs["int8"]) <= 4096 + 64
    assert storage_speed(file) == (None, False)  # a few pages say nothing about a disk


def test_storage_is_timed_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (32 * 2**20))
    bytes_per_s, _ = storage_speed(path)
    assert bytes_per_s is not None
    assert bytes_per_s > 1e6


def test_what_cannot_fit_is_refused_with_advice(tmp_path: Path) -> None:
    source = save_random(LLADA2, tmp_path / "source")
    convert(source, tmp_path / "experts")
    total = sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    check_fits(source, available_bytes=total)
    with pytest.raises(ExpertMemoryError, match="expertshare convert"):
        check_fits(source, available_bytes=total - 1)
    sizes = sizes_of(tmp_path / "experts")
    dense = sum(t.nbytes for t in load_file(tmp_path / "experts" / "dense.safetensors").values())
    budget = ExpertMemory(kind="budget", num_bytes=5 * sizes.slabs["none"])
    check_fits(tmp_path / "experts", budget, available_bytes=dense + budget.num_bytes)
    check_fits(tmp_path / "experts", ExpertMemory(kind="mmap"), available_bytes=dense)
    with pytest.raises(ExpertMemoryError, match="expertshare plan"):
        check_fits(tmp_path / "experts", budget, available_bytes=dense + budget.num_bytes - 1)
    with pytest.raises(ExpertMemoryError, match="dense part alone"):
        check_fits(tmp_path / "experts", budget, available_bytes=dense - 1)
    check_fits(tmp_path / "experts", available_bytes=dense)  # nobody has said yet where experts go
    check_fits(tmp_path / "experts", budget, dense_is_loaded=True, available_bytes=budget.num_bytes)
    with pytest.raises(ExpertMemoryError, match="expertshare plan"):
        check_fits(tmp_path / "experts", budget, dense_is_loaded=True, available_bytes=budget.num_bytes - 1)


def test_every_released_model_can_be_planned() -> None:
    for name in ("llada2.0-flash", "llada-moe", "sdar-30b-a3b"):
        config = likeness(name)
        made = make_plan(sizes_like(config), 8 * GIB, parse_policy("vanilla").bind(config.router), RATES)
        assert made.figures["all experts (none)"].value == (
            config.num_moe_layers * config.router.num_experts * config.num_expert_parameters * 2
        )
