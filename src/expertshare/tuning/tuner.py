"""The tuner: search on one part of the prompts, certify on the other, promise no more than that supports."""

from __future__ import annotations

from collections.abc import Sequence

from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError
from expertshare.evaluation.comparison import PolicyRunner
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import ProgressListener, Setup, encode_prompts, own_policy
from expertshare.evaluation.statistics import PairedCounts
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel
from expertshare.routing import RoutingPolicy
from expertshare.tuning.certificate import chance_to_pass, p_value
from expertshare.tuning.options import Judged, TuningOptions, resolve_quality, split_prompts
from expertshare.tuning.policy_file import model_facts, prompts_fingerprint
from expertshare.tuning.replay import Point, Replay
from expertshare.tuning.results import Tuned, Verified, verify, with_latency
from expertshare.tuning.search import (
    around,
    best_chain,
    check_optuna,
    dials,
    find_edge,
    fronts_by_policy,
    pareto_front,
    search,
    thin_front,
)
from expertshare.tuning.trajectories import record_trajectories, thin_out

# Steps that are replayed of one prompt, at most.
_STEPS_PER_PROMPT = 8


def tune(
    loaded: LoadedModel,
    records: Sequence[PromptRecord],
    decoding: DecodingOptions,
    options: TuningOptions,
    *,
    setup: Setup,
    on_progress: ProgressListener | None = None,
) -> Tuned:
    """The cheapest policy that is certified to keep the promised share of vanilla's quality.

    Where none is, the safest that was tested, marked as not certified. on_progress(stage, done, total). Everything that
    can be refused is refused before the first forward. Raises InputError, PolicyError, NumericsError or SandboxError.
    """
    check_optuna()
    facts, choices = model_facts(loaded), dials(options.policies, loaded.config.router)
    quality = resolve_quality(records, options.quality)
    parts = split_prompts(records, search_share=options.search_share, seed=options.seed)
    encode_prompts(loaded, [record.prompt for record in records], setup.chat)  # errors count all prompts, not a part's
    searched, certified = (
        PolicyRunner(loaded, part, decoding, setup, _named(on_progress, name))
        for name, part in zip(("search", "certify"), parts, strict=True)
    )
    replay = _record(searched, options.recorded_prompts)
    points = search(replay, choices, trials=options.trials, seed=options.seed, on_progress=on_progress)
    front = thin_front(_worth_it(pareto_front(points), replay))
    tried: dict[RoutingPolicy, Verified] = {}

    def try_out(point: Point) -> PairedCounts:
        if point.policy not in tried:
            tried[point.policy] = verify(searched, point.policy, quality)
        return tried[point.policy].counts

    aim = {"retain": options.retain, "confidence": options.confidence}
    prompts = len(certified.records)

    def chance(point: Point) -> float:
        return chance_to_pass(try_out(point), **aim, prompts=prompts)

    fronts = [front, *(thin_front(own) for own in fronts_by_policy(points, front))]
    chain = best_chain([point for own in fronts for point in around(own, find_edge(own, chance))], chance)
    tested, passed = _certify(certified, chain, options, quality)
    vanilla = verify(certified, own_policy(loaded), quality)
    if options.cost == "latency":
        vanilla, *tested = with_latency(certified, [vanilla, *tested])
    return Tuned(
        options=options,
        quality=quality,
        vanilla=vanilla,
        tested=tuple(tested),
        num_passed=passed,
        tried=tuple(tried.values()),
        front=tuple(front),
        num_points=len(points),
        num_search=len(searched.records),
        num_certify=len(certified.records),
        model=facts,
        prompts=prompts_fingerprint(records),
        config=setup.to_json(loaded, decoding),
        environment=capture_environment(loaded.model.device),
    )


def _named(listener: ProgressListener | None, part: str) -> ProgressListener | None:
    if listener is None:
        return None
    return lambda label, done, total: listener(f"{part}: {label}", done, total)


def _record(runner: PolicyRunner, num_prompts: int) -> Replay:
    """Vanilla's steps on the first prompts, ready to be replayed."""
    loaded, setup = runner.loaded, runner.setup
    found = record_trajectories(loaded, runner.prompts[:num_prompts], runner.options, setup=setup)
    thinned = [thin_out(trajectory, _STEPS_PER_PROMPT) for trajectory in found]
    return Replay.of(loaded, thinned, runtime=setup.runtime(loaded, own_policy(loaded)))


def _worth_it(front: Sequence[Point], replay: Replay) -> list[Point]:
    """Points that save something, with some divergence: what equals vanilla needs no certificate."""
    vanilla = max(point.unique_experts for point in front)
    found = [p for p in front if p.divergence > 0 and p.unique_experts < vanilla]
    if not found:
        raise InputError(
            f"expected policies that use fewer experts than vanilla ({vanilla:.1f} per block and layer on "
            f"{len(replay.packs)} recorded forwards), got none: name others with --policies, or allow more --trials"
        )
    return found


def _certify(
    runner: PolicyRunner, chain: Sequence[Point], options: TuningOptions, quality: Judged
) -> tuple[list[Verified], int]:
    """Test the chain in its order and stop at the first failure; how many passed.

    The order was fixed without these prompts, and a test counts only if all before it passed, so each may spend the
    whole error (fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995).
    """
    error = 1.0 - options.confidence
    tested: list[Verified] = []
    for point in chain:
        tested.append(verify(runner, point.policy, quality))
        if p_value(tested[-1].counts, options.retain, error=error) > error:
            return tested, len(tested) - 1
    return tested, len(tested)
