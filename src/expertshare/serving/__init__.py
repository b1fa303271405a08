"""Serving: an engine that batches continuously, and OpenAI's API in front of it. Needs the extra `serve`."""

from importlib.util import find_spec

from expertshare.errors import ConfigError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "pydantic")


def require_extra() -> None:
    """Raise ConfigError where one of them is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"expected the packages of the extra `serve`, but {', '.join(missing)} cannot be imported: install them "
            "with pip install 'expertshare[serve]'"
        )


require_extra()

from expertshare.serving.app import create_app  # noqa: E402
from expertshare.serving.engine import Engine  # noqa: E402
from expertshare.serving.live.routes import page_routes  # noqa: E402
from expertshare.serving.settings import EngineLimits, OfferedPolicies, ServerSettings  # noqa: E402
from expertshare.serving.uvicorn_server import serve  # noqa: E402

__all__ = ["Engine", "EngineLimits", "OfferedPolicies", "ServerSettings", "create_app", "page_routes", "serve"]
