"""Quality of models under policies. For README, docs/quality.md, distillation.md, tuning.md and variants.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from writing import bullets, each, linked, paragraph, percent, pick, spanning, stored, table

BLOCKS = (
    *("quality_short", "quality_backends", "distilled_said", "quality_full", "quality_today", "quality_read"),
    *("quality_levels", "p_sweep", "block_lengths", "tuned", "second_family", "distilled", "distilled_headline"),
    *("distilled_findings", "hand_set", "tuned_layers", "variants", "variant_findings"),
)
TASKS = ("arith", "math", "code", "code_pro", "choice")


def run(name: str, label: str) -> dict[str, Any]:
    """One policy of a stored comparison."""
    return pick(stored(name)["runs"], label=label)


def kept(name: str, label: str) -> str:
    """What a policy retains, in per cent, no task counted above 100."""
    return percent(run(name, label)["retained_capped"])


def experts(name: str, label: str) -> str:
    """Unique experts per block and layer in denoising forwards."""
    return f"{run(name, label)['unique_experts']['denoise']:.1f}"


SHORT = (
    *("vanilla", "des-seq:experts_per_vote=2", "des-seq:experts_per_vote=1", "protected-vote:budget=28"),
    *("des-vote:budget=28", "block-max:budget=24", "block-top-p:top_p_experts=0.8"),
)


def quality_short() -> str:
    """README: seven of the settings."""
    rows = [
        [
            f"`{label}`",
            experts("policies", label),
            percent(run("policies", label)["unique_experts_reduction"]),
            kept("policies", label),
        ]
        for label in SHORT
    ]
    return table(("policy", "unique experts", "fewer, %", "retained, %"), rows)


def quality_backends() -> str:
    """README: how far today's default backend moves these figures."""
    moved = [
        abs(run("policies", label)["retained_capped"] - run("policies-native", label)["retained_capped"])
        for label in SHORT
    ]
    return f"up to {100 * max(moved):.1f} points"


def quality_full() -> str:
    """docs/quality.md: every setting with every task and its interval."""
    rows = []
    for each_run in stored("policies")["runs"]:
        tasks = (each_run["tasks"][task] for task in TASKS)
        rows.append(
            [
                f"`{each_run['label']}`",
                f"{each_run['unique_experts']['denoise']:.1f}",
                percent(each_run["unique_experts_reduction"]),
                *(_with_interval(task["accuracy"], task["interval"]) for task in tasks),
                percent(each_run["retained"]),
                percent(each_run["retained_capped"]),
            ]
        )
    return table(("policy", "unique experts", "fewer, %", *TASKS, "retained, %", "capped, %"), rows)


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{percent(value)} <sub>{100 * interval[0]:.0f}-{100 * interval[1]:.0f}</sub>"


def quality_today() -> str:
    """docs/quality.md: the same policies on the native library."""
    rows = [
        [f"`{label}`", experts("policies-native", label), kept("policies", label), kept("policies-native", label)]
        for label in SHORT
    ]
    return table(("policy", "unique experts", "torch backend: capped, %", "native library: capped, %"), rows)


def quality_read() -> str:
    """docs/quality.md: how to read the table."""

    def fewer(label: str) -> str:
        return f"{100 * run('policies', label)['unique_experts_reduction']:.0f} %"

    two, one, vote = "des-seq:experts_per_vote=2", "des-seq:experts_per_vote=1", "des-vote:budget=20"
    return bullets(
        "Sharing costs this model much more than the papers report for models of 7 to 100 billion parameters: it has "
        "64 "
        f"narrow experts, was trained without sharing, and needs most of them. With DES-Seq {fewer(two)} fewer experts "
        f"keep {kept('policies', two)} % of the accuracy, and {fewer(one)} fewer keep {kept('policies', one)} %; "
        "DES-Vote "
        f"keeps {kept('policies', vote)} % at {fewer(vote)} fewer. Measure your own model before you choose.",
        "At equal coreset size, policies that keep every token's first choice (DES-Seq, protected vote) beat the plain "
        "vote "
        "here.",
        quality_levels(),
    )


def quality_levels() -> str:
    """docs/quality.md: vanilla by the level of the prompts."""
    found = stored("levels")["accuracy"]

    def shares(levels: Sequence[int]) -> str:
        rates = [found[task][f"level {n}"] for task in found for n in levels]
        return spanning([rate["successes"] / rate["count"] for rate in rates], 0, 100)

    return (
        "A fifth of the prompts (level 4) go one step beyond anything in training. Vanilla solves "
        f"{shares((1, 2, 3))} % of levels 1 to 3 and {shares((4,))} % of level 4 ({linked('levels')}), which is what "
        "keeps "
        "it below 100."
    )


