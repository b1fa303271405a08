"""Layer files and the manifest: what they hold, and how damage shows."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertshare.convert import verify
from expertshare.convert.writing import json_bytes, layer_file_bytes, write_layer
from expertshare.errors import CheckpointError
from expertshare.experts.layout import (
    MANIFEST,
    ExpertLayout,
    FileRecord,
    LayerFile,
    LayerHeader,
    has_expert_layout,
    layer_file_name,
    open_layers,
    read_manifest,
    verify_layer,
)
from expertshare.experts.slab import SlabFormat

FORM = SlabFormat(scheme="int8", hidden=48, inner=32)
HEADER = LayerHeader(moe_layer=3, num_experts=5, format=FORM)


def random_slabs(seed: int = 0) -> torch.Tensor:
    shape = (HEADER.num_experts, FORM.slab_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write(path: Path, slabs: torch.Tensor, header: LayerHeader = HEADER) -> str:
    return write_layer(header, slabs, path)


def test_safetensors_reads_a_layer_file(tmp_path: Path) -> None:
    slabs, path = random_slabs(), tmp_path / "experts.safetensors"
    digest = write(path, slabs)
    found = load_file(path)
    assert torch.equal(found["slabs"], slabs)
    assert found["crc32"].tolist() == [zlib.crc32(slab.numpy()) for slab in slabs]
    assert FileRecord.of(path) == FileRecord(path.name, layer_file_bytes(HEADER), digest)
    verify_layer(path)


def test_every_slab_lies_at_a_page_and_is_read_whole(tmp_path: Path) -> None:
    slabs, path = random_slabs(), tmp_path / "experts.safetensors"
    write(path, slabs)
    raw = path.read_bytes()
    with LayerFile(path) as file:
        assert file.header == HEADER
        for expert, slab in enumerate(slabs):
            offset, memory = file.offset(expert), bytearray(FORM.slab_bytes)
            file.read_into(expert, memoryview(memory))
            assert offset % 4096 == 0
            assert bytes(memory) == slab.numpy().tobytes() == raw[offset : offset + FORM.slab_bytes]


@pytest.mark.parametrize("size", [0, 5, 100, 4096, 4097, -4096, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "experts.safetensors"
    write(path, random_slabs())
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(CheckpointError, match=r"experts\.safetensors"):
        LayerFile(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    write(path, random_slabs())
    with LayerFile(path) as file:
        offset = file.offset(2) + 77
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="expert 2 has checksum"):
        verify_layer(path)


def test_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    write(path, random_slabs())
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"expertshare_experts": "2"', b'"expertshare_experts": "1"', 1))
    with pytest.raises(CheckpointError, match="version 1 of the expert layout, expected 2 for int8: convert"):
        LayerFile(path)
    path.write_bytes(raw.replace(b'"expertshare_experts"', b'"somebody_elses_fact"', 1))
    with pytest.raises(CheckpointError, match="holds no experts in slabs"):
        LayerFile(path)
    with pytest.raises(CheckpointError, match="is not there"):
        LayerFile(tmp_path / "absent.safetensors")


def converted(directory: Path) -> ExpertLayout:
    records = []
    for layer in range(2):
        header = LayerHeader(moe_layer=layer, num_experts=HEADER.num_experts, format=FORM)
        write(directory / layer_file_name(layer), random_slabs(layer), header)
        records.append(FileRecord.of(directory / layer_file_name(layer)))
    layout = ExpertLayout(format=FORM, num_experts=5, expert_files=tuple(records), source={"name": "somewhere"})
    (directory / MANIFEST).write_bytes(json_bytes(layout.to_json()))
    return layout


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    assert not has_expert_layout(tmp_path)
    layout = converted(tmp_path)
    assert has_expert_layout(tmp_path)
    assert read_manifest(tmp_path) == layout
    assert verify(tmp_path) == sum(record.num_bytes for record in layout.expert_files)
    files = open_layers(tmp_path, layout)
    assert [file.header.moe_layer for file in files] == [0, 1]
    for file in files:
        file.close()


def test_files_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    layout = converted(tmp_path)
    first, second = (tmp_path / layer_file_name(layer) for layer in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"moe_layer=1.*expected.*moe_layer=0"):
        open_layers(tmp_path, layout)
    with pytest.raises(CheckpointError, match="has checksum"):
        verify(tmp_path)
    first.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="bytes, expected"):
        read_manifest(tmp_path)
    first.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        read_manifest(tmp_path)


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    converted(tmp_path)
    manifest = tmp_path / MANIFEST
    good = json.loads(manifest.read_text())
    for change, message in [
        ({"version": 9}, "version 9"),
        ({"num_layers": 3}, "lists 2 expert files, expected 3"),
        ({"expert_files": [{"name": "../elsewhere", "bytes": 1, "sha256": ""}]}, "not the name of a file"),
        ({"slab": {}}, "scheme's keys"),
    ]:
        manifest.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            read_manifest(tmp_path)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_manifest(tmp_path)
    manifest.unlink()
    with pytest.raises(CheckpointError, match="not a converted model"):
        read_manifest(tmp_path)
