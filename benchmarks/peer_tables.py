"""Print the tables of docs/peers.md from the raw calls of the rounds.

    python benchmarks/peer_tables.py benchmarks/results/llama-cpp-llada-moe.json

A time is the median over rounds of each round's median call. A ratio is that of two medians of one round: its median
and range over the rounds that have both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

OURS = "expertshare bfloat16, alone vanilla"
TABLES = {
    "32 tokens, no context, head on 32 rows": {
        "ours, bfloat16, vanilla (62-63 experts)": OURS,
        "ours, bfloat16, `des-vote:budget=16` (16 experts)": "expertshare bfloat16, alone des-vote:budget=16",
        "llama.cpp, BF16": "llama.cpp bf16-alone",
        "llama.cpp, Q8_0": "llama.cpp q8_0-alone",
        "llama.cpp, Q4_0 (head Q6_K)": "llama.cpp q4_0-alone",
    },
    "32 tokens behind 256": {
        "ours, cached keys and values, head on 32 rows": "expertshare bfloat16, behind-256 vanilla",
        "llama.cpp, BF16, all 288 tokens and logits of 288 rows": "llama.cpp bf16-288",
        "llama.cpp, Q4_0, the same (two rounds)": "llama.cpp q4_0-288",
    },
}


def row(label: str, name: str, rounds: list[dict[str, Any]]) -> str:
    """One contender."""
    medians = [
        (statistics.median(each["ms"][name]), statistics.median(each["ms"][OURS]))
        for each in rounds
        if name in each["ms"]
    ]
    ms = statistics.median(mine for mine, _ in medians)
    ratios = [mine / ours for mine, ours in medians]
    told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if name != OURS else "1"
    return f"| {label} | {ms:.0f} | {told} |"


def main() -> None:
    """Both tables, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    rounds = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))["rounds"]
    for title, rows in TABLES.items():
        print(f"| {title} | ms (median of rounds) | time against ours, vanilla, 32 tokens alone (range) |")
        print("| --- | --- | --- |")
        print("\n".join(row(label, name, rounds) for label, name in rows.items()), end="\n\n")


if __name__ == "__main__":
    main()
