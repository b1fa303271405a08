"""How many replicas, and where."""

from __future__ import annotations

from dataclasses import dataclass

from expertshare.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaScale:
    """replicas: at least so many run; max_replicas: at most so many, as load asks for (None: always `replicas`).
    ray: use Ray for a single one, too. ray_address: of a Ray cluster (None: RAY_ADDRESS, else a local Ray)."""

    replicas: int = 1
    max_replicas: int | None = None
    ray: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, got {self.replicas}: change --replicas")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas must be at least replicas ({self.replicas}), got {self.max_replicas}: change "
                "--max-replicas or --replicas"
            )

    @property
    def on_ray(self) -> bool:
        """Whether Ray is needed: for more than one replica, or where it was asked for."""
        return self.ray or self.ray_address is not None or self.most > 1

    @property
    def most(self) -> int:
        """Replicas that may run at once."""
        return self.max_replicas or self.replicas

    @property
    def grows(self) -> bool:
        """Whether their number follows the load."""
        return self.most > self.replicas

    def threads(self, asked: int | None, cores: int) -> int:
        """Of each replica: as asked, else an equal share of a machine's cores. Raises ConfigError for fewer than 1."""
        if asked is not None and asked < 1:
            raise ConfigError(f"threads must be at least 1, got {asked}: change --threads")
        return asked or max(1, cores // self.most)
