"""Expert memory for equal hit rates, with and without sharing: from records of routing, by the store's own eviction.

    expertshare generate MODEL --prompt ... --expert-memory 4GiB --record-routing a.jsonl
    expertshare generate MODEL --prompt ... --expert-memory 4GiB --policy des-vote --record-routing b.jsonl
    python benchmarks/equal_hit_rate.py MODEL a.jsonl b.jsonl --rates 0.8,0.85,0.9

Slots start empty, so that the first round of every layer misses; nothing is read ahead. Real stores at the budgets
found are measured by `benchmarks/full_size_memory.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from expertshare.conversion.replay import most_at_once, replay
from expertshare.experts import read_manifest
from expertshare.experts.recording import RoutingRecord, read_record


def slots_for(record: RoutingRecord, rate: float) -> int | None:
    """The fewest slots that reach the hit rate; None where all experts at once do not, because each is read once."""
    low, high = most_at_once(record), record.num_layers * record.num_experts
    if replay(record, high).hit_rate < rate:
        return None
    while low < high:  # the eviction is near enough to monotonic in the number of slots for a bisection
        middle = (low + high) // 2
        low, high = (low, middle) if replay(record, middle).hit_rate >= rate else (middle + 1, high)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the expert layout")
    parser.add_argument("vanilla", type=Path, help="record of vanilla routing")
    parser.add_argument("shared", type=Path, help="record of the same prompt under a sharing policy")
    parser.add_argument("--rates", default="0.8,0.85,0.9", help="hit rates, parted by commas")
    parser.add_argument("--json", type=Path, help="write the results there")
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
    if options.json:
        options.json.write_text(json.dumps({"model": options.model.name, "points": points}, indent=2) + "\n")


if __name__ == "__main__":
    main()
