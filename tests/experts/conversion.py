"""A converted model of random experts, and one made from a loaded model: written with the library's own writer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertshare.convert.writing import json_bytes, write_layer
from expertshare.experts import ResidentExperts, SlabFormat
from expertshare.experts.layout import DENSE, MANIFEST, ExpertLayout, FileRecord, LayerHeader, layer_file_name
from expertshare.models import load_model

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
        write_layer(LayerHeader(moe_layer=layer, num_experts=len(slabs), format=form), slabs, path)
        records.append(FileRecord.of(path))
    layout = ExpertLayout(format=form, num_experts=len(layers[0]), expert_files=tuple(records))
    (directory / MANIFEST).write_bytes(json_bytes(layout.to_json()))
    return layout


def random_model(directory: Path, num_layers: int, num_experts: int, form: SlabFormat = FORM) -> ExpertLayout:
    """Experts only."""
    return write_layers(directory, form, [random_slabs(form, layer, num_experts) for layer in range(num_layers)])


def convert(source: Path, directory: Path, dtype: torch.dtype | None = None) -> Path:
    """`source`, a model in Hugging Face layout in one file, in the expert layout, its experts in `dtype`."""
    loaded = load_model(source, dtype)
    config, width = loaded.config, str(loaded.model.dtype).removeprefix("torch.")
    form = SlabFormat(scheme="none", hidden=config.hidden_size, inner=config.expert_hidden, dtype=width)
    layers = []
    for module in loaded.model.modules():
        if isinstance(module, ResidentExperts):
            slabs = torch.empty(config.router.num_experts, form.slab_bytes, dtype=torch.uint8)
            for expert, slab in enumerate(slabs):
                bank = module.bank()
                matrices = {"gate_up": bank.gate_up_EHD[expert], "down": bank.down_EDF[expert]}
                form.write(slab, {name: matrix.detach() for name, matrix in matrices.items()})
            layers.append(slabs)
    directory.mkdir()
    for path in source.glob("*.json"):
        shutil.copyfile(path, directory / path.name)
    dense = {n: t for n, t in load_file(source / "model.safetensors").items() if ".mlp.experts." not in n}
    save_file(dense, directory / DENSE, metadata={"format": "pt"})
    write_layers(directory, form, layers)
    return directory
