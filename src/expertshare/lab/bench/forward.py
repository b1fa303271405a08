"""`bench forward`: one denoising forward of a few full-width layers with the head, under several policies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertshare import native
from expertshare.config import ModelConfig
from expertshare.decoding.cache import CacheView, KeyValueCache
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.kernels import BACKENDS, Backend, TorchBackend, choose_backend
from expertshare.lab.bench.cases import Case, forward_bound_ms, forward_work
from expertshare.lab.bench.machine import CPU, Yardstick, check_memory, dtype_name
from expertshare.lab.bench.peer_models import IMPLEMENTATIONS, build_peer, peer_cache, peer_logits
from expertshare.lab.bench.timing import spread, timed
from expertshare.lab.bench.weights import concentrate, model_bytes, random_model
from expertshare.measure.cost import PartClock
from expertshare.models import ForwardInput, LayerKeyValues, MoETransformer, Runtime
from expertshare.routing import RoutingPolicy, make_policy

GROSSLY_WRONG = 0.5
"""Relative difference of logits from the reference above which a contender is not timed. bfloat16 alone moves some
tokens to other experts, each a visible difference; exact agreement in float32 is what the tests check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSettings:
    """unique: experts per block and layer that vanilla routing should use (None: routers left random). context:
    cached positions. masked: rows that the head runs on (None: the whole block)."""

    num_layers: int = 4
    tokens: int | None = None
    context: int = 256
    unique: int | None = None
    masked: int | None = None
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 10
    warmup: int = 2
    seed: int = 0
    memory_bytes: int = 8 * 10**9
    device: torch.device = CPU


@dataclass(frozen=True, slots=True)
class Scene:
    """One block behind a random cache, which it writes its own keys and values to as decoding does. past: what is in
    the cache, for peers that keep one of their own; empty without context."""

    model: MoETransformer
    inputs: ForwardInput
    views: tuple[CacheView, ...]
    past: tuple[LayerKeyValues, ...]
    masked: int


@dataclass(slots=True)
class Ours:
    """Our model under one policy and backend; remembers where the time of every call went."""

    scene: Scene
    policy: RoutingPolicy
    backend: Backend
    parts_s: list[dict[str, float]] = field(default_factory=list)
    group_experts_NG: Tensor | None = None

    def __call__(self, turn: int = 0) -> Tensor:
        """Best tokens of the masked rows [masked] with their probabilities, as a step of decoding needs them."""
        del turn  # every call is the same block
        if self.scene.model.device.type != "cpu":
            return self._step(Runtime(policy=self.policy, backend=self.backend))
        clock = PartClock()
        runtime = Runtime(policy=self.policy, backend=self.backend, clock=clock)
        start = time.perf_counter()
        tokens_R = self._step(runtime)
        self.parts_s.append(clock.shares(time.perf_counter() - start))
        return tokens_R

    def _step(self, runtime: Runtime) -> Tensor:
        scene = self.scene
        output = scene.model(scene.inputs, runtime, scene.views)
        with runtime.timed("head"):
            hidden_RD = output.hidden_BSD[0, : scene.masked]
            tokens_R, _ = scene.model.best_tokens(hidden_RD, [scene.model.config.mask_id], backend=self.backend)
        self.group_experts_NG = output.routing.group_experts_NG
        return tokens_R

    def logits(self) -> Tensor:
        """Logits of the masked rows [masked, V]."""
        scene = self.scene
        output = scene.model(scene.inputs, Runtime(policy=self.policy, backend=self.backend), scene.views)
        return scene.model.logits(output.hidden_BSD[0, : scene.masked], backend=self.backend)

    def to_json(self, repeats: int) -> dict[str, Any]:
        """Medians over the last `repeats` calls; on a GPU, whose parts the host cannot time, unique experts alone."""
        assert self.group_experts_NG is not None
        unique = self.group_experts_NG.float().mean(dim=1).tolist()
        counted = {"unique_experts": statistics.fmean(unique), "unique_experts_by_layer": unique}
        if not self.parts_s:
            return counted
        timed = self.parts_s[-repeats:]
        parts = {part: 1e3 * statistics.median(call[part] for call in timed) for part in timed[0]}
        return {
            **counted,
            "ms_by_part": parts,
            "router_over_experts": parts["router"] / parts["experts"] if parts["experts"] > 0 else None,
        }


