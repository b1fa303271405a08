"""The bytes of one expert."""

import struct
from operator import attrgetter

import pytest
import torch

from expertshare.errors import CheckpointError, ConfigError
from expertshare.experts.slab import SlabFormat
from expertshare.types import ExpertBank, QuantisedBank

FORMATS = [
    SlabFormat(scheme="none", hidden=64, inner=32),
    SlabFormat(scheme="none", hidden=40, inner=24, dtype="float32"),
    SlabFormat(scheme="int8", hidden=64, inner=32),
    SlabFormat(scheme="int4", hidden=64, inner=96, group_size=32),
    SlabFormat(scheme="int4", hidden=128, inner=64, group_size=64, has_minima=True),
]


def random_expert(form: SlabFormat, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part in form.parts:
        shape = (part.rows, part.columns)
        if part.dtype.is_floating_point:
            found[part.name] = torch.randn(shape, generator=generator).to(part.dtype)
        else:
            found[part.name] = torch.randint(0, 127, shape, generator=generator).to(part.dtype)
    return found


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.scheme}-{f.dtype}-{f.group_size}")
def test_written_experts_come_back_as_views_of_the_same_bytes(form: SlabFormat) -> None:
    slabs = torch.full((3, form.slab_bytes), 0xAB, dtype=torch.uint8)
    experts = [random_expert(form, seed) for seed in range(3)]
    for slab, expert in zip(slabs, experts, strict=True):
        form.write(slab, expert)
    bank = form.bank(slabs)
    for slot, expert in enumerate(experts):
        for name, matrix in expert.items():
            field = {"gate_up": "gate_up_EHD", "down": "down_EDF"}.get(name, name)
            found = attrgetter(field)(bank)
            assert torch.equal(found[slot], matrix)
            start = slabs[slot].data_ptr()
            assert start <= found[slot].data_ptr() < start + form.slab_bytes


def test_bytes_of_a_bfloat16_expert() -> None:
    form = SlabFormat(scheme="none", hidden=3, inner=2)
    slab = torch.empty(form.slab_bytes, dtype=torch.uint8)
    gate_up, down = torch.arange(12.0).view(4, 3).bfloat16(), -torch.arange(6.0).view(3, 2).bfloat16()
    form.write(slab, {"gate_up": gate_up, "down": down})
    raw = slab.numpy().tobytes()
    # bfloat16 is the upper half of a float32
    expected = b"".join(struct.pack("<f", float(v))[2:] for v in range(12)).ljust(64, b"\0")
    expected += b"".join(struct.pack("<f", -float(v))[2:] for v in range(6))
    assert raw == expected.ljust(4096, b"\0")
    assert (form.expert_bytes, form.slab_bytes) == (36, 4096)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (SlabFormat(scheme="none", hidden=2048, inner=512), 3 * 2048 * 512 * 2),
        (SlabFormat(scheme="int8", hidden=2048, inner=512), 3 * 2048 * 512 + 4 * (1024 + 2048)),
        (SlabFormat(scheme="int4", hidden=2048, inner=512, group_size=32), 3 * 2048 * 512 * (16 + 2) // 32),
        (
            SlabFormat(scheme="int4", hidden=2048, inner=512, group_size=64, has_minima=True),
            3 * 2048 * 512 * (32 + 4) // 64,
        ),
    ],
)
def test_bytes_of_an_expert_of_llada2_mini(form: SlabFormat, expected: int) -> None:
    assert form.expert_bytes == expected
    assert 0 <= form.slab_bytes - expected < 4096 + 64 * len(form.parts)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.scheme}-{f.dtype}-{f.group_size}")
def test_parts_are_aligned_and_apart(form: SlabFormat) -> None:
    end = 0
    for part in form.parts:
        assert part.offset % 64 == 0
        assert part.offset >= end
        end = part.offset + part.num_bytes
    assert form.slab_bytes % 4096 == 0
    assert form.slab_bytes >= end


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.scheme}-{f.dtype}-{f.group_size}")
def test_a_format_survives_json(form: SlabFormat) -> None:
    assert SlabFormat.from_json(form.to_json(), "here") == form


def test_a_bank_of_floats_and_one_of_codes() -> None:
    plain, four = FORMATS[0], FORMATS[4]
    assert isinstance(plain.bank(torch.zeros(2, plain.slab_bytes, dtype=torch.uint8)), ExpertBank)
    bank = four.bank(torch.zeros(2, four.slab_bytes, dtype=torch.uint8))
    assert isinstance(bank, QuantisedBank)
    assert (bank.gate_up.bits, bank.gate_up.group_size, bank.gate_up.depth) == (4, 64, 128)
    assert bank.down.minima_EPG is not None


@pytest.mark.parametrize(
    "bad",
    [
        {"scheme": "int3"},
        {"dtype": "float16"},
        {"hidden": 0},
        {"group_size": 32},
        {"scheme": "int4"},
        {"scheme": "int4", "group_size": 48},
        {"scheme": "int8", "has_minima": True},
    ],
)
def test_impossible_formats_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SlabFormat(**{"scheme": "none", "hidden": 64, "inner": 32, **bad})  # type: ignore[arg-type]


def test_a_wrong_part_is_refused() -> None:
    form = FORMATS[0]
    slab, expert = torch.empty(form.slab_bytes, dtype=torch.uint8), random_expert(FORMATS[0], 0)
    with pytest.raises(CheckpointError, match=r"expected down as torch\.bfloat16"):
        form.write(slab, {**expert, "down": expert["down"].float()})
    with pytest.raises(CheckpointError, match="expected the parts"):
        form.write(slab, {"down": expert["down"]})
    with pytest.raises(CheckpointError, match="here"):
        SlabFormat.from_json({"scheme": "none"}, "here")
