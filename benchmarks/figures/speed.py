"""Speed: one expert layer, forwards, routing, answers, the server. For README, docs/performance.md and serving.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from writing import bullets, each, linked, paragraph, percent, pick, significant, spanning, stored, table

BLOCKS = (
    *("layer_speed", "layer_speed_said", "answers_said", "serving_said", "layer_runs", "layer_findings"),
    *("layer_widths", "quantised_layer", "head_by_bits", "forward_parts", "forward_half", "forward_runs"),
    *(
        "router_share",
        "torch_against_ours",
        "routing",
        "answers",
        "answers_bound",
        "answers_by_batch",
        "bandwidth_seen",
    ),
    *("serving_load",),
)
RUNS = ("experts-mini-1", "experts-mini-2", "experts-mini-3")
SLOW = RUNS[:2]
CONTENDERS = {
    "cpu": "**`cpu` (ours)**",
    "cpu-int8": "`cpu-int8`",
    "cpu-int4": "`cpu-int4`",
    "zentorch": "`zentorch`",
    "torch": "a loop in torch",
    "transformers-eager": "`transformers-eager`",
    "transformers-grouped-mm": "`transformers-grouped-mm`",
}
BACKENDS = {"grouped": "torch (ours)"}
"""Backends as results name them that have another name today."""


def layer(name: str, backend: str, unique: int) -> dict[str, Any]:
    """One contender of `bench experts` at one number of unique experts."""
    return pick(stored(name)["cases"], backend=backend, unique=unique)


def ratios(names: Iterable[str], slower: str, uniques: Iterable[int], faster: str = "cpu") -> list[float]:
    """How many times as fast, at each number of experts of each run."""
    points = [(name, unique) for name in names for unique in uniques]
    return [layer(name, slower, unique)["ms"] / layer(name, faster, unique)["ms"] for name, unique in points]


def uniques(name: str) -> list[int]:
    """The numbers of unique experts of a run."""
    return list(dict.fromkeys(case["unique"] for case in stored(name)["cases"]))


def layer_speed() -> str:
    """README: milliseconds of one layer, memory at full speed."""
    shown = (12, 16, 32, 70, 128)
    names = {
        "cpu": "expertshare",
        "cpu-int8": "expertshare, int8 experts",
        "cpu-int4": "expertshare, 4-bit experts",
        "zentorch": "zentorch",
        "transformers-grouped-mm": "transformers, grouped_mm",
        "transformers-eager": "transformers, eager",
    }
    rows = [[said, *(f"{layer(RUNS[2], name, unique)['ms']:.1f}" for unique in shown)] for name, said in names.items()]
    bound = [f"{layer(RUNS[2], 'cpu', unique)['bound_ms']:.1f}" for unique in shown]
    head = ("one expert layer, 32 tokens, ms", "12 experts", *(str(unique) for unique in shown[1:]))
    return table(head, [*rows, ["bound of bfloat16 by memory or arithmetic", *bound]])


def layer_speed_said() -> str:
    """README: where the table is from, and the same with slow memory."""
    slow = ratios(SLOW, "transformers-eager", uniques(SLOW[0]))
    return (
        f"memory at {stored(RUNS[2])['bandwidth_gb_per_s']:.0f} GB/s; where memory gives "
        f"{spanning([stored(name)['bandwidth_gb_per_s'] for name in SLOW], 0)} GB/s and everybody waits for it, "
        f"{spanning(slow)} times as fast as transformers' eager loop"
    )


def layer_runs() -> str:
    """docs/performance.md: three runs, with each one's share of its own bound."""
    counts = uniques(RUNS[0])
    rows = []
    for number, name in enumerate(RUNS, 1):
        run = stored(name)
        limits = f"{run['bandwidth_gb_per_s']:.0f} GB/s, {run['peak_gmac_per_s']:.0f} GMAC/s"
        bounds = [f"{layer(name, 'cpu', unique)['bound_ms']:.1f}" for unique in counts]
        rows.append([f"run {number}: {limits}, bound ms", *bounds])
        for backend, said in CONTENDERS.items():
            points = [layer(name, backend, unique) for unique in counts]
            with_share = backend.startswith(("cpu", "zentorch"))
            rows.append([said, *(_shared(p) if with_share else significant(p["ms"]) for p in points)])
    return table(("unique experts", *(str(unique) for unique in counts)), rows)


