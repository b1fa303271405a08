"""Backend "triton": kernels for GPUs, none of which asks the host; what they do not compute stays with torch."""

from __future__ import annotations

from torch import Tensor

from expertshare.kernels.torch_backend import TorchBackend
from expertshare.kernels.triton.experts import moe_ffn_triton
from expertshare.kernels.triton.head import best_token_triton
from expertshare.kernels.triton.route import route_layer_triton
from expertshare.types import Arrivals, Bank, RoutingPlan


class TritonBackend(TorchBackend):
    """For inference: routing, experts and the head."""

    name = "triton"
    capturable = True

    route = staticmethod(route_layer_triton)
    best_token = staticmethod(best_token_triton)

    def moe_ffn(self, x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
        """In four kernels; quantised experts by their codes."""
        if arrivals is not None:
            arrivals.wait()
        return moe_ffn_triton(x_TD, plan, bank)
