"""The command that makes a stored result again, from what the file says of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file holds."""

    config: Values
    results: Values
    seeds: Values


def command_line(kind: str, config: Values, results: Values, seeds: Values) -> str:
    """One line for a shell. FILE and PROMPTS stand for what no result holds: names of files."""
    stored = Stored(config, results, seeds)
    return shlex.join(_COMMANDS[kind](stored)).replace("'PROMPTS.jsonl'", "PROMPTS.jsonl")


def _compare(stored: Stored) -> list[str]:
    decoding = stored.config["decoding"]
    words = ["expertshare", "compare", stored.config["model"], "--prompts", "PROMPTS.jsonl"]
    words += ["--policies", _commas(run["label"] for run in stored.results["runs"])]
    words += ["--batch-size", f"{stored.config['batch_size']}", "--gen-length", f"{decoding['gen_length']}"]
    if decoding["block_length"] != stored.config["model_facts"]["block_length"]:
        words += ["--block-length", f"{decoding['block_length']}"]
    if decoding.get("steps_per_block", decoding["block_length"]) != decoding["block_length"]:
        words += ["--steps", f"{decoding['steps_per_block']}"]
    words += ["--threshold", "none"] if decoding["threshold"] is None else _unless(decoding, "threshold", 0.95)
    words += _unless(decoding, "temperature", 0.0)
    return [*words, *_seed(stored.seeds.get("decoding", 0)), "--json"]


def _eval(stored: Stored) -> list[str]:
    words = ["expertshare", "eval", stored.config["model"], "--tasks", _commas(stored.results["tasks"])]
    words += ["--policies", _commas(stored.results["policies"])]
    limit = stored.config["config"]["limit"]
    words += ["--limit", f"{limit}"] if limit is not None else []
    words += ["--allow-code"] if stored.config["identity"].get("allow_code") else []
    return [*words, *_seed(stored.seeds.get("decoding", 0)), "--out", "RUN_DIR"]


def _tune(stored: Stored) -> list[str]:
    options = stored.results["options"]
    words = ["expertshare", "tune", stored.config.get("model", "MODEL"), "--prompts", "PROMPTS.jsonl"]
    words += ["--retain", f"{options['retain']}", "--confidence", f"{options['confidence']}"]
    words += ["--cost", stored.results["cost_kind"], "--quality", stored.results["quality"]]
    words += ["--policies", _commas(options["policies"])] if options.get("policies") else []
    for name in ("trials", "recorded_prompts", "search_share"):
        words += [f"--{name.replace('_', '-')}", f"{options[name]}"] if name in options else []
    return [*words, *_seed(options.get("seed", 0)), "--json"]


def _bench_experts(stored: Stored) -> list[str]:
    cases = stored.results["cases"]
    named = [name.partition("/") for name in stored.config["cases"]]  # "case", or "case/64-experts"
    words = ["expertshare", "bench", "experts", "--case", _commas(dict.fromkeys(name for name, _, _ in named))]
    sizes = dict.fromkeys(size.removesuffix("-experts") for _, _, size in named if size)
    words += ["--experts", _commas(sizes)] if sizes else []
    words += ["--unique", _commas(dict.fromkeys(str(case["unique"]) for case in cases))]
    tokens = list(dict.fromkeys(str(case["tokens"]) for case in cases))
    words += ["--tokens", _commas(tokens)] if len(tokens) > 1 else []
    return [*words, *_bench_rest(stored, "bfloat16")]


def _bench_forward(stored: Stored) -> list[str]:
    config = stored.config
    words = ["expertshare", "bench", "forward", "--case", config["case"], "--layers", f"{config['num_layers']}"]
    if "unique_requested" in config:
        words += ["--unique", f"{config['unique_requested'] or 0}"]
    words += ["--policies", _commas(config["policies"])]
    words += ["--masked", f"{config['masked']}"] if config.get("masked") != config.get("tokens") else []
    words += _unless(config, "context", 256)
    return [*words, *_bench_rest(stored, "bfloat16")]


def _bench_generate(stored: Stored) -> list[str]:
    config, words = stored.config, ["expertshare", "bench", "generate"]
    of_case = config["weights"] != "loaded"
    words += ["--case", config["name"], "--layers", f"{config['num_layers']}"] if of_case else [config["name"]]
    words += ["--limit", f"{config['num_prompts']}"]
    sizes = list(dict.fromkeys(str(point["batch_size"]) for point in stored.results["generations"]))
    words += ["--batch-sizes", _commas(sizes)] if sizes != ["1"] else []
    words += ["--policies", _commas(config["policies"])]
    words += [*_unless(config, "gen_length", 64), *_unless(config, "threshold", 0.95)]
    return [*words, *_bench_rest(stored, "bfloat16" if of_case else config.get("dtype"))]


def _bench_rest(stored: Stored, dtype: str | None) -> list[str]:
    """What every benchmark ends with; dtype: the one that goes without saying. A checkpoint's own is not in the file,
    so that the one of a loaded model is never said."""
    machine = stored.results.get("machine")
    device = ["--device", "cuda"] if isinstance(machine, dict) and "gpu" in machine else []
    words = [*_unless(stored.config, "dtype", dtype), *device]
    return [*words, *_seed(stored.seeds.get("bench", 0)), "--report", "FILE"]


def _unless(config: Values, name: str, default: object) -> list[str]:
    """The flag for a value that is there and not the command's default."""
    value = config.get(name, default)
    return [] if value == default else [f"--{name.replace('_', '-')}", f"{value}"]


def _script(file: str, *names: str) -> Callable[[Stored], list[str]]:
    def words(stored: Stored) -> list[str]:
        found = ["python", f"benchmarks/{file}", stored.config["model"]]
        for name in names:
            found += [f"--{name}", f"{stored.config[name]}"] if name in stored.config else []
        return [*found, "--seed", f"{stored.seeds.get('prompts', 0)}", "--json", "FILE"]

    return words


def _steps(stored: Stored) -> list[str]:
    policies = ["--policies", _commas(run["label"] for run in stored.results["runs"])]
    words = _script("steps_distribution.py", "count")(stored)
    return [*words[:-2], *policies, *words[-2:]]


def _seed(seed: int) -> list[str]:
    return ["--seed", f"{seed}"] if seed else []


def _commas(words: Iterable[str]) -> str:
    return ",".join(words)


_COMMANDS: dict[str, Callable[[Stored], list[str]]] = {
    "compare": _compare,
    "eval": _eval,
    "tune": _tune,
    "bench experts": _bench_experts,
    "bench forward": _bench_forward,
    "bench generate": _bench_generate,
    "steps-distribution": _steps,
    "weight-against-loss": _script("weight_against_loss.py", "count", "blocks"),
    "expert-growth": _script("expert_growth.py", "count", "blocks"),
}
