"""What quantisation costs a model in quality: KL and argmax against bfloat16 on its own trajectories, and accuracy.

The model is converted once per scheme into a temporary directory. Distributions: bfloat16 decodes unseen items of every
task; at --states of its denoising steps, drawn by seed, each scheme sees the very same tokens (teacher forced, without
a cache), and the distributions over the vocabulary at the masked positions of the current block are compared. Accuracy:
each scheme answers all items by itself; differences are paired with bfloat16's answers. The backend is our kernel where
it was built.

Example: python benchmarks/quantisation_quality.py models/reference --count 100 --json out.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertshare.api import generate, load
from expertshare.convert.convert import small_files
from expertshare.convert.source import open_checkpoint, read_checkpoint
from expertshare.convert.storage import slab_format
from expertshare.convert.workspace import open_workspace
from expertshare.convert.writing import write_expert_layout
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.forwards import block_causal_mask
from expertshare.decoding.row import Row, Window
from expertshare.evaluation.runner import encode_prompts
from expertshare.evaluation.scoring import score_many
from expertshare.evaluation.statistics import paired_difference, proportion
from expertshare.experts import ExpertMemory, StoreOptions, open_store
from expertshare.kernels import AUTO, choose_backend
from expertshare.lab.tasks.generation import TASKS, generate_items
from expertshare.lab.tasks.types import TaskItem
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel, Runtime
from expertshare.models.runtime import ForwardInput
from expertshare.routing import parse_policy

GEN_LENGTH, BATCH = 64, 64
SHARED = "des-vote:budget=28"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way of storing and routing. scheme: None for the checkpoint itself."""

    label: str
    scheme: str | None = None
    minima: bool = False
    embeddings: str = "none"
    policy: str = "vanilla"


VARIANTS = (
    Variant(label="bf16"),
    Variant(label="int8", scheme="int8"),
    Variant(label="int4", scheme="int4"),
    Variant(label="int4 with minima", scheme="int4", minima=True),
    Variant(label="int8 + int8 embeddings", scheme="int8", embeddings="int8"),
    Variant(label="int4 + int8 embeddings", scheme="int4", embeddings="int8"),
    Variant(label=f"bf16, {SHARED}", policy=SHARED),
    Variant(label=f"int4, {SHARED}", scheme="int4", policy=SHARED),
)


@dataclass(frozen=True, slots=True)
class State:
    """A denoising step: tokens of all blocks up to the current one, and which of the current one are masked."""

    tokens_S: Tensor
    masked_L: Tensor


def convert(source: str, out: Path, variant: Variant) -> Path:
    """As `expertshare convert`, which has no minima to choose."""
    checkpoint = read_checkpoint(Path(source))
    assert variant.scheme is not None
    form = slab_format(checkpoint.config, variant.scheme, expert_dtype=checkpoint.expert_dtype)
    if variant.minima:
        form = replace(form, has_minima=True)
    with open_checkpoint(checkpoint) as reader, open_workspace(out, {"variant": variant.label}) as work:
        write_expert_layout(
            reader,
            work,
            form,
            files=small_files(Path(source)),
            provenance={"kind": "checkpoint"},
            embeddings=variant.embeddings,
        )
    return out


def trajectories(loaded: LoadedModel, items: Sequence[TaskItem]) -> Iterator[State]:
    """Every denoising step of the model's own answers."""
    prompts = encode_prompts(loaded, [item.prompt for item in items], None)
    runtime = Runtime(policy=parse_policy("vanilla"), backend=choose_backend(AUTO, loaded.model.device))
    states: list[State] = []
    for start in range(0, len(prompts), BATCH):
        decoder = BlockDecoder(loaded.model, runtime, DecodingOptions(gen_length=GEN_LENGTH))
        stream = decoder.blocks(prompts[start : start + BATCH])
        denoise = stream.forwards.denoise

        def spy(rows: Sequence[Row], window: Window, denoise: Any = denoise) -> Tensor:
            for row, masked_L in zip(rows, window.masked_RL, strict=True):
                states.append(State(row.tokens_C[: row.end].clone(), masked_L))
            hidden_RLD: Tensor = denoise(rows, window)
            return hidden_RLD

        stream.forwards.denoise = spy  # type: ignore[method-assign]
        for _ in stream:
            yield from states
            states.clear()
    yield from states


