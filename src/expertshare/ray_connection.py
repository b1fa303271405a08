"""A Ray cluster: one that runs already, or one of this machine alone, for as long as it is needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from expertshare.errors import ConfigError

LOCAL = "local"
OBJECT_STORE_BYTES = 200_000_000
"""Of a local Ray: what goes over it are requests and answers, never weights."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else 15: whatever runs beside a local Ray would go before the work itself
}
"""What Ray is told where the user has said nothing else."""


def require_ray() -> None:
    """Raise ConfigError where Ray is missing."""
    if find_spec("ray") is None:
        raise ConfigError(
            "expected the package of the extra `ray`, but ray cannot be imported: install it with "
            "pip install 'expertshare[ray]', or leave out --ray, --ray-address and further --replicas"
        )


def chosen_address(asked: str | None) -> str:
    """Where Ray is: as asked, else in RAY_ADDRESS, else `local`: one that begins and ends with this process.

    Raises ConfigError for an address of Ray's client, through which neither streams nor workers are reached directly.
    """
    address = asked or os.environ.get("RAY_ADDRESS") or LOCAL
    if address.startswith("ray://"):
        raise ConfigError(
            f"expected HOST:PORT of a cluster to which this machine belongs, got {address!r}: run this on one of its "
            "machines (ray start --address HOST:PORT) and give `auto` or HOST:PORT"
        )
    return address


@contextmanager
def connected(address: str | None = None, *, cpus: int) -> Iterator[None]:
    """Ray, for the body. cpus: processors that a local Ray hands out, as many as its workers will ask for.

    A connection that this process has already is used, and left open. Raises ConfigError.
    """
    require_ray()
    wanted = chosen_address(address)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if wanted == LOCAL:
            ray.init(LOCAL, num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            ray.init(wanted, **quiet)
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        raise ConfigError(f"cannot join Ray at {wanted!r} ({error}): check that it runs, and the address") from error
    try:
        yield
    finally:
        ray.shutdown()