def p_sweep() -> str:
    """docs/quality.md: what block top-p keeps and uses."""
    runs = [each_run for each_run in stored("p-sweep")["runs"] if each_run["policy"] == "block-top-p"]
    rows = [
        ["unique experts", *(f"{each_run['unique_experts']['denoise']:.1f}" for each_run in runs)],
        ["capped, %", *(percent(each_run["retained_capped"]) for each_run in runs)],
    ]
    return table(("p", *(f"{each_run['knobs']['top_p_experts']}" for each_run in runs)), rows)


def block_lengths() -> str:
    """docs/quality.md: experts saved and vanilla's own accuracy by block length."""
    lengths = (8, 16, 24, 32)
    label = "block-top-p:top_p_experts=0.6"
    saved = [percent(run(f"block-length-{n}", label)["unique_experts_reduction"]) for n in lengths]
    own = [percent(stored(f"block-length-{n}")["reference"]["accuracy"]) for n in lengths]
    head = ("block length", *(linked(f"block-length-{n}", f"{n}") for n in lengths))
    return table(head, [["p = 0.6: fewer experts, %", *saved], ["vanilla's own accuracy, %", *own]])


def tuned_layers() -> str:
    """The setting of each layer that the tuner chose."""
    layers = [layer["knobs"]["experts_per_vote"] for layer in stored("tuning")["chosen"]["policy"]["layers"]]
    return f"DES-Seq with {each(layers, 0)} experts per vote in its three MoE layers"


def tuned() -> str:
    """docs/quality.md and docs/tuning.md: what the tuner certified."""
    found = stored("tuning")
    prompts = sum(found["num_prompts"].values())
    chosen, vanilla = found["chosen"], found["vanilla"]
    options = found["options"]
    return paragraph(
        f"On this model, {prompts:,} prompts, seed {options['seed']}: {tuned_layers()} is certified to keep "
        f"{100 * options['retain']:g} % ({100 * options['confidence']:g} % confidence) at "
        f"{chosen['unique_experts']:.1f} instead of {vanilla['unique_experts']:.1f} experts; on the prompts of the "
        f"certificate it kept {percent(chosen['retained'], 2)} %, with a lower bound of "
        f"{percent(chosen['lower_bound'], 2)} % ({linked('tuning')})."
    )


def hand_set() -> str:
    """docs/tuning.md: rules set by hand, for comparison."""
    rows = [
        [f"`{each_run['label']}`", f"{each_run['unique_experts']['denoise']:.1f}", percent(each_run["retained_capped"])]
        for each_run in stored("hand-set")["runs"]
    ]
    return table(("set by hand", "unique experts", "kept, %"), rows)


def second_family() -> str:
    """docs/quality.md: the model of LLaDA-MoE's layout."""
    name = "policies-llada-moe"
    rows = []
    for each_run in stored(name)["runs"]:
        found = each_run["difference"]
        points = "–" if found is None else _points([found[key] for key in ("value", "low", "high")])  # noqa: RUF001
        rows.append(
            [
                f"`{each_run['label']}`",
                f"{each_run['unique_experts']['denoise']:.1f}",
                percent(each_run["unique_experts_reduction"]),
                percent(each_run["accuracy"]),
                percent(each_run["retained_capped"]),
                points,
            ]
        )
    head = ("policy", "unique experts", "fewer, %", "accuracy, %", "capped, %", "difference, points (95 %)")
    return table(head, rows)


def _points(found: Sequence[float]) -> str:
    value, low, high = (100 * part for part in found)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


DISTILLED_FOR = "block-top-p:group_limit=ignore,top_p_experts=0.52,guard=8"


def _distilled(model: str, policy: str) -> dict[str, Any]:
    wanted = set(policy.replace(":", ",").split(","))
    rows = stored("distilled-quality")["rows"]
    (found,) = (r for r in rows if r["model"] == model and set(r["policy"].replace(":", ",").split(",")) == wanted)
    return dict(found)


def _spare(policy: str) -> str:
    """The label without the group limit that most rows have, and without the guard, which is the derived one."""
    name, _, knobs = policy.partition(":")
    rest = [knob for knob in knobs.split(",") if knob not in ("", "group_limit=ignore", "guard=8")]
    return f"{name}:{','.join(rest)}" if rest else name


def distilled() -> str:
    """docs/distillation.md: both models under every policy."""
    rows = []
    for row in stored("distilled-quality")["rows"]:
        name = "`reference`" if row["model"] == "base" else "**`reference-distilled`**"
        rows.append(
            [
                name,
                f"`{_spare(row['policy'])}`",
                f"{row['unique_experts']:.1f}",
                percent(row["unique_experts_reduction"]),
                percent(row["retained_capped_mean"]),
                _points(row["difference"]),
                *(percent(row["accuracy"][task][0]) for task in TASKS),
            ]
        )
    head = ("model", "policy", "unique experts", "fewer, %", "retained, %", "difference, points (95 %)")
    return table((*head, *TASKS), rows, words=2)


