"""Bounds of a forward against sums written out, and where the benchmark puts them."""

from __future__ import annotations

import pytest
import torch

from expertshare.lab.bench.cases import find_case, forward_bound_ms, forward_work
from expertshare.lab.bench.forward import ForwardSettings, bench_forward
from expertshare.lab.bench.machine import Peaks, Yardstick
from expertshare.routing import parse_policy


def test_a_forward_of_llada2_mini_by_hand() -> None:
    config = find_case("llada2.0-mini").stack(4)
    work = forward_work(config, tokens=32, seen=288, masked=16, unique_by_layer=[70.0, 16.0, 16.0], itemsize=2)
    macs = {part: sum(one.num_macs for one in ones) for part, ones in work.items()}
    moved = {part: sum(one.num_bytes for one in ones) for part, ones in work.items()}
    assert macs == {
        "router": 3 * 32 * 256 * 2048,
        "experts": 3 * 32 * (8 + 1) * 3 * 2048 * 512,
        "attention": 4 * 32 * (3072 * 2048 + 2 * 288 * 2048 + 2048 * 2048),
        "head": 16 * 157184 * 2048,
        "other": 32 * 3 * 2048 * 5120,
    }
    weights = {
        "router": 3 * 256 * 2048,
        "experts": (70 + 16 + 16 + 3) * 3 * 2048 * 512,
        "attention": 4 * (3072 * 2048 + 288 * 1024 + 2048 * 2048),
        "head": 157184 * 2048,
        "other": 3 * 2048 * 5120,
    }
    for part, count in weights.items():
        assert 2 * count <= moved[part] <= 2 * count * 1.15, part
    bound = forward_bound_ms(work, Peaks(bytes_per_s=50e9, macs_per_s=350e9))
    assert bound["head"] == pytest.approx(1e3 * macs["head"] / 350e9)
    assert bound["other"] == pytest.approx(1e3 * macs["other"] / 350e9)
    assert bound["experts"] == pytest.approx(
        1e3 * (70 * 6291456 / 50e9 + 2 * 32 * 8 * 3145728 / 350e9 + 3 * 32 * 3145728 / 350e9), rel=0.01
    )


def test_only_forwards_whose_experts_were_counted_have_a_bound() -> None:
    settings = ForwardSettings(num_layers=3, context=4, masked=3, unique=None, repeats=1, warmup=0)
    square = torch.ones(32, 32, dtype=torch.bfloat16)
    yardstick = Yardstick(square, square, torch.ones(1 << 18), copies=False)
    policies = {"vanilla": parse_policy("vanilla")}
    backends = ["torch", "transformers-eager"]
    found = bench_forward("tiny", find_case("tiny"), policies, backends, settings, yardstick=yardstick)
    ours, peer = found["forwards"]
    assert found["bandwidth_gb_per_s"] > 0
    assert found["peak_gmac_per_s"] > 0
    assert ours["bound_ms"] == pytest.approx(sum(ours["bound_ms_by_part"].values()))
    assert ours["share_of_bound"] == ours["bound_ms"] / ours["ms"]
    assert "bound_ms" not in peer
