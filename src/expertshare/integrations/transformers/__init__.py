"""Expert sharing in models of transformers: `apply`. Importing this registers the experts implementation."""

from expertshare.integrations.transformers.application import Handle, apply
from expertshare.integrations.transformers.experts import NAME, register_experts
from expertshare.integrations.transformers.metrics import LayerUse, RoutingMetrics

register_experts()

__all__ = ["NAME", "Handle", "LayerUse", "RoutingMetrics", "apply", "register_experts"]
