"""A converted model of random experts, and one made from a loaded model: written with the library's own writer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from expertshare.experts import SlabFormat
from expertshare.experts.layout import ExpertLayout, FileRecord, layer_file_name, write_manifest
from expertshare.experts.slab_file import LayerHeader, LayerWriter

FORM = SlabFormat(scheme="none", hidden=16, inner=8, dtype="float32")


def random_slabs(form: SlabFormat, layer: int, num_experts: int) -> Tensor:
    """uint8 [E, slab_bytes] whose first two bytes name the expert: an expert of another layer or row shows."""
    generator = torch.Generator().manual_seed(layer)
    slabs = torch.randint(0, 256, (num_experts, form.slab_bytes), dtype=torch.uint8, generator=generator)
    slabs[:, 0], slabs[:, 1] = layer, torch.arange(num_experts)
    return slabs


def write_layers(directory: Path, form: SlabFormat, layers: list[Tensor]) -> ExpertLayout:
    """Layer files and the manifest of slabs uint8 [E, slab_bytes]."""
    records = []
    for layer, slabs in enumerate(layers):
        path = directory / layer_file_name(layer)
        with LayerWriter(path, LayerHeader(moe_layer=layer, num_experts=len(slabs), format=form)) as writer:
            for slab in slabs:
                writer.append(slab)
        records.append(FileRecord(path.name, writer.num_bytes, writer.sha256))
    layout = ExpertLayout(format=form, num_experts=len(layers[0]), expert_files=tuple(records))
    write_manifest(directory, layout)
    return layout


def random_model(directory: Path, num_layers: int, num_experts: int, form: SlabFormat = FORM) -> ExpertLayout:
    """Experts only."""
    return write_layers(directory, form, [random_slabs(form, layer, num_experts) for layer in range(num_layers)])
