"""Serving: an engine that batches continuously, and OpenAI's API in front of it. Needs the extra `serve`."""

from expertshare.serving.extra import require_extra

require_extra()

from expertshare.serving.app import create_app  # noqa: E402
from expertshare.serving.engine import Engine  # noqa: E402
from expertshare.serving.offered_policies import OfferedPolicies  # noqa: E402
from expertshare.serving.page import page_routes  # noqa: E402
from expertshare.serving.settings import EngineLimits, ServerSettings  # noqa: E402
from expertshare.serving.uvicorn_server import serve  # noqa: E402

__all__ = ["Engine", "EngineLimits", "OfferedPolicies", "ServerSettings", "create_app", "page_routes", "serve"]
