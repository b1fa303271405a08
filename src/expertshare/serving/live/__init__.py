"""The live page: a prompt is decoded under two policies side by side, and everybody can watch."""

from expertshare.serving.live.limits import LiveLimits
from expertshare.serving.live.model_source import ModelTraceSource
from expertshare.serving.live.page_files import page_paths
from expertshare.serving.live.routes import live_routes
from expertshare.serving.live.trace_source import Event, TraceSource

__all__ = ["Event", "LiveLimits", "ModelTraceSource", "TraceSource", "live_routes", "page_paths"]
