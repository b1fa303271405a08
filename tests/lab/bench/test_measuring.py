"""Order of calls, summaries, fits, limits: formulas and files made up here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from expertshare.convert.rates import ASSUMED_CACHE_BYTES, last_level_cache_bytes
from expertshare.lab.bench.cases import expert_work, fit_latency
from expertshare.lab.bench.machine import (
    Machine,
    Peaks,
    measure_machine,
)
from expertshare.lab.bench.timing import interleave, spread

SIZES = {"bytes_per_expert": 2_000_000, "macs_per_pair": 1_000_000}


def test_contenders_take_turns_and_no_two_calls_get_one_number() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: (lambda turn, name=name: calls.append((name, turn))) for name in "abc"}
    seconds = interleave(contenders, repeats=3, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert [turn for _, turn in calls] == list(range(12))
    assert ["".join(name for name, _ in calls[start : start + 3]) for start in range(0, 12, 3)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


def test_nobody_to_time_is_no_error() -> None:
    assert interleave({}, repeats=2, warmup=1) == {}


def test_spread_is_the_median_and_the_quartiles() -> None:
    quartiles = {"ms": 3000.0, "ms_quartiles": [2000.0, 4000.0], "ms_min": 1000.0, "ms_max": 100_000.0, "repeats": 5}
    assert spread([4.0, 1.0, 3.0, 2.0, 100.0]) == quartiles
    assert spread([2.0])["ms_quartiles"] == [2000.0, 2000.0]


def test_fit_finds_both_slopes_and_tells_the_rest() -> None:
    unique, pairs = [8, 16, 32, 8, 16, 32], [64, 64, 64, 256, 256, 256]
    seconds = [2e-4 * u + 1e-6 * p for u, p in zip(unique, pairs, strict=True)]
    fit = fit_latency(unique, pairs, seconds, **SIZES)
    assert fit is not None
    found = [fit["us_per_expert"], fit["us_per_pair"], fit["r_squared"], fit["gb_per_s"], fit["gmac_per_s"]]
    np.testing.assert_allclose(found, [200.0, 1.0, 1.0, 10.0, 1000.0], rtol=1e-9)
    bent = fit_latency(unique[:3], pairs[:3], [1.0, 2.0, 2.5], **SIZES)
    assert bent is not None
    assert bent["r_squared"] < 1.0
    assert max(map(abs, bent["residuals_ms"])) > 50


def test_a_line_needs_three_points_and_two_numbers_of_experts() -> None:
    assert fit_latency([8, 16], [64, 64], [1.0, 2.0], **SIZES) is None
    assert fit_latency([8, 8, 8], [64, 128, 256], [1.0, 2.0, 3.0], **SIZES) is None


def test_bound_is_the_slower_of_bytes_and_products() -> None:
    work = expert_work(tokens=32, top_k=8, unique=16, hidden=2048, inner=512, itemsize=2)
    assert work.num_macs == 32 * 8 * 3 * 2048 * 512
    assert work.num_bytes == 16 * 3 * 2048 * 512 * 2 + 2 * 32 * 2048 * 2
    assert work.bound_s(Peaks(bytes_per_s=1e9, macs_per_s=1e15)) == work.num_bytes / 1e9
    assert work.bound_s(Peaks(bytes_per_s=1e15, macs_per_s=1e9)) == work.num_macs / 1e9


def test_last_level_caches_are_counted_once_each(tmp_path: Path) -> None:
    for processor, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for level, size in ((1, "48K"), (3, "16384K")):
            directory = tmp_path / f"cpu{processor}" / "cache" / f"index{level}"
            directory.mkdir(parents=True)
            (directory / "level").write_text(f"{level}\n")
            (directory / "size").write_text(f"{size}\n")
            (directory / "shared_cpu_list").write_text(f"{shared}\n")
    assert last_level_cache_bytes(tmp_path) == 2 * 16384 * 1024
    assert last_level_cache_bytes(tmp_path / "nowhere") == ASSUMED_CACHE_BYTES


def test_machine_measures_something_for_each_dtype() -> None:
    machine = measure_machine(buffer_bytes=2**18, gemm_shapes=((32, 32, 32),))
    assert machine.bytes_per_s > 0
    assert set(machine.macs_per_s) == {"bfloat16", "float32"}
    assert machine.peaks(torch.float32).macs_per_s == machine.macs_per_s["float32"]
    assert isinstance(machine, Machine)
    assert {"cpu", "commit", "threads", "bandwidth_gb_per_s", "peak_gmac_per_s"} <= machine.to_json().keys()
