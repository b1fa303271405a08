"""Several engines behind one proxy, each in a process of Ray's. Needs the extras `serve` and `ray`."""

from expertshare.serving.replicas.proxy import Admission, create_proxy
from expertshare.serving.replicas.ray_application import replicas_on_ray
from expertshare.serving.replicas.replica import ReplicaPlan
from expertshare.serving.settings import ReplicaScale

__all__ = ["Admission", "ReplicaPlan", "ReplicaScale", "create_proxy", "replicas_on_ray"]