def _shared(point: dict[str, Any]) -> str:
    return f"{significant(point['ms'])} <sub>{100 * point['share_of_bound']:.0f} %</sub>"


def layer_findings() -> str:
    """docs/performance.md: what the three runs say together."""
    counts = uniques(RUNS[0])

    def shares(backend: str, wanted: Sequence[int], names: Sequence[str] = RUNS) -> str:
        found = [layer(name, backend, unique)["share_of_bound"] for name in names for unique in wanted]
        return f"{spanning(found, 0, 100)} %"

    def fit(name: str) -> float:
        return float(pick(stored(name)["fits"], backend="cpu")["r_squared"])

    zen = [ratio - 1 for ratio in ratios(RUNS, "zentorch", counts)]
    slow, fast = ratios(SLOW, "transformers-eager", counts), ratios(RUNS[2:], "transformers-eager", counts)
    sixteen, seventy = (
        {bits: ratios(RUNS, "cpu", [unique], f"cpu-{bits}") for bits in ("int8", "int4")} for unique in (16, 70)
    )
    falls = [layer(name, "cpu", 70)["ms"] / layer(name, "cpu", 16)["ms"] for name in RUNS]
    widths = [case["ms"] for case in stored("experts-mini-width")["cases"]]
    tokens = pick(stored("experts-mini-tokens")["fits"], backend="cpu")
    four = layer("experts-mini-4", "cpu-int4", 70)
    return bullets(
        f"Of the bound: {shares('cpu', (12, 16, 24, 32))} at 12 to 32 experts, {shares('cpu', (48,))} at 48, "
        f"{shares('cpu', (70,))} at 70 and {shares('cpu', (108, 128))} beyond. Until commit 6fa4f2b bandwidth was "
        "measured on ordinary pages, which give less than the huge pages that weights are in: shares in older reports "
        "are higher for the same time.",
        f"zentorch, which keeps a reordered copy of the weights, takes longer at every size in all three runs: "
        f"{spanning(zen, 0, 100)} %, the more the fewer experts there are.",
        f"Against transformers' eager loop {spanning(slow)} times as fast where memory is slow (runs 1 and 2), and "
        f"{spanning(fast)} times where it is fast (run 3: {ratios(RUNS[2:], 'transformers-eager', [16])[0]:.1f} at 16, "
        f"{ratios(RUNS[2:], 'transformers-eager', [70])[0]:.1f} at 70). From 70 to 16 unique experts: {each(falls)} "
        "times as fast.",
        f"int8 is {spanning(sixteen['int8'])} times as fast as bfloat16 at 16 experts and {spanning(seventy['int8'])} "
        f"times at 70, 4 bit {spanning(sixteen['int4'])} and {spanning(seventy['int4'])} times. Of their own bounds at "
        f"70: int8 {shares('cpu-int8', (70,))}, 4 bit {shares('cpu-int4', (70,), SLOW)} with slow memory and "
        f"{shares('cpu-int4', (70,), RUNS[2:])} with fast; in a fourth run, in which memory changed speed "
        f"({linked('experts-mini-4', '4')}), {100 * four['share_of_bound']:.0f} % at "
        f"{four['bandwidth_gb_per_s']:.0f} GB/s. Few experts with many tokens each are arithmetic in 4 bit, and their "
        "bound is that of a product whose codes need no unpacking.",
        f"Latency is linear in unique experts (R^2 {each(map(fit, RUNS), 4)}), and flat in the number of experts that "
        f"the layer holds: {each(widths)} ms for 64, 128, 256 and 512 experts at 32 unique "
        f"({linked('experts-mini-width')}). With 8 to 64 tokens: {tokens['us_per_expert']:.0f} us an expert, which is "
        f"its bytes at {tokens['gb_per_s']:.0f} GB/s, and {tokens['us_per_pair']:.1f} us a pair, R^2 "
        f"{tokens['r_squared']:.3f} (`--tokens 8,16,32,64 --unique 16,32,64`, {linked('experts-mini-tokens')}).",
    )


