"""Several engines behind one entrance, each in a process of Ray's. Needs the extras `serve` and `ray`."""

from expertshare.serving.replicas.door import Door
from expertshare.serving.replicas.entrance import create_entrance
from expertshare.serving.replicas.ray_application import replicas_on_ray
from expertshare.serving.replicas.replica import ReplicaPlan
from expertshare.serving.replicas.scale import ReplicaScale

__all__ = ["Door", "ReplicaPlan", "ReplicaScale", "create_entrance", "replicas_on_ray"]