def distilled_headline() -> str:
    """README and docs/distillation.md: what distillation gives."""
    before, after = _distilled("base", "vanilla"), _distilled("distilled", DISTILLED_FOR)
    return (
        f"**{after['unique_experts']:.1f} instead of {before['unique_experts']:.1f} experts "
        f"({100 * after['unique_experts_reduction']:.0f} % fewer) at {percent(after['retained_capped_mean'])} % of the "
        "accuracy**"
    )


def distilled_said() -> str:
    """README: the same, with the published figure."""
    return paragraph(
        "A model that was **distilled for sharing** keeps its accuracy: "
        f"[models/reference-distilled](models/reference-distilled/README.md) uses {distilled_headline()}, where the "
        "best "
        "published figure is 79 % fewer at 99.1 %. It was made by `expertshare distill` on two CPU cores, and pays by "
        "concentrating on fewer experts over all ([docs/distillation.md](docs/distillation.md))."
    )


def distilled_findings() -> str:
    """docs/distillation.md: what the table says."""
    corpus = pick(
        stored("corpus-experts")["results"],
        model="reference-distilled",
        policy="block-top-p:top_p_experts=0.52,group_limit=ignore",
        task="all",
    )
    wide, vanilla = (
        _distilled("distilled", "block-top-p:group_limit=ignore,top_p_experts=0.8,guard=8"),
        _distilled("distilled", "vanilla"),
    )
    return bullets(
        "**The training counts, not the rule.** On the distilled model the plain vote of DES (`des-vote:budget=8`) is "
        "as "
        "good as the block top-p it was trained with.",
        "**It works by concentration.** Over a corpus of 300 prompts vanilla uses all 64 experts of each layer; the "
        f"distilled model under its policy uses {corpus['fewest_used']} to {corpus['most_used']}, and the busiest "
        "eight "
        f"take {spanning(corpus['share_of_busiest_k_by_layer'], 0, 100)} % of the work ({linked('corpus-experts')}). A "
        "model of this size can afford that on five kinds of problems. Whether one that has to know more can, this "
        "does "
        "not say.",
        "**It is made for its policy.** With more experts than it was trained with it gets worse: "
        f"{percent(wide['retained_capped_mean'])} % at {wide['unique_experts']:.0f}, and "
        f"{percent(vanilla['retained_capped_mean'])} % under vanilla routing.",
        "**It takes its time.** A few hundred steps keep far less than the 4,000 of this run ([log](experiments.md)).",
    )


# question, decoding, variant, plain form, verdict; the variant's own words where it is one of several layers
VARIANTS = (
    ("who votes", "confidence", "des-vote:budget=29,voters=masked", "des-vote:budget=28", "kept", ""),
    ("", "confidence", "protected-vote:budget=29,voters=masked", "protected-vote:budget=28", "kept", ""),
    ("", "confidence", "block-top-p:top_p_experts=0.95,voters=masked", "block-top-p:top_p_experts=0.8", "kept", ""),
    ("", "confidence", "block-top-p:top_p_experts=0.92,voters=masked", "block-top-p:top_p_experts=0.8", "kept", ""),
    ("", "confidence", "des-seq:experts_per_vote=5,voters=masked", "des-seq:experts_per_vote=2", "let all vote", ""),
    ("which rule", "confidence", "coverage:budget=28", "des-vote:budget=28", "kept", ""),
    ("", "confidence", "protected-vote:budget=28", "des-vote:budget=28", "kept", ""),
    ("", "confidence", "block-max:budget=28,group_limit=inside", "des-vote:budget=28", "kept, vendor's rule", ""),
    ("", "confidence", "coverage:budget=28", "protected-vote:budget=28", "both stay", ""),
    ("", "confidence", "coverage:budget=20", "protected-vote:budget=20", "both stay", ""),
    ("", "confidence", "coverage:budget=26", "des-seq:experts_per_vote=2", "DES-Seq stays first", ""),
    ("reuse, 8 steps", "8 steps", "des-seq:experts_per_vote=2,reuse=32", "des-seq:experts_per_vote=2", "kept", ""),
    ("", "8 steps", "protected-vote:budget=28,reuse=32", "protected-vote:budget=28", "kept", ""),
    ("", "8 steps", "des-vote:budget=28,reuse=32", "des-vote:budget=28", "not with the plain vote", ""),
    (
        "reuse, by confidence",
        "confidence",
        "des-seq:experts_per_vote=2,reuse=32",
        "des-seq:experts_per_vote=2",
        "blocks have 2 steps: little to reuse",
        "",
    ),
    (
        "layers",
        "confidence",
        "des-vote:budget=34 | des-vote:budget=24 | des-vote:budget=26",
        "des-vote:budget=28",
        "kept: `tune`, policy files",
        "`des-vote` 34, 24, 26",
    ),
    (
        "",
        "confidence",
        "protected-vote:budget=34 | protected-vote:budget=24 | protected-vote:budget=26",
        "protected-vote:budget=28",
        "kept",
        "`protected-vote` 34, 24, 26",
    ),
    ("ballots", "confidence", "protected-vote:budget=28,ballots=grouped", "protected-vote:budget=28", "both stay", ""),
    (
        "group limit",
        "confidence",
        "protected-vote:budget=27,group_limit=ignore",
        "protected-vote:budget=28",
        "both stay",
        "",
    ),
    (
        "two budgets",
        "confidence",
        "des-vote:budget=24,wide_budget=36,wide_at=early",
        "des-vote:budget=28",
        "removed",
        "wide while more than half is masked, `des-vote` 36 / 24",
    ),
    (
        "",
        "confidence",
        "protected-vote:budget=24,wide_budget=36,wide_at=early",
        "protected-vote:budget=28",
        "removed",
        "the same, `protected-vote` 36 / 24",
    ),
    (
        "",
        "8 steps",
        "protected-vote:budget=24,wide_budget=36,wide_at=early",
        "protected-vote:budget=28",
        "removed",
        "the same with 8 steps",
    ),
    (
        "",
        "confidence",
        "protected-vote:budget=28,wide_budget=64,wide_at=final",
        "protected-vote:budget=33",
        "removed; experts equal over all forwards",
        "all experts in prefill and commit, `protected-vote` 28",
    ),
)
MATCHED = 0.03
"""Sizes that differ by no more count as equal."""


