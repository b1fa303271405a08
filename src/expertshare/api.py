"""expertshare from Python: the same verbs as the command line, with values instead of tables.

Example:

    from expertshare.api import compare, generate, info, load
    from expertshare.tasks import read_prompts

    model = load("path/to/model")                     # a directory in Hugging Face layout, or a hub id
    print(info(model).router_rule, info(model).min_coreset_inside)

    result = generate(model, "What is 7 plus 8?", policy="des-vote:budget=16", gen_length=64)
    print(result.answers[0].text, result.cost.unique_experts["denoise"])

    comparison = compare(model, read_prompts("prompts.jsonl"), ["vanilla", "des-vote:budget=16", "des-seq"])
    for run in comparison.runs:
        print(run.label, run.reduction, run.agreement.tokens, run.accuracy.overall)

    evaluation = evaluate(model, ["arith", "math"], ["des-vote:budget=28"], out="runs/vote", limit=50)
    print(evaluation.results["summary"])
    tuned = tune(model, read_prompts("prompts.jsonl"))
    print(tuned.sentence())
    tuned.policy_file().write("policy.json")          # generate(model, ..., policy=load_policy("policy.json"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from expertshare.conversion.fits import check_fits
from expertshare.decoding import DecodingOptions
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.evaluation import (
    Answer,
    Comparison,
    Evaluation,
    EvaluationSettings,
    PolicyRun,
    Setup,
    SourceOptions,
    answer_prompts,
    check_task_names,
    compare_policies,
    encode_prompts,
    evaluate_sources,
    find_preset,
    harness_version,
    make_sources,
    parse_policies,
    policy_label,
)
from expertshare.evaluation.answering import BlockListener
from expertshare.evaluation.comparison import ProgressListener
from expertshare.evaluation.evaluating import NoticeListener
from expertshare.experts import ExpertMemory, StoreOptions, has_expert_layout, open_store
from expertshare.experts.recording import RoutingRecorder
from expertshare.kernels import AUTO
from expertshare.measure.cost import Cost
from expertshare.measure.environment import capture_environment, peak_memory_bytes, versions
from expertshare.measure.memory import MemoryWatch
from expertshare.measure.report import Report
from expertshare.models import LoadedModel, ModelFacts, describe, load_model
from expertshare.models.source import resolve_source
from expertshare.routing import POLICIES, knobs, native_policy, parse_policy
from expertshare.tasks import PromptRecord
from expertshare.tuning import PolicyFile, Tuned, TuningOptions, check_model, read_policy_file
from expertshare.tuning import tune as run_tuning
from expertshare.types import RoutingPolicy

Model = str | Path | LoadedModel
DecodingValue = int | float | str | bool | None
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        results = [self._answer_json(prompt, answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        single = len(results) == 1
        return {
            **{
                key: results[0][key] if single else [result[key] for result in results]
                for key in ("token_ids", "text", "finish_reason")
            },
            "policy": self.run.policy.name,
            "label": policy_label(self.run.policy),
            "knobs": knobs(self.run.policy),
            "unique_experts": dict(self.cost.unique_experts),
            "union_experts": dict(self.cost.union_experts),
            "expert_bytes": dict(self.cost.expert_bytes),
            "pairs": dict(self.cost.pairs),
            "steps": self.run.steps,
            "forwards": self.run.forwards,
            "tokens_per_s": self.run.tokens_per_s,
            "elapsed_s": self.run.elapsed_s,
            "seconds_by_part": dict(self.run.seconds_by_part),
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_anonymous_bytes": self.peak_anonymous_bytes,
            **self.run.memory_json(),
            "seed": self.run.options.seed,
            "model": self.config["model"],
            "versions": versions(),
            **({} if single else {"results": results}),
        }

    @staticmethod
    def _answer_json(prompt: str, answer: Answer) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "token_ids": list(answer.token_ids),
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "steps": answer.steps,
            "forwards": answer.forwards,
        }

    def report(self) -> Report:
        """The whole record, with the cost of every forward."""
        return Report(
            command="generate",
            environment=capture_environment(self.device),
            seeds={"decoding": self.run.options.seed},
            config={**self.config, "policy": self.run.policy.name, "knobs": knobs(self.run.policy)},
            results={**self.to_json(), "cost": self.cost.to_json()},
        )


def load(
    model: Model, *, dtype: str | torch.dtype | None = None, store: str | StoreOptions | None = None
) -> LoadedModel:
    """A model from a directory or hub id; one that is loaded is passed through. dtype: by default the checkpoint's.

    store: how its experts will be kept; a model that `expertshare convert` did not write is then refused. So is, before
    its weights are read, a model that does not fit into memory; experts in a store count if it is said which.
    """
    if isinstance(model, LoadedModel):
        return model
    path = resolve_source(model)
    if store is not None and not has_expert_layout(path):
        raise _not_converted(model)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}. {nearest(dtype, DTYPES)}")
        dtype = DTYPES[dtype]
    check_fits(path, _store_options(store).memory if store is not None else None, dtype=dtype)
    return load_model(model, dtype=dtype)


def info(model: Model) -> ModelFacts:
    """Architecture, router rule, bytes per expert, smallest coreset."""
    return describe(load(model))


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    policy: str | RoutingPolicy | PolicyFile | None = None,
    batch_size: int = 1,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_block: BlockListener | None = None,
    memory: MemoryWatch | None = None,
    record_routing: str | Path | None = None,
    **decoding: DecodingValue,
) -> Generated:
    """Answer one prompt or several under an expert-sharing policy.

    policy: `name` or `name:knob=value,...`, by default the one that the checkpoint was trained with; or a policy file
    (load_policy). chat: None uses the chat template where there is one. store: how the experts of a converted model
    are kept, as StoreOptions or as the memory for them ("3GiB", "mmap"), by default "all". on_block hears of every
    block as it is committed. memory: a watch that runs already. record_routing: a file for the experts of every
    forward, which `plan` can replay. decoding: the fields of DecodingOptions, e.g. gen_length=64, threshold=0.9.

    Raises a subclass of ExpertShareError for anything unusable.
    """
    options = decoding_options(decoding)
    wanted = parse_policy(policy) if isinstance(policy, str) else policy
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    with memory or MemoryWatch() as watch:
        loaded = load(model, dtype=dtype, store=store)
        ids = encode_prompts(loaded, texts, chat)
        bound = _for_model(wanted, loaded) if wanted is not None else native_policy(loaded.config)
        with (
            RoutingRecorder(Path(record_routing)) if record_routing is not None else nullcontext() as recorder,
            _opened(loaded, store, Setup(batch_size=batch_size, backend=backend, chat=chat)) as setup,
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


def compare(
    model: Model,
    records: Sequence[PromptRecord | str],
    policies: Sequence[str | RoutingPolicy | PolicyFile] | None = None,
    *,
    batch_size: int = 1,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_progress: ProgressListener | None = None,
    memory: MemoryWatch | None = None,
    **decoding: DecodingValue,
) -> Comparison:
    """Answer the same prompts under several policies and compare each with vanilla, which is always run.

    policies: by default all of them, with their default knobs. Prompts with a reference or tests are judged; code that
    the model wrote for the code tasks is then run, in the sandbox of expertshare.tasks. on_progress(label, done, total)
    hears of every finished prompt. store, memory: as for generate. Raises a subclass of ExpertShareError for anything
    unusable.
    """
    options = decoding_options(decoding)
    chosen = [
        policy
        for given in (policies if policies is not None else list(POLICIES))
        for policy in (parse_policies([given]) if isinstance(given, str) else [given])
    ]
    prompts = [PromptRecord(prompt=record) if isinstance(record, str) else record for record in records]
    with memory or MemoryWatch() as watch:
        loaded = load(model, dtype=dtype, store=store)
        bound = [_for_model(policy, loaded) for policy in chosen]
        with _opened(loaded, store, Setup(batch_size=batch_size, backend=backend, chat=chat)) as setup:
            return compare_policies(
                loaded, prompts, bound, options, setup=setup, on_progress=on_progress, memory=watch
            )


def tune(
    model: Model,
    records: Sequence[PromptRecord | str],
    *,
    tuning: TuningOptions | None = None,
    batch_size: int = 16,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    on_progress: ProgressListener | None = None,
    **decoding: DecodingValue,
) -> Tuned:
    """The cheapest policy that is certified to keep a share of vanilla's quality on prompts like these.

    tuning: the promise and the work to spend on it. `.policy_file().write(path)` keeps the outcome. on_progress(stage,
    done, total). Raises a subclass of ExpertShareError for anything unusable.
    """
    options = decoding_options(decoding)
    prompts = [PromptRecord(prompt=record) if isinstance(record, str) else record for record in records]
    wanted = tuning if tuning is not None else TuningOptions()
    loaded = load(model, dtype=dtype, store=store)
    with _opened(loaded, store, Setup(batch_size=batch_size, backend=backend, chat=chat)) as setup:
        return run_tuning(loaded, prompts, options, wanted, setup=setup, on_progress=on_progress)


def load_policy(path: str | Path) -> PolicyFile:
    """A policy file of `tune`. The verbs refuse it with any other model. Raises InputError, PolicyError."""
    return read_policy_file(path)


def _for_model(policy: RoutingPolicy | PolicyFile, loaded: LoadedModel) -> RoutingPolicy:
    if not isinstance(policy, PolicyFile):
        return policy
    check_model(policy, loaded)
    return policy.policy


@contextmanager
def _opened(loaded: LoadedModel, wanted: str | StoreOptions | None, setup: Setup) -> Iterator[Setup]:
    """The setup with an open store, where the model is a converted one."""
    if loaded.layout is None:
        if wanted is not None:
            raise _not_converted(loaded.path)
        yield setup
        return
    if loaded.model.device.type != "cpu":
        raise ConfigError(f"expected a model on the CPU, whose memory expert stores lend, got {loaded.model.device}")
    options = _store_options(wanted)
    check_fits(loaded.path, options.memory, dense_is_loaded=True)
    with open_store(loaded.path, loaded.layout, options) as store:
        yield replace(setup, store=store, store_options=options)


def _store_options(wanted: str | StoreOptions | None) -> StoreOptions:
    return wanted if isinstance(wanted, StoreOptions) else StoreOptions(memory=ExpertMemory.parse(wanted or "all"))


def _not_converted(model: str | Path) -> ConfigError:
    return ConfigError(
        f"expected a model in the expert layout, because an expert store was asked for, got {model}: run `expertshare "
        "convert` first, or leave out --expert-memory, --direct-io and --no-prefetch"
    )


def evaluate(
    model: Model,
    tasks: Sequence[str],
    policies: Sequence[str | RoutingPolicy | PolicyFile],
    *,
    out: str | Path,
    preset: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    data: str | Path | None = None,
    allow_code: bool = False,
    processes: int = 1,
    threads: int = 1,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    on_progress: ProgressListener | None = None,
    on_notice: NoticeListener | None = None,
    **decoding: DecodingValue,
) -> Evaluation:
    """Accuracy and cost of policies on tasks, a line per answer in the directory `out`, which a second call completes.

    tasks: generated kinds (arith, math, ...) and benchmarks (gsm8k, ...; these need expertshare[eval]). preset:
    settings of a paper; what is given here goes before it. seed: of items, examples and sampling. threads: of each
    process. See docs/evaluation.md. Raises a subclass of ExpertShareError for anything unusable.
    """
    chosen = find_preset(preset) if preset is not None else None
    check_task_names(tasks)
    wanted = [p for given in policies for p in (parse_policies([given]) if isinstance(given, str) else [given])]
    merged = {**(chosen.decoding if chosen else {}), **decoding, "seed": seed}
    sources = SourceOptions(
        limit=limit,
        seed=seed,
        gen_length=merged.get("gen_length"),  # type: ignore[arg-type]
        shots=shots if shots is not None or chosen is None else chosen.shots,
        data=Path(data) if data is not None else None,
        chat=chat if chat is not None or chosen is None else chosen.chat,
        allow_code=allow_code,
    )
    loaded = load(model, dtype=dtype)
    if loaded.layout is not None:
        raise ConfigError(
            f"expected a checkpoint in Hugging Face layout, got {loaded.path} in the expert layout, which `eval` "
            "cannot run yet: name the checkpoint that it was converted from, or convert it back"
        )
    settings = EvaluationSettings(
        options=decoding_options(merged),
        setup=Setup(backend=backend, chat=sources.chat),
        dtype=loaded.model.dtype,
        processes=processes,
        threads=threads,
        identity={"allow_code": allow_code, "harness": harness_version(tasks)},
        config={"preset": chosen.to_json() if chosen else None, "limit": limit, "shots": sources.shots},
    )
    chosen_policies = [_for_model(policy, loaded) for policy in wanted]
    made = make_sources(tasks, sources, loaded)
    return evaluate_sources(
        loaded, made, chosen_policies, settings, Path(out), on_progress=on_progress, on_notice=on_notice
    )


def comparison_report(comparison: Comparison, device: torch.device | None = None) -> Report:
    """The whole record, with every answer."""
    decoding = comparison.config["decoding"]
    return Report(
        command="compare",
        environment=capture_environment(device),
        seeds={"decoding": decoding["seed"]},
        config=comparison.config,
        results=comparison.to_json(answers=True),
    )


def decoding_options(values: Mapping[str, DecodingValue]) -> DecodingOptions:
    """DecodingOptions from names and values; InputError for a name that is none of its fields."""
    known = [field.name for field in fields(DecodingOptions)]
    for name in values:
        if name not in known:
            raise InputError(f"unknown decoding option {name!r}. {nearest(name, known)}")
    return DecodingOptions(**values)  # type: ignore[arg-type]
