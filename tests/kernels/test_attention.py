"""Native attention: every instruction set of this machine, any number of threads, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.torch_backend import TorchBackend, attend_folded

from .conftest import ISAS

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}"),
    pytest.mark.usefixtures("unwritten_is_nan"),
]

CPU = CpuBackend()

# Largest error over the largest output. bfloat16: the softmax's weights and the output are rounded once each.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
# batch, heads, key/value heads, queries, keys, head features
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 8, 24, 8), (1, 16, 4, 32, 75, 16)]
SHAPES += [(3, 6, 6, 5, 130, 33), (1, 4, 1, 50, 50, 128)]

Scene = tuple[Tensor, Tensor, Tensor, Tensor | None]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    return str(request.param)


def scene(shape: tuple[int, ...], dtype: torch.dtype, masked: bool = False) -> Scene:
    batch, heads, kv_heads, length, keys, features = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, length, heads, features, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, keys, features, generator=generator).to(dtype) for _ in "kv")
    mask = torch.rand(batch, length, keys, generator=generator) < 0.6
    mask[..., keys // 2] = True
    return q, k, v, mask if masked else None


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_as_more_queries_attend_to_the_same(shape: tuple[int, ...]) -> None:
    q, k, v, mask = scene(shape, torch.float32, masked=True)
    assert mask is not None
    expected = formula(q, k, v, mask)
    found = attend_folded(q, k, v, mask).transpose(1, 2).flatten(2)
    assert (found - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Head by head in float64; keys that a query must not see are not there at all."""
    batch, heads, length, features = q.shape
    y = torch.empty(batch, length, heads, features, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[1])
            for s in range(length):
                seen = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[b, s]
                scores = k[b, group, seen].double() @ q[b, h, s].double() / features**0.5
                y[b, s, h] = scores.softmax(dim=0) @ v[b, group, seen].double()
    return y.flatten(2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_softmax_attention(isa: str, shape: tuple[int, ...], masked: bool, dtype: torch.dtype) -> None:
    given = scene(shape, dtype, masked)
    expected = formula(*given)
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs += [CPU.attention(*given) for _ in range(2)]
    assert outputs[0].dtype == dtype
    assert outputs[0].shape == (shape[0], shape[3], shape[1] * shape[5])
    assert float((outputs[0].double() - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_other_queries_and_hidden_keys_change_nothing(isa: str, dtype: torch.dtype) -> None:
    """As in a batch of rows that are at different blocks: the shorter ones see a prefix."""
    q, k, v, _ = scene((1, 4, 2, 8, 90, 24), dtype)
    alone = CPU.attention(q[:, :, 2:5], k[:, :, :37], v[:, :, :37], None)
    mask = (torch.arange(90) < 37).expand(1, 8, 90)
    assert torch.equal(CPU.attention(q, k, v, mask)[:, 2:5], alone)


def test_a_cache_is_read_where_it_lies(isa: str) -> None:
    """A view of some rows and positions of a larger buffer, with NaN all around."""
    q, k, v, _ = scene((2, 4, 2, 8, 40, 24), torch.bfloat16)
    expected = CPU.attention(q, k, v, None)
    memory = torch.full((2, 4, 2, 64, 24), float("nan"), dtype=torch.bfloat16)
    memory[0, 1:3, :, :40], memory[1, 1:3, :, :40] = k, v
    assert torch.equal(CPU.attention(q.contiguous(), memory[0, 1:3, :, :40], memory[1, 1:3, :, :40], None), expected)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(CPU.attention(q, turned, v, None), expected)


def test_the_backends_agree() -> None:
    q, k, v, mask = scene((2, 4, 2, 8, 24, 8), torch.float32, masked=True)
    expected = TorchBackend().attention(q, k, v, mask)
    torch.testing.assert_close(CPU.attention(q, k, v, mask), expected, rtol=0, atol=1e-6)


WRONG: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Scene]]] = {
    "half": ("all in float32 or all in bfloat16", lambda q, k, v, m: (q.half(), k.half(), v.half(), m)),
    "mixed": ("all in float32 or all in bfloat16", lambda q, k, v, m: (q, k.bfloat16(), v, m)),
    "no keys": ("no size of keys 0", lambda q, k, v, m: (q, k[:, :, :0], v[:, :, :0], None)),
    "fewer values": (r"keys \[B, G, P, D\], values \[B, G, P, D\]", lambda q, k, v, m: (q, k, v[:, :, 1:], m)),
    "odd groups": ("a divisor of H", lambda q, k, v, m: (q[:, :3], k, v, m)),
    "three dimensions": (r"queries \[B, H, S, D\]", lambda q, k, v, m: (q[0], k, v, m)),
    "additive mask": ("mask in torch.bool", lambda q, k, v, m: (q, k, v, torch.zeros(2, 8, 24))),
    "short mask": (r"mask \[B, S, P\]", lambda q, k, v, m: (q, k, v, torch.ones(2, 8, 23, dtype=torch.bool))),
    "gradients": ("no gradients", lambda q, k, v, m: (q, k.clone().requires_grad_(), v, m)),
    "another device": ("on the CPU", lambda q, k, v, m: (q.to("meta"), k, v, m)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_take_is_said_clearly(what: str) -> None:
    message, spoil = WRONG[what]
    with pytest.raises(ConfigError, match=message):
        CPU.attention(*spoil(*scene((2, 4, 2, 8, 24, 8), torch.float32, masked=True)))