def layer_widths() -> str:
    """docs/performance.md: other models' widths."""
    rows = []
    for name in ("experts-llada-moe", "experts-sdar", "experts-diffusiongemma", "experts-flash"):
        run = stored(name)
        for unique in uniques(name):
            ours, peer = layer(name, "cpu", unique), layer(name, "transformers-grouped-mm", unique)
            share = f"{ours['ms']:.1f} <sub>{100 * ours['share_of_bound']:.0f} %</sub>"
            zen = layer(name, "zentorch", unique)["ms"]
            case = f"{ours['case']}, {run['bandwidth_gb_per_s']:.0f} GB/s"
            rows.append([case, f"{unique}", share, f"{zen:.1f}", f"{peer['ms'] / ours['ms']:.2f}"])
    return table(("case", "unique", "`cpu`, ms", "zentorch, ms", "times as fast as grouped_mm"), rows)


def quantised_layer() -> str:
    """docs/performance.md: experts between torch operations."""
    run = stored("quantised-experts-mini")
    counts = list(dict.fromkeys(case["unique"] for case in run["cases"]))
    rows = []
    for backend in ("cpu", "cpu-int8", "cpu-int4"):
        points = [pick(run["cases"], backend=backend, unique=unique) for unique in counts]
        shown = [f"{point['ms']:.1f} <sub>{100 * point['share_of_bound']:.0f} %</sub>" for point in points]
        rows.append([f"`{backend}`", *shown])
    head = f"backend, {run['machine']['bandwidth_gb_per_s']:.1f} GB/s"
    return table((head, *(str(unique) for unique in counts)), rows)


def head_by_bits() -> str:
    """docs/performance.md: the head in int8 and bfloat16."""
    points = stored("head-by-bits")["points"]
    names = {"bfloat16": "bfloat16", "int8": "int8", "read": "reading bfloat16 once"}
    rows = [[said, *(f"{point[key]:.1f}" for point in points)] for key, said in names.items()]
    speed = spanning([point["gb_per_s"] for point in points], 0)
    return table((f"rows ({speed} GB/s), ms", *(str(point["rows"]) for point in points)), rows)


PARTS = ("experts", "router", "attention", "head", "other")


def _forward_table(name: str, chosen: Sequence[tuple[str, str]]) -> str:
    rows = []
    for backend, policy in chosen:
        point = pick(stored(name)["forwards"], backend=backend, policy=policy)
        own = "ms_by_part" in point
        rows.append(
            [
                BACKENDS.get(backend, f"`{backend}`"),
                f"`{policy}`",
                f"{point['unique_experts']:.0f}" if own else "",
                f"{point['ms']:.1f}",
                f"{100 * point['share_of_bound']:.0f} %" if own else "",
                *(f"{point['ms_by_part'][part]:.1f}" if own else "" for part in PARTS),
            ]
        )
    return table(("backend", "policy", "unique", "ms", "of the bound", *PARTS), rows, words=2)


def forward_parts() -> str:
    """docs/performance.md: one forward by part."""
    chosen = [
        *(("cpu", policy) for policy in ("vanilla", "des-vote:budget=16", "block-max:budget=16")),
        *((name, "vanilla") for name in ("grouped", "transformers-eager", "transformers-grouped-mm")),
    ]
    return _forward_table("forward-mini", chosen)


def forward_half() -> str:
    """docs/performance.md: the same with half of the block masked."""
    chosen = [("cpu", "vanilla"), ("cpu", "des-vote:budget=16"), ("transformers-grouped-mm", "vanilla")]
    return _forward_table("forward-mini-half", chosen)


def forward_runs() -> str:
    """docs/performance.md: what sharing gains in five runs."""
    names = {
        "forward-mini": "1",
        "forward-mini-2": "2",
        "forward-mini-3": "3",
        "forward-mini-half": "half",
        "forward-mini-half-2": "half, 2",
    }
    rows = []
    for name, said in names.items():
        run = stored(name)
        vanilla, shared = (
            pick(run["forwards"], backend="cpu", policy=policy) for policy in ("vanilla", "des-vote:budget=16")
        )
        rows.append(
            [
                linked(name, said),
                f"{run['bandwidth_gb_per_s']:.1f}",
                f"{run['scene']['masked']}",
                f"{vanilla['ms']:.1f}",
                f"{shared['ms']:.1f}",
                f"{vanilla['ms'] / shared['ms']:.2f}",
                f"{vanilla['bound_ms'] / shared['bound_ms']:.2f}",
                f"{vanilla['faster_than']['transformers-grouped-mm']:.2f}",
            ]
        )
    head = ("run", "GB/s", "rows masked", "vanilla, ms", "des-vote, ms", "times as fast", "by the bounds")
    return table((*head, "vanilla against grouped_mm"), rows)


