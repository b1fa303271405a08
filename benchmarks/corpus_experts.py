"""How many experts a model uses over a whole corpus, beside how many a block uses: has training emptied the others?

    python benchmarks/corpus_experts.py models/reference:vanilla models/reference-distilled:vanilla \
        models/reference-distilled:block-top-p:top_p_experts=0.52,group_limit=ignore --count 60 --json out.json

Denoising forwards only. Per task and MoE layer: experts that ran at all, and the share of (token, expert) pairs that
went to the busiest K of them (K: experts per token).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.row import Row, Window
from expertshare.lab.tasks.generation import TASKS, generate_items
from expertshare.measure.cost import ForwardKind
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel, Runtime, encode_prompt, load_model
from expertshare.models.runtime import RoutingTrace
from expertshare.routing import parse_policy


class Load:
    """Adds up the pairs of every expert over denoising forwards."""

    def __init__(self) -> None:
        self.pairs_NE: Tensor | None = None

    def hear_forward(self, kind: ForwardKind, _rows: Sequence[Row], routing: RoutingTrace) -> None:
        if kind == "denoise":
            self.pairs_NE = routing.load_NE if self.pairs_NE is None else self.pairs_NE + routing.load_NE

    def hear_step(self, _rows: Sequence[Row], _window: Window, _confidence_RL: Tensor) -> None:
        pass


def usage(loaded: LoadedModel, policy: str, task: str, count: int, seed: int) -> tuple[Tensor, float]:
    """Pairs per MoE layer and expert, and unique experts per block."""
    assert loaded.tokenizer is not None
    items = generate_items(task, split="test", count=count, seed=seed)
    prompts = [encode_prompt(loaded.tokenizer, item.prompt) for item in items]
    runtime = Runtime(policy=parse_policy(policy))
    load = Load()
    stream = BlockDecoder(loaded.model, runtime, DecodingOptions(gen_length=128, threshold=0.95)).blocks(
        prompts, watcher=load
    )
    for _ in stream:
        pass
    assert load.pairs_NE is not None
    return load.pairs_NE, stream.cost().unique_experts["denoise"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="MODEL:POLICY")
    parser.add_argument("--count", default=60, type=int, help="prompts of each task")
    parser.add_argument("--seed", default=2026, type=int)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for setting in options.settings:
        model, _, policy = setting.partition(":")
        loaded = load_model(model)
        total: Tensor | None = None
        for task in TASKS:
            pairs_NE, unique = usage(loaded, policy, task, options.count, options.seed)
            total = pairs_NE if total is None else total + pairs_NE
            results.append(
                {"model": Path(model).name, "policy": policy, "task": task, "unique_per_block": unique}
                | told(pairs_NE, loaded.config.router.top_k)
            )
            print(results[-1])
        assert total is not None
        results.append(
            {"model": Path(model).name, "policy": policy, "task": "all"} | told(total, loaded.config.router.top_k)
        )
        print(results[-1])
    if options.json:
        settings = {"count": options.count, "seed": options.seed, "split": "test"}
        found = {"settings": settings, "environment": capture_environment().to_json(), "results": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def told(pairs_NE: Tensor, top_k: int) -> dict[str, Any]:
    """What is stored of the pairs."""
    share_NE = pairs_NE / pairs_NE.sum(dim=1, keepdim=True)
    used = (pairs_NE > 0).sum(dim=1).tolist()
    return {
        "experts_used_by_layer": used,
        "fewest_used": min(used),
        "most_used": max(used),
        "share_of_busiest_k_by_layer": share_NE.topk(top_k, dim=1).values.sum(dim=1).tolist(),
    }


if __name__ == "__main__":
    with torch.no_grad():
        main()
