"""Random routers meet the number of experts asked for; transformers computes the same on the same tensors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.errors import ConfigError, InputError
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.lab.bench.cases import Case, find_case
from expertshare.lab.bench.forward import ForwardSettings, bench_forward
from expertshare.lab.bench.peer_models import build_peer
from expertshare.lab.bench.weights import concentrate, model_bytes, random_model
from expertshare.models import ForwardInput, Runtime
from expertshare.routing import parse_policy

VANILLA = {"vanilla": parse_policy("vanilla")}


def _softmax_case() -> Case:
    """Tiny widths in the layout of LLaDA-MoE: no dense layer, no shared expert, softmax."""
    case = find_case("tiny")
    router = RouterSpec(num_experts=32, top_k=4, activation="softmax", renormalise=False)
    config = replace(case.config, family="llada_moe", num_dense_layers=0, shared_hidden=0, rotary_dim=16, router=router)
    return replace(case, config=config, peer="qwen3_moe")


@pytest.mark.parametrize("case", [find_case("tiny"), _softmax_case()], ids=["glm4_moe", "qwen3_moe"])
def test_transformers_gives_the_same_logits_from_the_same_tensors(case: Case) -> None:
    settings = ForwardSettings(num_layers=3, context=16, unique=12, dtype=torch.float32, repeats=1, warmup=0)
    found = bench_forward("tiny", case, VANILLA, ["torch", "transformers-eager", "transformers-grouped-mm"], settings)
    assert [point["backend"] for point in found["forwards"]] == [
        "torch",
        "transformers-eager",
        "transformers-grouped-mm",
    ]
    assert found["left_out"] == []
    assert all(point["difference"] < 1e-5 for point in found["forwards"])
    assert all(point["same_argmax"] == 1.0 for point in found["forwards"])


def test_peer_copies_nothing() -> None:
    case = find_case("tiny")
    model = random_model(case.stack(3), torch.bfloat16, seed=0)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert case.peer is not None
    peer = build_peer(model, case.peer, "grouped_mm")
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in peer.state_dict().values())


@pytest.mark.parametrize("unique", [6, 10, 16])
def test_concentration_reaches_the_number_asked_for(unique: int) -> None:
    config = replace(find_case("tiny").stack(3), hidden_size=128)
    model = random_model(config, torch.float32, seed=1)
    inputs = ForwardInput(
        tokens_BS=torch.arange(10, 26).unsqueeze(0),
        positions_BS=torch.arange(16).unsqueeze(0),
        live_BS=torch.ones(1, 16, dtype=torch.bool),
        mask_BSP=torch.ones(1, 16, 16, dtype=torch.bool),
        block_length=16,
    )
    runtime = Runtime(policy=parse_policy("vanilla").bind(config.router))
    with torch.no_grad():
        before = model(inputs, runtime).routing.group_experts_NG
        concentrate(model, inputs, None, unique=unique, seed=1)
        after = model(inputs, runtime).routing.group_experts_NG
    assert int(before.min()) > unique
    assert int((after - unique).abs().max()) <= 2


def test_points_say_where_the_time_went() -> None:
    policies = {**VANILLA, "des-vote:budget=8": parse_policy("des-vote:budget=8")}
    settings = ForwardSettings(num_layers=3, context=0, masked=3, unique=None, repeats=2, warmup=1)
    found = bench_forward("tiny", find_case("tiny"), policies, ["torch", "transformers-eager"], settings)
    ours = [point for point in found["forwards"] if point["backend"] == "torch"]
    assert [point["policy"] for point in ours] == ["vanilla", "des-vote:budget=8"]
    for point in ours:
        assert point["ms_by_part"].keys() == {"router", "experts", "attention", "head", "other"}
        assert len(point["unique_experts_by_layer"]) == found["scene"]["num_moe_layers"] == 2
        assert point["router_over_experts"] == point["ms_by_part"]["router"] / point["ms_by_part"]["experts"]
        assert point["faster_than"].keys() == {"transformers-eager", "vanilla"}
    assert ours[1]["unique_experts"] <= 8 < ours[0]["unique_experts"]
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(not native.available(), reason="the backend cpu needs the library for its dense layers")
def test_grossly_wrong_logits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "moe_ffn", lambda self, x_TD, plan, bank, arrivals=None: -100 * x_TD)
    settings = ForwardSettings(num_layers=3, context=0, unique=None, repeats=1, warmup=0)
    found = bench_forward("tiny", find_case("tiny"), VANILLA, ["cpu", "torch"], settings)
    assert [point["backend"] for point in found["forwards"]] == ["torch"]
    (entry,) = (entry for entry in found["left_out"] if entry["policy"])
    assert entry["backend"] == "cpu"
    assert entry["reason"].startswith("wrong: logits differ by ")
    assert entry["reason"].endswith(" of their norm, allowed 0.5; not timed")


def test_what_cannot_be_run_is_refused() -> None:
    tiny = find_case("tiny")
    with pytest.raises(InputError, match="only its expert layer"):
        find_case("diffusiongemma").stack(3)
    with pytest.raises(InputError, match="more layers than"):
        tiny.stack(1)
    with pytest.raises(ConfigError, match="Did you mean 'transformers-eager'"):
        bench_forward("tiny", tiny, VANILLA, ["transformers-eagr"], ForwardSettings())
    with pytest.raises(InputError, match=r"masked rows must lie in 1\.\.8"):
        bench_forward("tiny", tiny, VANILLA, ["torch"], ForwardSettings(num_layers=3, masked=9))
    for unique in (1, 33):
        with pytest.raises(InputError, match=rf"unique experts must lie in 4\.\.32 .* got {unique}"):
            bench_forward("tiny", tiny, VANILLA, ["torch"], ForwardSettings(num_layers=3, unique=unique))
    with pytest.raises(InputError, match="fewer --layers"):
        bench_forward("tiny", tiny, VANILLA, ["torch"], ForwardSettings(memory_bytes=1000))


def test_memory_of_a_model_is_counted_before_it_is_made() -> None:
    config = find_case("tiny").stack(3)
    model = random_model(config, torch.float32, seed=0)
    assert model_bytes(config, torch.float32) == sum(p.numel() * 4 for p in model.parameters())
