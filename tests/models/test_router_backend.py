"""Which gate a layer uses: the native one for the backend 'cpu' alone."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.models import moe
from expertshare.routing import router_scores


class Sizes:
    """As much of a ModelConfig as a router reads."""

    hidden_size = 64
    router = RouterSpec(num_experts=16, top_k=4, activation="sigmoid", renormalise=True, has_bias=True)


@pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
def test_the_native_gate_is_used_only_where_asked_for() -> None:
    router = moe.Router(Sizes())  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x, live = torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool)
    spec = Sizes.router
    with torch.no_grad():
        by_torch = router_scores(router(x), live, spec, router.bias)
        with patch.object(moe, "gate_scores", wraps=moe.gate_scores) as gate:
            plain = router.scores(x, live, spec, compiled=False)
            assert not gate.called
            fast = router.scores(x, live, spec, compiled=True)
            assert gate.called
    assert torch.equal(plain.choice_GLE, by_torch.choice_GLE)
    torch.testing.assert_close(fast.choice_GLE, by_torch.choice_GLE, rtol=1e-5, atol=1e-6)
    assert router.scores(x, live, spec, compiled=True).affinity_GLE.requires_grad  # training stays with torch
