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
    words += ["--cost", stored.results["cost_kind"], *_seed(options.get("seed", 0))]
    return [*words, "--json"]


def _bench_experts(stored: Stored) -> list[str]:
    cases = stored.results["cases"]
    words = ["expertshare", "bench", "experts", "--case", _commas(stored.config["cases"])]
    words += ["--unique", _commas(dict.fromkeys(str(case["unique"]) for case in cases))]
    tokens = list(dict.fromkeys(str(case["tokens"]) for case in cases))
    words += ["--tokens", _commas(tokens)] if len(tokens) > 1 else []
    return [*words, "--report", "FILE"]


def _bench_forward(stored: Stored) -> list[str]:
    config = stored.config
    words = ["expertshare", "bench", "forward", "--case", config["case"], "--layers", f"{config['num_layers']}"]
    words += ["--unique", f"{config['unique_requested']}"] if config.get("unique_requested") else []
    return [*words, "--policies", _commas(config["policies"]), "--report", "FILE"]


def _bench_generate(stored: Stored) -> list[str]:
    config, words = stored.config, ["expertshare", "bench", "generate"]
    of_case = config["weights"] != "loaded"
    words += ["--case", config["name"], "--layers", f"{config['num_layers']}"] if of_case else [config["name"]]
    words += ["--limit", f"{config['num_prompts']}"]
    sizes = list(dict.fromkeys(str(point["batch_size"]) for point in stored.results["generations"]))
    words += ["--batch-sizes", _commas(sizes)] if len(sizes) > 1 else []
    return [*words, "--policies", _commas(config["policies"]), "--report", "FILE"]


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
