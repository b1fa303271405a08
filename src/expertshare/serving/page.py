"""The live page over an engine: its traces take turns with the engine's own steps."""

from __future__ import annotations

from fastapi import APIRouter

from expertshare.routing import POLICIES
from expertshare.serving.engine import Engine
from expertshare.serving.live import LiveLimits, ModelTraceSource, live_routes


def page_routes(engine: Engine, model_name: str | None = None) -> APIRouter:
    """For create_app's extra_routers. Offers the policies that requests may ask for. Raises InputError for a model
    without a tokenizer."""
    source = ModelTraceSource(
        engine.loaded,
        lock=engine.model_lock,
        name=model_name,
        options=engine.options,
        backend=engine.runtime.backend.name,
        store=engine.runtime.store,
        chat=engine.chat,
    )
    offered = engine.offered
    if offered.names == frozenset(POLICIES):
        return live_routes(source)
    return live_routes(source, limits=LiveLimits(policies=offered.labels))
