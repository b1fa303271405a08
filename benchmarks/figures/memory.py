"""Memory: full-size models behind stores, equal hit rates, a thousand blocks. For README and docs/memory.md."""

from __future__ import annotations

from typing import Any

from writing import GIB, each, paragraph, percent, pick, spanning, stored, table

from expertshare.convert.sizes import likeness, sizes_like

BLOCKS = (
    *("memory_savings", "memory_savings_said", "mini_size", "expert_files", "full_size", "small_budget"),
    *("equal_hits", "equal_hits_said", "dense_rest", "flat_memory", "quantised_quality", "quantised_coreset"),
)
MODELS = {"mini-bf16": "bfloat16", "mini-int4": "4 bit"}


def _points() -> list[dict[str, Any]]:
    return [*stored("memory-mini-bf16")["points"], *stored("memory-mini-int4")["points"]]


def _budget(point: dict[str, Any]) -> str:
    return str(point["budget"]).replace("GiB", " GiB").replace("MiB", " MiB")


def memory_savings() -> str:
    """README: memory and speed of a model of LLaDA2.0-mini's shape."""
    rows = []
    for point in (point for point in _points() if point["budget"] != "1GiB"):  # docs/memory.md has them all
        first = point["policy"] == "vanilla"
        extra = ", int8 embeddings" if point["model"] == "mini-int4" else ""
        read = point["expert_bytes_read"] / 1e9
        rows.append(
            [
                f"{MODELS[point['model']]}{extra}, `--expert-memory {point['budget']}`" if first else "",
                f"`{point['policy']}`",
                f"{point['peak_anonymous_bytes'] / GIB:.1f} GiB",
                f"{point['tokens_per_s']:.2f}",
                f"{point['faster_than_vanilla']:.2f}x",
                f"{read:.0f} GB" if read >= 10 else f"{read:.1f} GB",
            ]
        )
    head = ("experts", "policy", "memory", "tokens/s", "against vanilla", "read from disk")
    return table(head, rows, words=2)


def memory_savings_said() -> str:
    """README: which model the table is of."""
    unique = [point["unique_experts"] for point in _points() if point["policy"] == "vanilla"]
    steps = {point["steps"] for point in _points()}
    return paragraph(
        f"A random model with every tensor of LLaDA2.0-mini ({mini_size()}) and routers made to use about 70 of 256 "
        f"experts per block, as published ({spanning(unique, 0)} here), on 2 cores of an AMD EPYC: an answer of 32 "
        "tokens, "
        f"one token a step. It spans two blocks, both of which are filled: {spanning(steps, 0)} steps, and the rate "
        "counts "
        "the 32 tokens. Experts are read from disk past the page cache; memory is the process's peak without file "
        "pages"
    )


def mini_size() -> str:
    """LLaDA2.0-mini's parameters and bytes, from its configuration."""
    sizes = sizes_like(likeness("llada2.0-mini"))
    experts = sizes.config.num_moe_layers * sizes.config.router.num_experts * sizes.config.num_expert_parameters
    dense = sizes.dense_parameters + sizes.config.vocab_size * sizes.config.hidden_size
    return f"{(experts + dense) / 1e9:.1f} B parameters, {2 * (experts + dense) / 1e9:.1f} GB in bfloat16"


def expert_files() -> str:
    """docs/memory.md: of these, the routed experts."""
    config = likeness("llada2.0-mini")
    return f"{2 * config.num_moe_layers * config.router.num_experts * config.num_expert_parameters / 1e9:.1f} GB"


def full_size() -> str:
    """docs/memory.md: every setting with hits, reads and waits."""
    rows = [
        [
            f"{MODELS[point['model']]}, {_budget(point)}",
            f"`{point['policy']}`",
            f"{point['unique_experts']:.1f}",
            percent(point["hit_rate"]),
            f"{point['expert_bytes_read'] / 1e9:.1f}",
            f"{point['stall_s']:.1f}",
            f"{point['peak_anonymous_bytes'] / GIB:.2f}",
            f"{point['tokens_per_s']:.2f}",
            f"{point['faster_than_vanilla']:.2f}",
        ]
        for point in _points()
    ]
    head = ("model", "policy", "unique", "hit rate, %", "read, GB", "waited, s", "peak anonymous, GiB", "tokens/s")
    return table((*head, "times vanilla"), rows, words=2)


