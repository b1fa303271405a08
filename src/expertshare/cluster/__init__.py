"""A Ray cluster: one that runs already, or one of this machine alone, for as long as it is needed."""

from expertshare.cluster.connection import connected, require_ray

__all__ = ["connected", "require_ray"]