FORWARDS = ("forward-mini", "forward-mini-2", "forward-mini-3", "forward-mini-half", "forward-mini-half-2")


def router_share() -> str:
    """docs/performance.md: routing within forwards."""

    def share(policy: str) -> str:
        found = [
            point["router_over_experts"]
            for name in FORWARDS
            for point in stored(name)["forwards"]
            if point["backend"] == "cpu" and point["policy"] == policy
        ]
        return f"{spanning(found, 1, 100)} %"

    return paragraph(
        f"Gate, selection and assignment take {share('vanilla')} of the experts' time under vanilla, "
        f"{share('des-vote:budget=16')} under `des-vote:budget=16` and {share('block-max:budget=16')} under "
        "`block-max:budget=16`."
    )


def torch_against_ours() -> str:
    """docs/performance.md: head and attention by our kernels and by torch."""
    runs = ("forward-mini", "forward-mini-3")

    def part(name: str, backend: str) -> str:
        points = [pick(stored(run)["forwards"], backend=backend, policy="vanilla") for run in runs]
        return each([point["ms_by_part"][name] / (1 if name == "head" else 4) for point in points])

    speeds = each([stored(run)["bandwidth_gb_per_s"] for run in runs], 0)
    return paragraph(
        f"One block of 32 tokens of LLaDA2.0-mini with a cache of 256 positions, 2 cores ({speeds} GB/s; both in the "
        f"same run, {linked(runs[0], '1')}, {linked(runs[1], '3')}): the head with argmax and confidence takes "
        f"{part('head', 'cpu')} ms (torch {part('head', 'grouped')}), attention with its projections "
        f"{part('attention', 'cpu')} ms a layer ({part('attention', 'grouped')}). At 32 rows this is arithmetic, not "
        "memory. A projection takes all tokens while a chunk of weights is in the cache and never switches to torch's "
        "packed product: that one is faster for hundreds of rows in bfloat16, but then a token's result would depend "
        "on "
        "how many others there are. The head keeps no logits: of every chunk of the vocabulary, a fixed grid, the "
        "largest logit (rounded as torch would, so that ties are the same), its id and the sum of exponentials, merged "
        "in order."
    )


def routing() -> str:
    """docs/performance.md: one layer's routing by policy."""
    first, second = stored("router-cost")["rows"], stored("router-cost-2")["rows"]
    rows = []
    for row, label in zip(first, stored("router-cost")["options"]["policies"].split(","), strict=True):
        fast = pick(second, policy=row["policy"], by="native")
        rows.append(
            [
                f"`{label}`",
                f"{row['unique']:.0f}",
                f"{row['router_us']:.0f} ({row['router_low_us']:.0f}-{row['router_high_us']:.0f})",
                f"{row['experts_us']:.0f}",
                f"{percent(row['share_of_experts'])} %",
                f"{fast['router_us']:.0f}",
                f"{percent(fast['share_of_experts'])} %",
            ]
        )
    head = ("policy", "unique experts", "us (quartiles)", "experts, us", "of experts", "fast memory, us", "of experts")
    return table(head, rows)


ANSWERS = (
    "generate-mini",
    "generate-mini-2",
    "generate-mini-3",
    "generate-mini-4",
    "generate-mini-5",
    "generate-mini-6",
)
SHARED = "des-vote:budget=16"
PEER = "transformers-grouped-mm"


def _rate(name: str, backend: str, policy: str) -> float:
    return float(pick(stored(name)["generations"], backend=backend, policy=policy)["tokens_per_s"])


def _times(name: str, policy: str) -> float:
    return _rate(name, "cpu", policy) / _rate(name, PEER, "vanilla")


