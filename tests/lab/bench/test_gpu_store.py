"""The measurement of a store beside a GPU: what it computes from its runs, with stand-ins for the card."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from experts.conversion import convert
from experts.streams import SimulatedTransfer
from expertshare.api import loading
from expertshare.decoding import DecodingOptions
from expertshare.errors import ConfigError
from expertshare.experts import ExpertMemory, open_store, opening, read_manifest
from expertshare.kernels.triton import interpreted, unavailable_reason
from expertshare.lab.bench.machine import bus_bandwidth
from expertshare.native import available

EXACT = "cpu" if available() else "torch"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("gpu_store")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def stand_ins(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "gpu_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(script, "gpu_facts", lambda _: {"name": "a card"})
    monkeypatch.setattr(script, "bus_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(script, "DecodingOptions", partial(DecodingOptions, steps_per_block=4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(opening, "CudaTransfer", lambda _: SimulatedTransfer())
    monkeypatch.setattr(loading, "check_options", lambda options, device: None)
    card = torch.device("cuda")

    def as_on_a_card(path, layout, options, device):  # type: ignore[no-untyped-def]
        return open_store(path, layout, options, card if options.memory.kind == "budget" else device)

    monkeypatch.setattr(loading, "open_store", as_on_a_card)


def test_budgets_and_policies_take_turns_and_are_told_with_their_share_of_the_bus(
    script: ModuleType, stand_ins: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del stand_ins
    model = convert(ROOT / "models" / "reference", tmp_path / "small", torch.float32)
    budget = str(70 * read_manifest(model).format.slab_bytes)
    out = tmp_path / "store.json"
    script.main([
        str(model), "--budgets", f"{budget},all", "--policies", "vanilla,des-vote:budget=16", "--host-memory", "all",
        "--backend", EXACT, "--gen-length", "32", "--rounds", "1", "--json", str(out),
    ])  # fmt: skip
    told = json.loads(out.read_text())
    assert told["environment"]["gpu"] == {"name": "a card"}
    assert told["settings"]["host_memory"] == "all"
    points = {(point["budget"], point["policy"]): point for point in told["points"]}
    assert len(points) == 4
    for (memory, _), point in points.items():
        assert point["same_tokens"]
        assert (point["bytes_copied"] > 0) == (memory != "all")  # copies at opening are over when counting begins
        assert point["bytes_read"] == 0  # all came into the host's memory in the round that does not count
        assert point["share_of_bus"] == pytest.approx(point["bytes_copied"] / point["elapsed_s"] / 1e9)
    shared, vanilla = points[budget, "des-vote:budget=16"], points[budget, "vanilla"]
    assert shared["bytes_copied"] < vanilla["bytes_copied"]
    assert vanilla["faster_than_vanilla"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def test_the_host_keeps_experts_beside_a_budget_alone(script: ModuleType) -> None:
    asked = script.parse(["model", "--host-memory", "2GiB", "--no-prefetch"])
    beside = script.store_options("1GiB", asked)
    assert beside.host_memory == ExpertMemory(kind="budget", num_bytes=2 << 30)
    assert not beside.prefetch
    assert script.store_options("all", asked).host_memory is None


def test_answers_that_differ_between_budgets_are_said(script: ModuleType) -> None:
    def one(tokens: list[int], speed: float) -> dict[str, object]:
        return {"token_ids": tokens, "tokens_per_s": speed}

    runs = {
        ("1GiB", "vanilla"): [one([1], 2.0), one([1], 4.0), one([1], 3.0)],
        ("all", "vanilla"): [one([2], 9.0)],
        ("1GiB", "skip"): [one([3], 6.0)],
    }
    first, _, skip = script.points("m", runs)
    assert not first["same_tokens"]
    assert (first["tokens_per_s"], first["tokens_per_s_range"]) == (3.0, [2.0, 4.0])
    assert skip["same_tokens"]
    assert skip["faster_than_vanilla"] == 2


def test_the_bus_is_the_median_of_copies_after_the_first() -> None:
    seconds = iter([100.0, 1.0, 2.0, 4.0])
    copied = []

    def seconds_of(walk: object) -> float:
        copied.append(walk())  # type: ignore[operator]
        return next(seconds)

    found = bus_bandwidth(
        torch.device("cpu"), num_bytes=64, repeats=3, seconds_of=seconds_of,
        allocate=lambda size: torch.full((size,), 7, dtype=torch.uint8),
    )  # fmt: skip
    assert found == 32
    assert len(copied) == 4
    assert (copied[0] == 7).all()


@pytest.mark.skipif(
    torch.cuda.is_available() and unavailable_reason() is None and not interpreted(), reason="a GPU is there"
)
def test_without_a_gpu_the_script_says_so(script: ModuleType) -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        script.main(["model"])