def bench_forward(
    name: str,
    case: Case,
    policies: Mapping[str, RoutingPolicy],
    backends: Sequence[str] | None,
    settings: ForwardSettings,
    on_progress: Callable[[str], None] = lambda _: None,
    yardstick: Yardstick | None = None,
) -> dict[str, Any]:
    """Returns {"forwards": points, "left_out": which was not timed and why, "scene": what was run}.

    backends: ours and peers, None for all that are there. Peers run vanilla routing only. yardstick: timed between the
    calls on a CPU, whose limits are then given, with the bounds that follow. Raises InputError where the model does not
    fit, ConfigError or PolicyError for names and knobs that cannot be used.
    """
    chosen = forward_backends(backends, settings.device)
    config = case.stack(settings.num_layers)
    check_memory(model_bytes(config, settings.dtype), settings.memory_bytes, "this model", "measure fewer --layers")
    bound = {label: policy.bind(config.router) for label, policy in policies.items()}
    with torch.no_grad():
        on_progress(f"{name}: filling weights")
        scene = _scene(config, case, settings)
        calls: dict[tuple[str, str], Callable[[int], Tensor]] = {}
        for backend in chosen:
            if backend in IMPLEMENTATIONS:
                assert case.peer is not None  # stack() refused it
                peer = build_peer(scene.model, case.peer, IMPLEMENTATIONS[backend])
                calls[backend, "vanilla"] = _peer_call(scene, peer)
            else:
                ours = choose_backend(backend, settings.device)
                calls |= {(backend, label): Ours(scene, policy, ours) for label, policy in bound.items()}
        on_progress(f"{name}: verifying")
        agreement = _agreement(calls, bound, scene)
        right = {key: call for key, call in calls.items() if agreement[key]["difference"] <= GROSSLY_WRONG}
        on_progress(f"{name}: timing {len(right)} contenders")
        seconds, captured = timed(
            {**({} if yardstick is None else yardstick.calls()), **right},
            settings.device,
            turns=1,
            repeats=settings.repeats,
            warmup=settings.warmup,
            host_bound=[key for key in right if key[0] == "transformers-eager"],
        )
    points = []
    for key, call in right.items():
        told: dict[str, Any] = {"captured": captured[key]} if captured else {}
        own = call.to_json(settings.repeats) if isinstance(call, Ours) else {}
        told |= {**spread(seconds[key]), **own, **agreement[key]}
        points.append({"case": name, "backend": key[0], "policy": key[1], **told})
    add_ratios(points, lambda point: 1.0 / point["ms"])
    limits = {} if yardstick is None else _add_bounds(points, scene, settings, yardstick, seconds)
    limit = f"of their norm, allowed {GROSSLY_WRONG:g}; not timed"
    wrong = [
        {"backend": key[0], "policy": key[1], "reason": f"wrong: logits differ by {found['difference']:.2g} {limit}"}
        for key, found in agreement.items()
        if key not in right
    ]
    told = {
        "num_layers": config.num_layers,
        "num_moe_layers": config.num_moe_layers,
        "tokens": scene.inputs.tokens_BS.shape[1],
        "masked": scene.masked,
        "context": settings.context,
        "unique_requested": settings.unique,
        "dtype": dtype_name(settings.dtype),
        "seed": settings.seed,
        "weights": "random, the same tensors for all; routers concentrated by one direction per layer",
    }
    return {**limits, "forwards": points, "left_out": wrong + cpu_left_out(backends or ("cpu",)), "scene": told}


def forward_backends(names: Sequence[str] | None, device: torch.device = CPU) -> list[str]:
    """Names that are there: by default our fast ones and transformers. ConfigError for an unknown one."""
    known = [*BACKENDS, *IMPLEMENTATIONS]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown backend {name!r}. {nearest(name, known)}")
    wanted = names or ["cpu" if device.type == "cpu" else "triton", "torch", *IMPLEMENTATIONS]
    return [name for name in wanted if name != "cpu" or native.available()]


def cpu_left_out(backends: Sequence[str]) -> list[dict[str, Any]]:
    """Why the backend cpu, if it is among those wanted, has no figures: an entry of "left_out", or none."""
    reason = native.unavailable_reason()
    absent = reason is not None and "cpu" in backends
    return [{"backend": "cpu", "policy": None, "reason": reason}] if absent else []