def answers() -> str:
    """docs/performance.md: tokens per second of whole answers, against transformers."""
    runs = (*ANSWERS, "generate-mini-float32")
    rows = [
        [f"`{backend}`", f"`{policy}`", *(f"{_rate(name, backend, policy):.1f}" for name in runs)]
        for backend, policy in (("cpu", "vanilla"), ("cpu", SHARED), (PEER, "vanilla"))
    ]
    rows.append(["vanilla, times as fast", "", *(f"{_times(name, 'vanilla'):.2f}" for name in runs)])
    rows.append(["`des-vote`, times as fast", "", *(f"{_times(name, SHARED):.2f}" for name in runs)])
    rows.append(["memory, GB/s", "", *(f"{stored(name)['machine']['bandwidth_gb_per_s']:.0f}" for name in runs)])
    numbered = (linked(name, f"run {number}") for number, name in enumerate(ANSWERS, 1))
    return table(("backend", "policy", *numbered, linked(runs[-1], "float32, 3 layers")), rows, words=2)


def answers_bound() -> str:
    """docs/performance.md: time of a step in a run with slow memory."""
    point = pick(stored("generate-mini-4")["generations"], backend="cpu", policy="vanilla")
    steps = point["ms"] / point["denoise_forwards"]
    return (
        f"run 4 took {steps:.1f} ms for each denoising step (commit forwards included), with "
        f"{point['unique_experts']:.1f} experts a layer"
    )


def answers_said() -> str:
    """README: the span over runs."""
    vanilla, shared = ([_times(name, policy) for name in ANSWERS] for policy in ("vanilla", SHARED))
    exact = _times("generate-mini-float32", "vanilla")
    return paragraph(
        f"Whole answers of four full-width layers come {spanning(vanilla)} times as fast as from transformers' class "
        f"with grouped_mm under vanilla routing and {spanning(shared)} times with a coreset of 16 (six runs); in "
        "float32, "
        f"with three layers, {exact:.1f} times with the same tokens ([performance](docs/performance.md))."
    )


def answers_by_batch() -> str:
    """docs/performance.md: the reference model by batch size."""
    points = [point for point in stored("generate-reference")["generations"] if point["backend"] == "cpu"]
    sizes = list(dict.fromkeys(point["batch_size"] for point in points))
    rows = [
        [f"`{policy}`", *(f"{pick(points, policy=policy, batch_size=size)['tokens_per_s']:.0f}" for size in sizes)]
        for policy in ("vanilla", "des-vote")
    ]
    return table(("policy, tokens per second", *(str(size) for size in sizes)), rows)


def bandwidth_seen() -> str:
    """docs/performance.md: between what memory and arithmetic moved over the runs."""
    runs = [stored(name) for name in (*RUNS, "experts-mini-4", *FORWARDS)]
    bandwidth, peak = ([run[key] for run in runs] for key in ("bandwidth_gb_per_s", "peak_gmac_per_s"))
    return f"{spanning(bandwidth, 0)} GB/s and {spanning(peak, 0)} GMAC/s over the runs of this page"


def serving_said() -> str:
    """README: the server under load."""
    runs = stored("serving-load")["runs"]
    alone = runs["one by one"]["tokens_per_s"]
    gain = [runs[name]["tokens_per_s"] / alone for name in ("all at once", "all at once, again")]
    return paragraph(
        f"{stored('serving-load')['clients']} clients at once, a fifth of whom leave early: no answer lost or "
        "different "
        f"from what it is alone, {each(gain)} times (two rounds) the tokens per second of one request at a time "
        "([serving](docs/serving.md))."
    )


def serving_load() -> str:
    """docs/serving.md: the load test."""
    result = stored("serving-load")
    names = {"one by one": "one at a time", "all at once": "all at once", "all at once, again": "all at once, again"}
    rows = []
    for name, said in names.items():
        run = result["runs"][name]
        latency, memory = run["latency_s"], run["server_memory_bytes"]
        rows.append(
            [
                said,
                f"{run['requests']}",
                f"{run['left']}",
                f"{run['wrong']} and {run['failed']}",
                f"{1e3 * latency['p50']:.0f} and {1e3 * latency['p95']:.0f}",
                f"{run['tokens_per_s']:,.0f}",
                f"{memory['after'] / 1e6:.0f}",
            ]
        )
    head = ("requests", "asked", "left early", "wrong, failed", "ms, p50 and p95", "tokens/s", "memory after, MB")
    return table(head, rows)
