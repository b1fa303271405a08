"""The command that makes a stored result again, from what the file says of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Values = Mapping[str, Any]


def command_line(kind: str, config: Values, results: Values, seeds: Values) -> str:
    """One line for a shell. FILE and PROMPTS stand for what no result holds: names of files."""
    return shlex.join(_COMMANDS[kind](config, results, seeds)).replace("'PROMPTS.jsonl'", "PROMPTS.jsonl")


def _compare(config: Values, results: Values, seeds: Values) -> list[str]:
    decoding = config["decoding"]
    words = ["expertshare", "compare", config["model"], "--prompts", "PROMPTS.jsonl"]
    words += ["--policies", _commas(run["label"] for run in results["runs"])]
    words += ["--batch-size", f"{config['batch_size']}", "--gen-length", f"{decoding['gen_length']}"]
    if decoding["block_length"] != config["model_facts"]["block_length"]:
        words += ["--block-length", f"{decoding['block_length']}"]
    if decoding.get("steps_per_block", decoding["block_length"]) != decoding["block_length"]:
        words += ["--steps", f"{decoding['steps_per_block']}"]
    words += ["--threshold", "none"] if decoding["threshold"] is None else _unless(decoding, "threshold", 0.95)
    return [*words, *_unless(decoding, "temperature", 0.0), *_seed(seeds.get("decoding", 0)), "--json"]


def _eval(config: Values, results: Values, seeds: Values) -> list[str]:
    words = ["expertshare", "eval", config["model"], "--tasks", _commas(results["tasks"])]
    words += ["--policies", _commas(results["policies"]), *_unless(config["config"], "limit", None)]
    words += ["--allow-code"] if config["identity"].get("allow_code") else []
    return [*words, *_seed(seeds.get("decoding", 0)), "--out", "RUN_DIR"]


def _tune(config: Values, results: Values, seeds: Values) -> list[str]:
    del seeds  # the options have it
    options = results["options"]
    words = ["expertshare", "tune", config.get("model", "MODEL"), "--prompts", "PROMPTS.jsonl"]
    words += ["--retain", f"{options['retain']}", "--confidence", f"{options['confidence']}"]
    words += ["--cost", results["cost_kind"], "--quality", results["quality"]]
    words += ["--policies", _commas(options["policies"])] if options.get("policies") else []
    for name in ("trials", "recorded_prompts", "search_share"):
        words += _unless(options, name, None)
    return [*words, *_seed(options.get("seed", 0)), "--json"]


def _bench_experts(config: Values, results: Values, seeds: Values) -> list[str]:
    cases = results["cases"]
    named = [name.partition("/") for name in config["cases"]]  # "case", or "case/64-experts"
    words = ["expertshare", "bench", "experts", "--case", _commas(dict.fromkeys(name for name, _, _ in named))]
    sizes = dict.fromkeys(size.removesuffix("-experts") for _, _, size in named if size)
    words += ["--experts", _commas(sizes)] if sizes else []
    words += ["--unique", _commas(dict.fromkeys(str(case["unique"]) for case in cases))]
    tokens = list(dict.fromkeys(str(case["tokens"]) for case in cases))
    words += ["--tokens", _commas(tokens)] if len(tokens) > 1 else []
    return [*words, *_bench_rest(config, results, seeds, "bfloat16")]


def _bench_forward(config: Values, results: Values, seeds: Values) -> list[str]:
    words = ["expertshare", "bench", "forward", "--case", config["case"], "--layers", f"{config['num_layers']}"]
    if "unique_requested" in config:
        words += ["--unique", f"{config['unique_requested'] or 0}"]
    words += ["--policies", _commas(config["policies"])]
    words += ["--masked", f"{config['masked']}"] if config.get("masked") != config.get("tokens") else []
    return [*words, *_unless(config, "context", 256), *_bench_rest(config, results, seeds, "bfloat16")]


def _bench_generate(config: Values, results: Values, seeds: Values) -> list[str]:
    of_case, words = config["weights"] != "loaded", ["expertshare", "bench", "generate"]
    words += ["--case", config["name"], "--layers", f"{config['num_layers']}"] if of_case else [config["name"]]
    words += ["--limit", f"{config['num_prompts']}"]
    sizes = list(dict.fromkeys(str(point["batch_size"]) for point in results["generations"]))
    words += ["--batch-sizes", _commas(sizes)] if sizes != ["1"] else []
    words += ["--policies", _commas(config["policies"])]
    words += [*_unless(config, "gen_length", 64), *_unless(config, "threshold", 0.95)]
    return [*words, *_bench_rest(config, results, seeds, "bfloat16" if of_case else config.get("dtype"))]


def _bench_rest(config: Values, results: Values, seeds: Values, dtype: str | None) -> list[str]:
    """What every benchmark ends with; dtype: the default. A checkpoint's own is not in the file, so that of a loaded
    model is never said."""
    machine = results.get("machine")
    device = ["--device", "cuda"] if isinstance(machine, dict) and "gpu" in machine else []
    return [*_unless(config, "dtype", dtype), *device, *_seed(seeds.get("bench", 0)), "--report", "FILE"]


def _script(file: str, *names: str, policies: bool = False) -> Callable[[Values, Values, Values], list[str]]:
    """A script of benchmarks/ with the named settings, and the labels of its runs as --policies."""

    def words(config: Values, results: Values, seeds: Values) -> list[str]:
        found = ["python", f"benchmarks/{file}", config["model"]]
        for name in names:
            found += _unless(config, name, None)
        found += ["--seed", f"{seeds.get('prompts', 0)}"]
        found += ["--policies", _commas(run["label"] for run in results["runs"])] if policies else []
        return [*found, "--json", "FILE"]

    return words


def _unless(config: Values, name: str, default: object) -> list[str]:
    """The flag for a value that is there and not the command's default."""
    value = config.get(name, default)
    return [] if value == default else [f"--{name.replace('_', '-')}", f"{value}"]


def _seed(seed: int) -> list[str]:
    return ["--seed", f"{seed}"] if seed else []


def _commas(words: Iterable[str]) -> str:
    return ",".join(words)


_COMMANDS: dict[str, Callable[[Values, Values, Values], list[str]]] = {
    "compare": _compare,
    "eval": _eval,
    "tune": _tune,
    "bench experts": _bench_experts,
    "bench forward": _bench_forward,
    "bench generate": _bench_generate,
    "steps-distribution": _script("steps_distribution.py", "count", policies=True),
    "weight-against-loss": _script("weight_against_loss.py", "count", "blocks"),
    "expert-growth": _script("expert_growth.py", "count", "blocks"),
}
