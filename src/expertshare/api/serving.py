"""An engine for a server. Needs the extra `serve`, and is therefore no part of expertshare.api itself."""

from __future__ import annotations

import logging.config
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from expertshare import native
from expertshare.api.loading import DecodingValue, Model, Policy, decoding_options, for_model, load, opened, parsed
from expertshare.evaluation.runner import Setup
from expertshare.experts import StoreOptions
from expertshare.kernels import AUTO
from expertshare.models.checkpoint import read_json, read_optional_json, resolve_source
from expertshare.models.family import family_of
from expertshare.models.tokenizer import load_tokenizer, token_ids
from expertshare.routing import native_policy
from expertshare.serving import Engine, EngineLimits, OfferedPolicies, ServerSettings
from expertshare.serving.live import page_paths
from expertshare.serving.proxy import Admission, create_proxy
from expertshare.serving.ray_application import ReplicaPlan, replicas_on_ray
from expertshare.serving.settings import ReplicaScale
from expertshare.serving.telemetry import log_config
from expertshare.tuning.policy_file import PolicyFile


@contextmanager
def opened_engine(
    model: Model,
    *,
    policy: Policy | None = None,
    policies: Sequence[str] | None = None,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    chat: bool | None = None,
    store: str | StoreOptions | None = None,
    limits: EngineLimits | None = None,
    **decoding: DecodingValue,
) -> Iterator[Engine]:
    """An engine that has not been started (expertshare.serving.create_app does that); its expert store is closed after
    the body.

    policy: of requests that name none, by default what the checkpoint was trained with. policies: what requests may
    name, as OfferedPolicies reads it. decoding: defaults of requests. The rest as in `generate`, whose errors it
    raises.
    """
    options, wanted = decoding_options(decoding), parsed(policy)
    loaded = load(model, dtype=dtype, store=store, device=device)
    offered = OfferedPolicies.read(loaded.config.router, for_model(wanted, loaded), policies)
    with opened(loaded, store, Setup(backend=backend, chat=chat)) as setup:
        runtime = setup.runtime(loaded, offered.default)
        made = Engine(loaded, runtime, store=setup.store, limits=limits, options=options, offered=offered, chat=chat)
        with closing(made) as engine:  # before its store
            yield engine


@contextmanager
def opened_proxy(
    model: str | Path,
    scale: ReplicaScale,
    settings: ServerSettings,
    *,
    page: bool = False,
    threads: int | None = None,
    limits: EngineLimits | None = None,
    drain_timeout_s: float = 30.0,
    log_level: str = "INFO",
    **engine: Any,
) -> Iterator[tuple[FastAPI, Admission]]:
    """An application in front of several engines, each in a process of Ray's, and what drains it. Needs the extra
    `ray`, too.

    page: show the live page. threads: of each replica, by default an equal share of the cores. engine: as
    `opened_engine` takes it. The processes end with the body. Raises ConfigError.
    """
    path = resolve_source(model)
    _check_policies(path, engine.get("policy"), engine.get("policies"))
    limits = limits or EngineLimits()
    logging.config.dictConfig(log_config(log_level))
    plan = ReplicaPlan(
        # a hub id stays one: other machines have their own copies
        open_engine=partial(opened_engine, path.resolve() if Path(model).exists() else model, limits=limits, **engine),
        settings=replace(settings, model_name=settings.model_name or path.resolve().name, api_key=None),
        page=page,
        threads=scale.threads(threads, native.usable_cores()),
        log_level=log_level,
    )
    application = f"expertshare-{plan.settings.model_name}"
    with replicas_on_ray(plan, scale, limits, name=application, drain_timeout_s=drain_timeout_s) as replicas:
        admission = Admission()
        yield create_proxy(replicas, admission, settings, open_paths=page_paths() if page else ()), admission


def _check_policies(path: Path, policy: Policy | None, policies: Sequence[str] | None) -> None:
    """What a replica would object to after Ray and the model have been started and loaded, and that several times."""
    raw = read_json(path / "config.json")
    generation = read_optional_json(path / "generation_config.json")
    config = family_of(raw).parse_config(raw, generation, token_ids(load_tokenizer(path)))
    wanted = parsed(policy)
    chosen = wanted.policy if isinstance(wanted, PolicyFile) else wanted
    OfferedPolicies.read(config.router, chosen or native_policy(config), policies)
