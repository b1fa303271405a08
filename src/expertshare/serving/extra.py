"""The packages that serving needs beside the others."""

from __future__ import annotations

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
