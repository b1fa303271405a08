"""Answers to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expertshare.api.loading import DecodingValue, Model, Policy, decoding_options, for_model, load, opened, parsed
from expertshare.evaluation.runner import Answer, BlockListener, PolicyRun, Setup, answer_prompts, encode_prompts
from expertshare.experts import StoreOptions
from expertshare.experts.recording import RoutingRecorder
from expertshare.kernels import AUTO
from expertshare.measure.cost import Cost
from expertshare.measure.memory import MemoryWatch, peak_memory_bytes
from expertshare.measure.report import Report, capture_environment, versions
from expertshare.models import LoadedModel
from expertshare.routing import policy_label, policy_record


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The answers to `prompts`, what they cost, and how they were made. peak_memory_bytes: of the process so far;
    peak_anonymous_bytes: without pages of files, None where the system does not say."""

    prompts: tuple[str, ...]
    run: PolicyRun
    config: Mapping[str, Any]
    device: torch.device
    peak_memory_bytes: int
    peak_anonymous_bytes: int | None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """One for each prompt, in order."""
        return self.run.answers

    @property
    def cost(self) -> Cost:
        """Experts by kind of forward."""
        return self.run.cost

    def to_json(self) -> dict[str, Any]:
        """One flat object. With several prompts token_ids, text and finish_reason are lists, one entry for each, and
        "results" has the same by prompt; costs and times are totals of all of them."""
        results = [
            {"prompt": p, **asdict(a), "token_ids": list(a.token_ids)}
            for p, a in zip(self.prompts, self.answers, strict=True)
        ]
        single = len(results) == 1
        answered = {
            key: results[0][key] if single else [result[key] for result in results]
            for key in ("token_ids", "text", "finish_reason")
        }
        return {
            **answered,
            **policy_record(self.run.policy),
            "label": policy_label(self.run.policy),
            **{
                name: dict(getattr(self.cost, name))
                for name in ("unique_experts", "union_experts", "expert_bytes", "pairs")
            },
            **{name: getattr(self.run, name) for name in ("steps", "forwards", "tokens_per_s", "elapsed_s")},
            "seconds_by_part": dict(self.run.seconds_by_part),
            "captured": self.run.uncaptured_because is None,
            "uncaptured_because": self.run.uncaptured_because,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_anonymous_bytes": self.peak_anonymous_bytes,
            **self.run.memory_json(),
            "seed": self.run.options.seed,
            "model": self.config["model"],
            "versions": versions(),
            **({} if single else {"results": results}),
        }

    def report(self) -> Report:
        """The whole record, with the cost of every forward."""
        return Report(
            command="generate",
            environment=capture_environment(self.device),
            seeds={"decoding": self.run.options.seed},
            config={**self.config, **policy_record(self.run.policy)},
            results={**self.to_json(), "cost": self.cost.to_json()},
        )


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    policy: Policy | None = None,
    batch_size: int = 1,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    graphs: bool = True,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_block: BlockListener | None = None,
    memory: MemoryWatch | None = None,
    record_routing: str | Path | None = None,
    **decoding: DecodingValue,
) -> Generated:
    """Answer one prompt or several under an expert-sharing policy.

    policy: `name` or `name:knob=value,...`, by default the one that the checkpoint was trained with; or a policy file
    (load_policy). device: cpu (the default) or cuda. graphs: on a GPU steps may be captured and replayed (docs/gpu.md).
    chat: None uses the chat template where there is one. store: how the experts of a converted model
    are kept, as StoreOptions or as the memory for them ("3GiB", "mmap"), by default "all". on_block hears of every
    block as it is committed. memory: a watch that runs already. record_routing: a file for the experts of every token
    of every forward, which `plan` and `simulate` can replay. decoding: the fields of DecodingOptions, e.g.
    gen_length=64, threshold=0.9.

    Raises a subclass of ExpertShareError for anything unusable.
    """
    options = decoding_options(decoding)
    wanted = parsed(policy)
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    with memory or MemoryWatch() as watch:
        loaded = load(model, dtype=dtype, store=store, device=device)
        ids = encode_prompts(loaded, texts, chat)
        bound = for_model(wanted, loaded)
        with (
            _recorder(record_routing, loaded) as recorder,
            opened(loaded, store, Setup(batch_size=batch_size, backend=backend, chat=chat, graphs=graphs)) as setup,
        ):
            setup = replace(setup, recorder=recorder)
            run = answer_prompts(loaded, ids, bound, options, setup=setup, on_block=on_block)
    return Generated(
        prompts=texts,
        run=run,
        config=setup.to_json(loaded, options),
        device=loaded.model.device,
        peak_memory_bytes=peak_memory_bytes(loaded.model.device),
        peak_anonymous_bytes=watch.peak_anonymous_bytes,
    )


def _recorder(path: str | Path | None, loaded: LoadedModel) -> AbstractContextManager[RoutingRecorder | None]:
    if path is None:
        return nullcontext()
    config = loaded.config
    return RoutingRecorder(Path(path), num_layers=config.num_moe_layers, num_experts=config.router.num_experts)