def _scene(config: ModelConfig, case: Case, settings: ForwardSettings) -> Scene:
    length = settings.tokens or case.tokens
    masked = length if settings.masked is None else settings.masked
    if not 1 <= masked <= length:
        raise InputError(f"masked rows must lie in 1..{length}, the tokens of a block, got {masked}")
    if settings.context < 0 or settings.context + length > config.max_positions:
        raise InputError(f"context must lie in 0..{config.max_positions - length}, got {settings.context}")
    spec = config.router
    most = min(spec.num_experts, length * spec.top_k)
    if settings.unique is not None and not spec.top_k <= settings.unique <= most:
        raise InputError(
            f"unique experts must lie in {spec.top_k}..{most} for {length} tokens of {spec.top_k} experts each, got "
            f"{settings.unique}"
        )
    device = settings.device
    model = random_model(config, settings.dtype, settings.seed).to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    end = settings.context + length
    cache = KeyValueCache(config, num_rows=1, capacity=end, dtype=settings.dtype, device=device)
    views = cache.views([0], [settings.context])
    for finished in (part for view in views for part in view.reach(0)):
        finished.copy_(torch.randn(finished.shape, generator=generator))
    past = tuple(LayerKeyValues(*view.reach(0)) for view in views) if settings.context else ()
    inputs = ForwardInput(
        tokens_BS=torch.randperm(config.vocab_size, generator=generator)[:length].unsqueeze(0).to(device),
        positions_BS=torch.arange(settings.context, end, device=device).unsqueeze(0),
        live_BS=torch.ones(1, length, dtype=torch.bool, device=device),
        mask_BSP=None,
        block_length=length,
    )
    if settings.unique is not None:
        concentrate(model, inputs, views, unique=settings.unique, seed=settings.seed)
    return Scene(model, inputs, views, past, masked)


def _peer_call(scene: Scene, peer: Any) -> Callable[[int], Tensor]:
    """A forward with transformers' cache, and the step back that a denoising loop needs after it. Its class has no
    way to run the head on some rows only."""
    cache, inputs = peer_cache(peer, scene.past), scene.inputs
    length = inputs.tokens_BS.shape[1]
    seen = int(inputs.positions_BS[0, -1]) + 1
    mask_BSP = torch.ones(1, length, seen, dtype=torch.bool, device=inputs.tokens_BS.device)

    def call(turn: int) -> Tensor:
        del turn
        logits = peer_logits(peer, inputs.tokens_BS, inputs.positions_BS, mask_BSP, cache)
        cache.crop(-length)
        return logits[0, : scene.masked]

    return call


def _agreement(
    calls: Mapping[tuple[str, str], Callable[[int], Tensor]], policies: Mapping[str, RoutingPolicy], scene: Scene
) -> dict[tuple[str, str], dict[str, float]]:
    """How near each one's logits are to those of our torch path under the same policy."""
    found, expected = {}, {}
    for (backend, label), call in calls.items():
        if label not in expected:  # peers run vanilla even where we are not to
            policy = policies.get(label) or make_policy("vanilla").bind(scene.model.config.router)
            expected[label] = Ours(scene, policy, TorchBackend()).logits().float()
        right = expected[label]
        logits = (call.logits() if isinstance(call, Ours) else call(0)).float()
        found[backend, label] = {
            "difference": float((logits - right).norm() / right.norm()),
            "same_argmax": float((logits.argmax(-1) == right.argmax(-1)).float().mean()),
        }
    return found


def add_ratios(points: Sequence[dict[str, Any]], speed_of: Callable[[dict[str, Any]], float]) -> None:
    """Speed against the peers and against vanilla in the same backend, each at the same batch size only."""
    speeds = {(point["backend"], point["policy"], point.get("batch_size")): speed_of(point) for point in points}
    for point in points:
        size = point.get("batch_size")
        others = {name: speeds.get((name, "vanilla", size)) for name in IMPLEMENTATIONS}
        others["vanilla"] = speeds.get((point["backend"], "vanilla", size))
        point["faster_than"] = {name: speed_of(point) / speed for name, speed in others.items() if speed}


def _add_bounds(
    points: Sequence[dict[str, Any]],
    scene: Scene,
    settings: ForwardSettings,
    yardstick: Yardstick,
    seconds: Mapping[Any, list[float]],
) -> dict[str, float]:
    """Give every forward whose experts were counted its bound; returns the limits, as results have them."""
    peaks = yardstick.note(seconds)
    tokens = scene.inputs.tokens_BS.shape[1]
    for point in points:
        if "unique_experts_by_layer" not in point:
            continue
        work = forward_work(
            scene.model.config,
            tokens=tokens,
            seen=settings.context + tokens,
            masked=scene.masked,
            unique_by_layer=point["unique_experts_by_layer"],
            itemsize=settings.dtype.itemsize,
        )
        by_part = forward_bound_ms(work, peaks)
        bound = sum(by_part.values())
        point |= {"bound_ms": bound, "bound_ms_by_part": by_part, "share_of_bound": bound / point["ms"]}
    return peaks.to_json()