def small_budget() -> str:
    """docs/memory.md: the experts that 19 layers need, against the smaller budget."""
    slab = stored("equal-hit-rate-mini")["points"][0]["slab_bytes"]
    unique = next(point["unique_experts"] for point in _points() if point["policy"] == "des-vote:budget=32")
    needed = 19 * round(unique) * slab
    return (
        f"the {unique:.0f} experts of 19 MoE layers are {needed / 1e9:.2f} GB, of which the smaller budget holds "
        f"{100 * 640 * 2**20 / needed:.0f} %"
    )


def equal_hits() -> str:
    """docs/memory.md: memory at equal hit rates."""
    rows = []
    for point in stored("equal-hit-rate-mini")["points"]:
        for name, label in (("vanilla", "`vanilla`"), ("shared", "`des-vote:budget=16`")):
            found = point["real"][name]
            rows.append(
                [
                    label,
                    percent(found["hit_rate"]),
                    f"{found['slots']:,}",
                    f"{found['slots'] * point['slab_bytes'] / 1e9:.2f}",
                    f"**{percent(point['real']['less'])}**" if name == "shared" else "",
                    f"{found['peak_anonymous_bytes'] / 1e9:.2f}",
                ]
            )
    return table(("policy", "hit rate, %", "experts in memory", "GB", "less, %", "peak anonymous, GB"), rows)


def equal_hits_said() -> str:
    """README: the same in a sentence."""
    points = stored("equal-hit-rate-mini")["points"]
    rates = each([point["real"]["vanilla"]["hit_rate"] for point in points], 0, 100)
    less = spanning([point["real"]["less"] for point in points], 0, 100)
    return f"At equal hit rates, {rates} %, a coreset of 16 holds {less} % less experts in memory than vanilla"


def dense_rest() -> str:
    """docs/memory.md: what of the process is not experts."""
    points = stored("equal-hit-rate-mini")["points"]
    rest = [
        point["real"][name]["peak_anonymous_bytes"] - point["real"][name]["slots"] * point["slab_bytes"]
        for point in points
        for name in ("vanilla", "shared")
    ]
    return f"{spanning(rest, 1, 1e-9)} GB here"


def flat_memory() -> str:
    """docs/memory.md: anonymous memory at a tenth of the blocks and at the end."""
    early, late = (stored("flat-memory")[key] / 1e6 for key in ("settled_bytes", "end_bytes"))
    return f"{early:.0f} MB after a tenth of the blocks, {late:.0f} MB at the end"


def quantised_quality() -> str:
    """docs/memory.md: what quantised experts cost in quality."""
    rows = []
    for row in stored("quantisation-quality")["rows"]:
        against, accuracy, found = row["against_bf16"], row["accuracy"], row["difference"]
        value, low, high = (100 * found[key] for key in ("value", "low", "high"))
        rows.append(
            [
                row["label"],
                f"{against['kl_mean']:.4f}",
                f"{against['kl_p99']:.3f}",
                f"{100 * against['argmax_agreement']:.2f}",
                percent(accuracy["successes"] / accuracy["count"]),
                f"{value:+.1f} ({low:+.1f} to {high:+.1f})",
            ]
        )
    head = ("scheme", "KL, mean", "KL, 99 %", "same best token, %", "accuracy, %", "difference, points (95 %)")
    return table(head, rows)


def quantised_coreset() -> str:
    """docs/memory.md: accuracy that 4 bit takes or adds under a coreset."""
    row = pick(stored("quantisation-quality")["rows"], label="int4, des-vote:budget=28")["difference_to_same_policy"]
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    return f"4 bit adds {value:+.1f} points ({low:+.1f} to {high:+.1f}) to it"
