"""An engine for a server. Needs the extra `serve`, and is therefore no part of expertshare.api itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from expertshare.api.loading import DecodingValue, Model, decoding_options, for_model, load, opened
from expertshare.evaluation import Setup
from expertshare.experts import StoreOptions
from expertshare.kernels import AUTO
from expertshare.routing import native_policy, parse_policy
from expertshare.serving import Engine, EngineLimits, OfferedPolicies
from expertshare.tuning import PolicyFile
from expertshare.types import RoutingPolicy


@contextmanager
def opened_engine(
    model: Model,
    *,
    policy: str | RoutingPolicy | PolicyFile | None = None,
    policies: Sequence[str] | None = None,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
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
    options = decoding_options(decoding)
    wanted = parse_policy(policy) if isinstance(policy, str) else policy
    loaded = load(model, dtype=dtype, store=store)
    default = for_model(wanted, loaded) if wanted is not None else native_policy(loaded.config)
    offered = OfferedPolicies.read(loaded.config.router, default, policies)
    with opened(loaded, store, Setup(backend=backend, chat=chat)) as setup:
        runtime = setup.runtime(loaded, offered.default)
        engine = Engine(
            loaded,
            replace(runtime, policy=offered.default),
            store=setup.store,
            limits=limits,
            options=options,
            offered=offered,
            chat=chat,
        )
        try:
            yield engine
        finally:
            engine.close()  # before its store
