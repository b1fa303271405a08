"""Expert memory for equal hit rates, with and without sharing: from records of routing, by the store's own eviction.

    expertshare generate MODEL --prompt ... --expert-memory 4GiB --record-routing a.jsonl
    expertshare generate MODEL --prompt ... --expert-memory 4GiB --policy des-vote --record-routing b.jsonl
    python benchmarks/equal_hit_rate.py MODEL a.jsonl b.jsonl --rates 0.8,0.85,0.9 --confirm "PROMPT"

Slots start empty, so that the first round of every layer misses; nothing is read ahead in the replay. With --confirm
the same prompt is generated again with real stores of the sizes found, which do read ahead: their hit rates, and the
memory that the process really used beyond what the smallest of them used, are printed and stored.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from own_process import generated

from expertshare.convert.plan import most_at_once, replay
from expertshare.experts import read_manifest
from expertshare.experts.recording import RoutingRecord, read_record
from expertshare.measure.report import capture_environment, write_json

GROWTH = 1.02
"""By how much the shared store grows from one try to the next."""


def slots_for(record: RoutingRecord, rate: float) -> int | None:
    """The fewest slots that reach the hit rate; None where all experts at once do not, because each is read once."""
    low, high = most_at_once(record), record.num_layers * record.num_experts
    if (replay(record, high).total.hit_rate or 0.0) < rate:
        return None
    while low < high:  # the eviction is near enough to monotonic in the number of slots for a bisection
        middle = (low + high) // 2
        enough = (replay(record, middle).total.hit_rate or 0.0) >= rate
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def run_store(model: Path, slots: int, slab_bytes: int, policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """Generate with a real store of so many slots, and what came of it."""
    flags = ["--gen-length", str(options.gen_length), "--threshold", "none"]
    result = generated(model, options.confirm, policy, str(slots * slab_bytes), flags)
    store = result["expert_store"]
    return {
        "slots": store["slots"],
        "hit_rate": store["hit_rate"],
        "unique_experts": result["unique_experts"]["denoise"],
        "peak_anonymous_bytes": result["peak_anonymous_bytes"],
    }


def confirm(points: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Real stores at every point's sizes, written into the points; the shared one grows until its rate is vanilla's."""
    print("real stores:  vanilla: hit %  slots  anon GB   shared: hit %  slots  anon GB   less memory for experts")
    for point in points:
        if point["vanilla_slots"] is None or point["shared_slots"] is None:
            continue
        slab = point["slab_bytes"]
        vanilla = run_store(options.model, point["vanilla_slots"], slab, "vanilla", options)
        shared = run_store(options.model, point["shared_slots"], slab, options.policy, options)
        while shared["hit_rate"] < vanilla["hit_rate"] and shared["slots"] < vanilla["slots"]:
            shared = run_store(options.model, math.ceil(shared["slots"] * GROWTH), slab, options.policy, options)
        point["real"] = {"vanilla": vanilla, "shared": shared, "less": 1 - shared["slots"] / vanilla["slots"]}
        told = [
            f"{100 * run['hit_rate']:13.1f} {run['slots']:6} {run['peak_anonymous_bytes'] / 1e9:8.2f}"
            for run in (vanilla, shared)
        ]
        print(f"{point['hit_rate']:8.2f}  {told[0]}   {told[1]} {100 * point['real']['less']:9.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the expert layout")
    parser.add_argument("vanilla", type=Path, help="record of vanilla routing")
    parser.add_argument("shared", type=Path, help="record of the same prompt under a sharing policy")
    parser.add_argument("--rates", default="0.8,0.85,0.9", help="hit rates, parted by commas")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--confirm", metavar="PROMPT", help="run real stores too, on the prompt of the records")
    parser.add_argument("--policy", default="des-vote:budget=16", help="of the second record, for --confirm")
    parser.add_argument("--gen-length", default=32, type=int, help="of the records, for --confirm")
    options = parser.parse_args()
    slab_bytes = read_manifest(options.model).format.slab_bytes
    records = {"vanilla": read_record(options.vanilla), "shared": read_record(options.shared)}
    points = []
    print("hit rate   vanilla: slots      GB   shared: slots      GB   less")
    for rate in map(float, options.rates.split(",")):
        slots = {name: slots_for(record, rate) for name, record in records.items()}
        vanilla, shared = slots["vanilla"], slots["shared"]
        point = {"hit_rate": rate, "vanilla_slots": vanilla, "shared_slots": shared, "slab_bytes": slab_bytes}
        points.append(point)
        if vanilla is None or shared is None:
            print(f"{rate:8.2f}   not reached by {'vanilla' if vanilla is None else 'sharing'}")
            continue
        point["less"] = 1 - shared / vanilla
        sizes = [f"{count:15} {count * slab_bytes / 1e9:7.2f}" for count in (vanilla, shared)]
        print(f"{rate:8.2f}   {sizes[0]} {sizes[1]} {100 * point['less']:5.1f} %")
    if options.confirm:
        confirm(points, options)
    if options.json:
        confirmed = {"prompt": options.confirm, "policy": options.policy, "gen_length": options.gen_length}
        settings = {"growth": GROWTH, **(confirmed if options.confirm else {})}
        told = {"model": options.model.name, "settings": settings, "points": points}
        write_json(options.json, {**told, "environment": capture_environment().to_json()})


if __name__ == "__main__":
    main()
