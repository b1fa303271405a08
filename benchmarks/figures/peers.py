"""llama.cpp beside ours, from the raw calls of the rounds. For docs/peers.md.

A time is the median over rounds of each round's median call. A ratio is that of two medians of one round: its median
and range over the rounds that have both.
"""

from __future__ import annotations

import statistics

from writing import each, stored, table

BLOCKS = ("llama_alone", "llama_behind", "llama_agreement", "llama_quietest", "llama_logits")
RESULT = "llama-cpp-llada-moe"
OURS = "expertshare bfloat16, alone vanilla"
ALONE = {
    "ours, bfloat16, vanilla": OURS,
    "ours, bfloat16, `des-vote:budget=16`": "expertshare bfloat16, alone des-vote:budget=16",
    "llama.cpp, BF16": "llama.cpp bf16-alone",
    "llama.cpp, Q8_0": "llama.cpp q8_0-alone",
    "llama.cpp, Q4_0 (head Q6_K)": "llama.cpp q4_0-alone",
}
BEHIND = {
    "ours, cached keys and values, head on 32 rows": "expertshare bfloat16, behind-256 vanilla",
    "llama.cpp, BF16, all 288 tokens and logits of 288 rows": "llama.cpp bf16-288",
    "llama.cpp, Q4_0, the same (two rounds)": "llama.cpp q4_0-288",
}


def _ratios(name: str) -> list[tuple[float, float]]:
    """Median milliseconds of a contender and of ours, in every round that has both."""
    rounds = (found["ms"] for found in stored(RESULT)["rounds"])
    return [(statistics.median(ms[name]), statistics.median(ms[OURS])) for ms in rounds if name in ms]


def _table(title: str, chosen: dict[str, str]) -> str:
    rows = []
    for said, name in chosen.items():
        pairs = _ratios(name)
        ratios = [mine / ours for mine, ours in pairs]
        told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if name != OURS else "1"
        rows.append([said, f"{statistics.median(mine for mine, _ in pairs):.0f}", told])
    return table((title, "ms (median of rounds)", "time against ours, vanilla, 32 tokens alone (range)"), rows)


def llama_alone() -> str:
    """A block by itself."""
    return _table("32 tokens, no context, head on 32 rows", ALONE)


def llama_behind() -> str:
    """A block behind 256 tokens."""
    return _table("32 tokens behind 256", BEHIND)


def llama_agreement() -> str:
    """How near the two programs' logits are."""
    found = stored(RESULT)
    return (
        f"bfloat16 logits of the two differ by {100 * found['logits_relative_difference_bf16']:.2f} % (norm), the best "
        f"token is the same in {32 * found['same_argmax_bf16']:.0f} of 32 rows"
    )


def llama_logits() -> str:
    """Time of ours with plain logits in place of the best tokens."""
    pairs = _ratios("expertshare bfloat16, alone vanilla logits")
    return f"ratio {statistics.median(mine / ours for mine, ours in pairs):.2f}"


def llama_quietest() -> str:
    """The least of all calls."""
    names = ("llama.cpp q8_0-alone", "llama.cpp q4_0-alone", "llama.cpp bf16-alone", OURS)
    least = [min(min(found["ms"][name]) for found in stored(RESULT)["rounds"] if name in found["ms"]) for name in names]
    return f"least {each(least, 0)} ms for Q8_0, Q4_0, BF16 and ours"
