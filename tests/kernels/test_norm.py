"""Native norms and rotation: every instruction set of this machine, any number of threads, against the torch path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels import CacheSlice, LayerKeyValues, TorchBackend
from expertshare.kernels.cpu_backend import CpuBackend

from .conftest import ISAS

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}"),
    pytest.mark.usefixtures("unwritten_is_nan"),
]

CPU = CpuBackend()

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 5), (32, 2048), (65, 33), (2, 7, 130)]
# batch, length, heads of queries, of keys, features of a head, of them rotated
HEADS = [(1, 1, 1, 1, 2, 2), (2, 8, 4, 2, 16, 8), (1, 32, 16, 4, 128, 64), (3, 5, 3, 1, 33, 6), (2, 4, 2, 2, 8, 0)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERTSHARE_ISA", request.param)
    return str(request.param)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_but_for_the_mean(got: Tensor, expected: Tensor) -> None:
    """The order of one sum differs: float32 by its last bits, bfloat16 now and then by a rounding."""
    step = 1e-6 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, rtol=step, atol=step / 4)
    if got.dtype == torch.bfloat16:
        assert float((got != expected).float().mean()) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_that_of_torch(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, delta = (random(*shape, dtype=dtype, seed=seed) * 3 for seed in (0, 1))
    scale = random(shape[-1], dtype=dtype, seed=2)
    expected, expected_sum = torch.nn.functional.rms_norm(x.double(), shape[-1:], None, EPS), x + delta
    outputs = []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        outputs.append(CPU.rms_norm(x, scale, EPS))
        total, normed = CPU.add_and_norm(x, delta, scale, EPS)
        assert torch.equal(total, expected_sum)
        assert torch.equal(normed, CPU.rms_norm(total, scale, EPS))
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert outputs[0].dtype == dtype
    assert_same_but_for_the_mean(outputs[0], TorchBackend().rms_norm(x, scale, EPS))
    torch.testing.assert_close(outputs[0].double(), expected * scale.double(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_others_or_on_the_instruction_set(isa: str, dtype: torch.dtype) -> None:
    x, scale = random(9, 70, dtype=dtype), random(70, dtype=dtype, seed=1)
    alone = torch.cat([CPU.rms_norm(row.unsqueeze(0), scale, EPS) for row in x])
    assert torch.equal(CPU.rms_norm(x, scale, EPS), alone)
    spread = torch.stack((x, x), dim=1)[:, 0]
    assert torch.equal(CPU.rms_norm(spread, scale, EPS), alone)
    assert CPU.rms_norm(x[:0], scale, EPS).shape == (0, 70)


@dataclass
class InMemory:
    """A past with memory behind it."""

    place: CacheSlice

    def cache_slice(self) -> CacheSlice:
        return self.place

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        raise AssertionError("it has memory to write to")


Given = tuple[Tensor, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor], CacheSlice | None]


def scene(shape: tuple[int, ...], dtype: torch.dtype) -> Given:
    batch, length, heads, kv_heads, features, rotated = shape
    qkv = random(batch, length, heads + 2 * kv_heads, features, dtype=dtype)
    scales = random(features, dtype=dtype, seed=1), random(features, dtype=dtype, seed=2)
    angle = random(batch, 1, length, rotated, dtype=torch.float32, seed=3) * 9
    memory = torch.full((2, batch + 1, kv_heads, length + 7, features), float("nan"), dtype=dtype)
    place = CacheSlice(memory[0, 1:], memory[1, 1:], [(3 * row) % 8 for row in range(batch)])
    return qkv, heads, scales, (angle.cos().to(dtype), angle.sin().to(dtype)), place


def by_torch(qkv: Tensor, heads: int, scales: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor]) -> Tensor:
    """Queries, keys and values as they should be, one head at a time, every step rounded to the dtype."""
    kv_heads, expected = (qkv.shape[2] - heads) // 2, qkv.clone()
    cos, sin = (table[:, 0] for table in tables)
    rotated = cos.shape[-1]
    for head in range(heads + kv_heads):
        x = TorchBackend().rms_norm(qkv[:, :, head], scales[int(head >= heads)], EPS)
        left, right = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
        x[..., :rotated] = x[..., :rotated] * cos + torch.cat((-right, left), dim=-1) * sin
        expected[:, :, head] = x
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_heads_are_turned_and_placed(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    qkv, heads, scales, tables, place = scene(shape, dtype)
    assert place is not None
    expected, outputs = by_torch(qkv, heads, scales, tables), []
    for num_threads in (1, 2, 3):
        native.set_num_threads(num_threads)
        for where in (place, None):
            outputs.append(qkv.clone())
            CPU.prepare_heads(outputs[-1], heads, scales, EPS, tables, where and InMemory(where))
    got = outputs[0]
    assert all(torch.equal(got, output) for output in outputs)
    assert_same_but_for_the_mean(got, expected)
    turned = heads + shape[3]
    assert torch.equal(got[:, :, turned:], qkv[:, :, turned:])
    for memory, part in ((place.keys_BHCD, got[:, :, heads:turned]), (place.values_BHCD, got[:, :, turned:])):
        for row, start in enumerate(place.starts):
            written = memory[row, :, start : start + shape[1]].clone()
            assert torch.equal(written, part[row].transpose(0, 1))
            memory[row, :, start : start + shape[1]] = float("nan")
        assert memory.isnan().all(), "written beyond the place"


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "half": ("all in float32 or all in bfloat16", lambda g: (g[0].half(), *g[1:])),
    "mixed": ("all in float32 or all in bfloat16", lambda g: (g[0].bfloat16(), *g[1:])),
    "not contiguous": ("contiguous", lambda g: (g[0].transpose(2, 3).contiguous().transpose(2, 3), *g[1:])),
    "odd heads": ("as many of keys", lambda g: (g[0], 3, *g[2:])),
    "no keys": ("as many of keys", lambda g: (g[0], 8, *g[2:])),
    "short scale": (r"scale of queries \[D\]", lambda g: (*g[:2], (g[2][0][:3], g[2][1]), *g[3:])),
    "short table": (r"cosines \[B, 1, S, R\]", lambda g: (*g[:3], (g[3][0], g[3][1][:, :, :3]), g[4])),
    "too far": ("within", lambda g: (*g[:4], CacheSlice(g[4].keys_BHCD, g[4].values_BHCD, [0, 9]))),
    "one start": ("2 starts", lambda g: (*g[:4], CacheSlice(g[4].keys_BHCD, g[4].values_BHCD, [0]))),
    "other heads": (
        r"buffer of keys \[B, G, C, D\]",
        lambda g: (*g[:4], CacheSlice(g[4].keys_BHCD[:, :1], g[4].values_BHCD, [0, 0])),
    ),
    "positions apart": (
        "buffer of values in place and expects the last 2 dimensions contiguous",
        lambda g: (
            *g[:4],
            CacheSlice(g[4].keys_BHCD, g[4].values_BHCD.transpose(2, 3).contiguous().transpose(2, 3), [0, 0]),
        ),
    ),
    "gradients": ("no gradients", lambda g: (g[0].requires_grad_(), *g[1:])),
    "another device": ("on the CPU", lambda g: (g[0].to("meta"), *g[1:])),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_take_is_said_clearly(what: str) -> None:
    message, spoil = WRONG[what]
    qkv, heads, scales, tables, place = spoil(scene((2, 8, 4, 2, 16, 8), torch.float32))
    with pytest.raises(ConfigError, match=message):
        CPU.prepare_heads(qkv, heads, scales, EPS, tables, InMemory(place))


def test_norms_that_do_not_fit_are_said_clearly() -> None:
    x, scale = torch.ones(3, 4), torch.ones(4)
    for wrong in ((x, scale[:3]), (x.double(), scale)):
        with pytest.raises(ConfigError, match="expect"):
            CPU.rms_norm(*wrong, EPS)
    with pytest.raises(ConfigError, match=r"what is added \[\.\.\., D\]"):
        CPU.add_and_norm(x, x[:2], scale, EPS)
