"""The live page: a prompt is decoded under two policies side by side, and everybody can watch."""

from expertshare.serving.live.routes import live_routes, page_paths
from expertshare.serving.live.trace import Event, ModelTraceSource, TraceSource
from expertshare.serving.settings import LiveLimits

__all__ = ["Event", "LiveLimits", "ModelTraceSource", "TraceSource", "live_routes", "page_paths"]
