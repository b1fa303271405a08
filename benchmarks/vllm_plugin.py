"""The vLLM plug-in inside a real vLLM on the CPU: a tiny random Qwen3-MoE, with and without a policy.

    python benchmarks/vllm_plugin.py        # in an environment with vLLM's CPU build and this package

Three processes answer the same prompts greedily: without a policy, with a coreset of all experts (the answers must be
the same), and with a coreset of 8 for the whole batch, in which the experts of every routed batch are counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXPERTS, TOP_K, BUDGET, PROMPTS = 32, 4, 8, 12
SETTINGS = {"none": None, "all experts": "des-vote:budget=1.0", "coreset": f"des-vote:budget={BUDGET}"}


def make_model(folder: Path) -> None:
    """Two layers of random weights, large enough to be sure of their tokens."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(folder)


def answer(folder: str) -> None:
    """One process: prints a JSON line with the answers and, per routed batch, its tokens and experts."""
    from vllm import LLM, SamplingParams

    from expertshare.integrations import engine_routing

    batches: list[tuple[int, int]] = []
    plain = engine_routing.route_batch

    def noted(*arguments: Any, **named: Any) -> Any:
        weights, ids = plain(*arguments, **named)
        batches.append((len(ids), len(ids.unique())))
        return weights, ids

    engine_routing.route_batch = noted
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=PROMPTS,
        enforce_eager=os.environ.get("EAGER", "0") == "1",
        kv_cache_memory_bytes=64 * 2**20,
    )
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 500 + 1 for j in range(8)]} for i in range(PROMPTS)]
    batches.clear()
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, detokenize=False), use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    print("ANSWER " + json.dumps({"tokens": tokens, "batches": batches}))


def run(folder: str, policy: str | None) -> dict[str, Any]:
    """What a fresh process says under a policy."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "EXPERTSHARE_BLOCK_LENGTH": "batch"}
    environment.pop("EXPERTSHARE_POLICY", None)
    if policy is not None:
        environment["EXPERTSHARE_POLICY"] = policy
    done = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not lines:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    values: dict[str, Any] = json.loads(lines[-1].removeprefix("ANSWER "))
    return values


def main() -> None:
    """Compare the three."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        found = {name: run(folder, policy) for name, policy in SETTINGS.items()}
    for name, values in found.items():
        counts = [experts for _, experts in values["batches"]]
        print(f"{name}: {len(counts)} batches routed by the plug-in, at most {max(counts, default=0)} experts in one")
    assert not found["none"]["batches"]
    assert found["all experts"]["tokens"] == found["none"]["tokens"]
    assert found["coreset"]["batches"]
    assert max(experts for _, experts in found["coreset"]["batches"]) <= BUDGET
    print("the same answers with all experts; no batch with more than its coreset")


if __name__ == "__main__":
    answer(sys.argv[1]) if len(sys.argv) > 1 else main()
