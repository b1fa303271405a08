"""The head of a full vocabulary in int8 beside bfloat16, by turns: milliseconds by rows, and what memory gave.

    python benchmarks/head_by_bits.py --json benchmarks/results/head-by-bits.json

Weights are random and the same in every run; the vocabulary and the width are LLaDA2.0-mini's. Close everything else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from expertshare import native
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.quantise import quantise_table
from expertshare.measure.report import capture_environment, write_json
from expertshare.types import QuantisedTable

VOCABULARY, DEPTH = 157_184, 2048


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(rows: int, tables: dict[str, torch.Tensor | QuantisedTable], repeats: int) -> dict[str, float]:
    """Medians by table, in milliseconds, and the bandwidth of a plain sum over the bfloat16 table between them."""
    hidden_RD = torch.randn(rows, DEPTH, generator=torch.Generator().manual_seed(rows)).bfloat16()
    floats = tables["bfloat16"]
    assert isinstance(floats, torch.Tensor)
    times: dict[str, list[float]] = {name: [] for name in (*tables, "read")}
    for _ in range(repeats):
        for name, table in tables.items():
            times[name].append(timed(partial(CpuBackend().best_token, hidden_RD, table, [])))
        times["read"].append(timed(floats.view(torch.int64).sum))
    found = {name: statistics.median(taken) for name, taken in times.items()}
    return {"rows": rows, **found, "gb_per_s": floats.nbytes / found.pop("read") / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(native.usable_cores())
    weight_VD = torch.randn(VOCABULARY, DEPTH, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tables: dict[str, torch.Tensor | QuantisedTable] = {"bfloat16": weight_VD, "int8": quantise_table(weight_VD)}
    print("rows  bfloat16, ms  int8, ms  GB/s")
    points = []
    with torch.inference_mode():
        for rows in map(int, options.rows.split(",")):
            points.append(measure(rows, tables, options.repeats))
            p = points[-1]
            print(f"{rows:4d}  {p['bfloat16']:12.1f}  {p['int8']:8.1f}  {p['gb_per_s']:4.0f}", flush=True)
    if options.json is not None:
        write_json(options.json, {"environment": capture_environment().to_json(), "points": points})


if __name__ == "__main__":
    main()