@torch.no_grad()
def log_probabilities(loaded: LoadedModel, variant: Variant, states: Sequence[State]) -> list[Tensor]:
    """Of each state, float32 [masked positions, V]; the mask is never proposed."""
    config, found = loaded.config, []
    with ExitStack() as stack:
        store = None
        if loaded.layout is not None:
            options = StoreOptions(memory=ExpertMemory(kind="all"))
            store = stack.enter_context(open_store(loaded.path, loaded.layout, options))
        runtime = Runtime(
            policy=parse_policy(variant.policy).bind(config.router),
            backend=choose_backend(AUTO, loaded.model.device),
            store=store,
        )
        for state in states:
            tokens_BS = state.tokens_S.unsqueeze(0)
            live_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
            inputs = ForwardInput(
                tokens_BS=tokens_BS,
                positions_BS=torch.arange(tokens_BS.shape[1]).unsqueeze(0),
                live_BS=live_BS,
                mask_BSP=block_causal_mask(live_BS, len(state.masked_L)),
                block_length=len(state.masked_L),
            )
            hidden_LD = loaded.model(inputs, runtime).hidden_BSD[0, -len(state.masked_L) :]
            logits_CV = loaded.model.logits(hidden_LD[state.masked_L], backend=runtime.backend).float()
            logits_CV[:, config.mask_id] = float("-inf")
            found.append(logits_CV.log_softmax(dim=-1))
    return found


def divergence(own: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """KL(reference || own) in nats a masked position, and the share of positions with the same best token."""
    mine_CV, theirs_CV = torch.cat(list(own)), torch.cat(list(reference))
    terms_CV = theirs_CV.exp() * (theirs_CV - mine_CV)
    kl_C = terms_CV.masked_fill(theirs_CV.isneginf(), 0.0).sum(dim=1)
    same_C = mine_CV.argmax(dim=1) == theirs_CV.argmax(dim=1)
    return {
        "kl_mean": float(kl_C.mean()),
        "kl_median": float(kl_C.median()),
        "kl_p99": float(kl_C.quantile(0.99)),
        "argmax_agreement": float(same_C.float().mean()),
        "positions": len(kl_C),
    }


def measure(model: str, count: int, seed: int, num_states: int) -> dict[str, Any]:
    """All variants, one after the other."""
    items = [item for task in TASKS for item in generate_items(task, split="test", count=count, seed=seed)]
    original = load(model, dtype="bfloat16")
    every = list(trajectories(original, items))
    states = random.Random(seed).sample(every, min(num_states, len(every)))
    rights: dict[str, list[bool]] = {}
    distributions: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for number, variant in enumerate(VARIANTS):
            loaded = original
            if variant.scheme is not None:
                loaded = load(convert(model, Path(directory) / str(number), variant), dtype="bfloat16")
            prompts = [item.prompt for item in items]
            made = generate(loaded, prompts, policy=variant.policy, gen_length=GEN_LENGTH, batch_size=BATCH)
            outcomes = score_many(items, [answer.text for answer in made.answers])
            distributions[variant.label] = log_probabilities(loaded, variant, states)
            rights[variant.label] = list(outcomes)
            rows.append(_row(variant, items, rights, distributions, made.cost.unique_experts["denoise"]))
            print(line(rows[-1]), flush=True)
    drawn = {"states": len(states), "states_in_all": len(every)}
    return {"model": model, "count": count, "seed": seed, **drawn, "rows": rows}


def _row(
    variant: Variant,
    items: Sequence[TaskItem],
    rights: dict[str, list[bool]],
    distributions: dict[str, list[Tensor]],
    unique: float,
) -> dict[str, Any]:
    own = rights[variant.label]
    row: dict[str, Any] = {
        **asdict(variant),
        "unique_experts": unique,
        "accuracy": asdict(proportion(own)),
        "by_task": {
            task: asdict(proportion([right for right, item in zip(own, items, strict=True) if item.task == task]))
            for task in TASKS
        },
        "against_bf16": divergence(distributions[variant.label], distributions["bf16"]),
        "difference": asdict(paired_difference(own, rights["bf16"])),
    }
    same_policy = f"bf16, {variant.policy}"
    if variant.policy != "vanilla" and variant.label != same_policy:
        row["against_same_policy"] = divergence(distributions[variant.label], distributions[same_policy])
        row["difference_to_same_policy"] = asdict(paired_difference(own, rights[same_policy]))
    return row


def line(row: dict[str, Any]) -> str:
    """One row of a Markdown table."""
    told, difference, accuracy = row["against_bf16"], row["difference"], row["accuracy"]
    change = f"{100 * difference['value']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
    return (
        f"| {row['label']} | {told['kl_mean']:.4f} | {told['kl_p99']:.3f} | {100 * told['argmax_agreement']:.2f} | "
        f"{100 * accuracy['successes'] / accuracy['count']:.1f} | {change} |"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=100, help="items per task")
    parser.add_argument("--states", type=int, default=1500, help="denoising steps whose distributions are compared")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    print("| scheme | KL, mean | KL, 99 % | same best token, % | accuracy, % | difference, points (95 %) |")
    print("|---|--:|--:|--:|--:|--:|")
    result = measure(arguments.model, arguments.count, arguments.seed, arguments.states)
    if arguments.json is not None:
        result["environment"] = capture_environment().to_json()
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