def variants() -> str:
    """docs/variants.md: what was tried, and what it was worth."""
    rows = []
    for question, decoding, variant, plain, verdict, words in VARIANTS:
        found = pick(stored("variants")["comparisons"], decoding=decoding, variant=variant, plain=plain)
        moved = found["unique_experts_ratio"]["denoise"] - 1
        size = f"; {100 * moved:+.0f} % experts" if abs(moved) > MATCHED and "equal over" not in verdict else ""
        rows.append([question, words or f"`{variant}`", f"`{plain}`", _points(found["difference"]), verdict + size])
    head = ("question", "variant", "plain form", "difference, points", "verdict")
    return table(head, rows, words=5)


def variant_findings() -> str:
    """docs/variants.md: how much more a moving coreset fetches, coverage's knob, reuse at equal fetches."""
    runs = stored("variants")["runs"]

    def more(variant: str, plain: str) -> float:
        return float(runs[f"8 steps: {variant}"]["fetched"] / runs[f"8 steps: {plain}"]["fetched"] - 1)

    def by_saturation(knobs: str) -> str:
        pair = {"variant": f"coverage:budget=28{knobs}", "plain": "des-vote:budget=28"}
        return _points(pick(stored("variants")["comparisons"], decoding="confidence", **pair)["difference"])

    masked = [more(f"{name}:budget=28,voters=masked", f"{name}:budget=28") for name in ("des-vote", "protected-vote")]
    kept_sets = {
        name: more(f"{name},reuse=32", name) for name in ("des-seq:experts_per_vote=2", "protected-vote:budget=28")
    }
    equal = pick(
        stored("variants")["comparisons"],
        question="equal fetch",
        decoding="8 steps",
        variant="des-seq:experts_per_vote=3,reuse=32",
    )
    fetched = runs["8 steps: des-seq:experts_per_vote=3,reuse=32"]["fetched"]
    return bullets(
        f"`voters=masked`: the coreset moves more from step to step: {masked[0]:.0%} (`des-vote`) and {masked[1]:.0%} "
        "(`protected-vote`) more experts to fetch with 8 steps.".replace("%", " %"),
        f"`coverage` over the vote by score, by its `saturation`: 0.25 {by_saturation(',saturation=0.25')}, 0.6 (which "
        "was "
        f"chosen on other prompts) {by_saturation('')}, 0.75 {by_saturation(',saturation=0.75')}, 1 "
        f"{by_saturation(',saturation=1.0')}. With 1 it is a vote by affinity, without the balancing bias.",
        "`reuse=32` with 8 steps: "
        + " and ".join(f"{-share:.0%} fewer experts to fetch (`{name}`)" for name, share in kept_sets.items()).replace(
            "%", " %"
        )
        + f". At an equal number of fetched experts ({fetched:.1f} a step and layer) "
        f"`des-seq:experts_per_vote=3,reuse=32` gains {_points(equal['difference'])} over "
        "`des-seq:experts_per_vote=2`.",
    )
