"""Load a model from a Hugging Face layout, straight into the fused parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from expertshare.config import ModelConfig
from expertshare.errors import CheckpointError, ConfigError, ExpertMemoryError, nearest
from expertshare.experts import ExpertLayout, ExpertMemory, has_expert_layout, read_manifest
from expertshare.experts.layout import DENSE
from expertshare.experts.opening import StoreOptions, num_kept
from expertshare.experts.slab import format_size
from expertshare.measure.memory import free_memory_bytes, usable_memory_bytes
from expertshare.models.checkpoint import (
    WEIGHTS,
    StoredTensor,
    check_names,
    check_tensors,
    choose_targets,
    leave_out,
    loaded_bytes,
    read_headers,
    read_json,
    read_optional_json,
    read_tensors,
    refuse_quantised,
    resolve_source,
)
from expertshare.models.family import Target, family_of, quantised_targets
from expertshare.models.layers import QuantisedVocabulary
from expertshare.models.moe import Router, lay_side_by_side, narrow
from expertshare.models.tokenizer import load_tokenizer, token_ids
from expertshare.models.transformer import MoETransformer, leave_out_experts, quantise_vocabulary
from expertshare.native import ask_for_huge_pages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that is ready to run, what it was loaded from, and its tokenizer (None where it comes with none).

    layout: of a converted model, whose experts are not in `model`: open a store for them (experts.open_store).
    """

    model: MoETransformer
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase | None
    path: Path
    layout: ExpertLayout | None = None


def load_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    expert_memory: ExpertMemory | None = None,
) -> LoadedModel:
    """Load a directory or a hub id. dtype: float32 or bfloat16, by default the checkpoint's own.

    Of a directory that `expertshare convert` wrote, everything but the experts is loaded. Routers compute in float32
    whatever the dtype. A float16 checkpoint is computed in float32 unless told otherwise. device: cpu or cuda.
    expert_memory: what will be given to the experts of a converted model, where that is known.
    Raises InputError, ConfigError or CheckpointError, each naming the file, key or tensor; ExpertMemoryError, before
    weights are read, for a model that does not fit into memory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    device = usable_device(device)
    path = resolve_source(source)
    raw = read_json(path / "config.json")
    refuse_quantised(raw, path)
    family = family_of(raw)
    tokenizer = load_tokenizer(path)
    generation = read_optional_json(path / "generation_config.json")
    config = family.parse_config(raw, generation, token_ids(tokenizer))
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model embeds {config.vocab_size} (vocab_size in "
            "config.json): they do not belong together"
        )
    layout = read_manifest(path) if has_expert_layout(path) else None
    stored = read_headers(path) if layout is None else read_headers(path, DENSE)
    stored = leave_out(stored, raw, config)
    check_fits(path, expert_memory, dtype=dtype, device=device, stored=stored)
    targets = choose_targets(family, config, stored)
    with torch.device("meta"):
        model = MoETransformer(config)
    if layout is not None:
        check_layout(layout, config, dtype)
        leave_out_experts(model)
        targets = [target for target in targets if ".experts." not in target.entry]
        dtype = dtype or layout.format.float_dtype or own_dtype(stored, targets)
        if layout.embeddings != "none":
            targets = [part for target in targets for part in quantised_targets(target)]
            quantise_vocabulary(model)
    check_names(stored, targets, path)
    check_tensors(stored, targets, model.state_dict())
    model = _allocate(model, dtype or own_dtype(stored, targets), device)
    _fill(model, stored, targets)
    if model.dtype is torch.bfloat16:
        narrow(_routers(model))
    return LoadedModel(model=model.eval(), config=config, tokenizer=tokenizer, path=path, layout=layout)


def check_layout(layout: ExpertLayout, config: ModelConfig, dtype: torch.dtype | None) -> None:
    """Raise CheckpointError unless the experts are those of `config`, ConfigError unless they compute in `dtype`."""
    form = layout.format
    found = (layout.num_layers, layout.num_experts, form.hidden, form.inner)
    expected = (config.num_moe_layers, config.router.num_experts, config.hidden_size, config.expert_hidden)
    if found != expected:
        raise CheckpointError(
            f"the expert files hold (MoE layers, experts, features, hidden features) = {found}, expected {expected} by "
            "config.json: convert the model again"
        )
    if dtype is not None and form.float_dtype not in (None, dtype):
        raise ConfigError(
            f"the experts are stored in {form.dtype}, and computed as they are stored; expected that dtype, got "
            f"{str(dtype).removeprefix('torch.')}: leave it out, or convert the model to it"
        )


def _allocate(model: MoETransformer, dtype: torch.dtype, device: str | torch.device) -> MoETransformer:
    """Memory for a model on the meta device, uninitialised: the checkpoint fills all of it."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, (Router, QuantisedVocabulary)):
            module.float()
    model = model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        ask_for_huge_pages(tensor)
    lay_side_by_side(_routers(model))
    embed, head = model.embed, model.head
    # to_empty gave each of the two a tensor of its own
    if model.config.tie_embeddings and isinstance(embed, nn.Embedding) and isinstance(head, nn.Linear):
        head.weight = embed.weight
    return model


def _routers(model: MoETransformer) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _fill(model: MoETransformer, stored: Mapping[str, StoredTensor], targets: Sequence[Target]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for target, tensor in read_tensors(stored, targets):
            if ".router." in target.entry and not tensor.isfinite().all():
                raise CheckpointError(
                    f"{target.name} in {stored[target.name].file} holds NaN or infinity, expected finite numbers: the "
                    "router would leave experts out without a word. Download the checkpoint again"
                )
            target.of(state[target.entry]).copy_(tensor)


def own_dtype(stored: Mapping[str, StoredTensor], targets: Sequence[Target]) -> torch.dtype:
    """The dtype to compute a checkpoint in by default: bfloat16 if its embedding (the final norm where that is
    quantised) is stored so, else float32."""
    names = (target.name for entry in ("embed.weight", "norm.weight") for target in targets if target.entry == entry)
    in_bfloat16 = next((stored[name].dtype == "BF16" for name in names if name in stored), False)
    return torch.bfloat16 if in_bfloat16 else torch.float32


def usable_device(device: str | torch.device) -> torch.device:
    """The device as torch knows it. Raises ConfigError for a name that is none, and for a GPU that is not there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {str(device)!r}. {nearest(str(device), DEVICES)}") from error
    if found.type not in DEVICES:
        raise ConfigError(f"expected the CPU or a GPU of NVIDIA, got the device {str(device)!r}: use cpu or cuda.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "expected a GPU, because device 'cuda' was asked for, but torch sees none (torch.cuda.is_available() is "
            "false). Use the device 'cpu', or a machine and a build of torch with CUDA."
        )
    number = found.index or 0
    if found.type == "cuda" and number >= torch.cuda.device_count():
        raise ConfigError(
            f"expected a GPU below {torch.cuda.device_count()}, as many as torch sees, got device {str(device)!r}: "
            "use another number"
        )
    return found


def check_fits(
    path: Path,
    memory: ExpertMemory | None = None,
    *,
    dtype: torch.dtype | None = None,
    dense_is_loaded: bool = False,
    available_bytes: int | None = None,
    device: torch.device = _CPU,
    stored: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Raise ExpertMemoryError unless the weights of a model directory fit into memory, with what would fit instead.

    memory: where experts of a converted model are to live; None leaves them out. Other models have theirs in memory.
    dtype: to load in. dense_is_loaded: only the experts of a converted model are still to come. available_bytes: by
    default what the system and the control group, or a GPU, have left; nothing is refused where nobody says. Reads
    headers only, unless they are given (stored); raises CheckpointError for a directory that is no model.
    """
    available = free_memory_bytes(device) if available_bytes is None else available_bytes
    converted = has_expert_layout(path)
    own = 0
    if not dense_is_loaded:
        stored = read_headers(path, DENSE if converted else WEIGHTS) if stored is None else stored
        own = loaded_bytes(stored.values(), dtype)
    experts = _expert_bytes(path, memory) if converted and memory is not None else 0
    if available is None or own + experts <= available:
        return
    advice = _advice(path, converted=converted, left=available - own, experts=experts)
    where = "" if device == _CPU else f" of {device}"
    raise ExpertMemoryError(
        f"the weights of {path} need {format_size(own + experts)} of memory{where}, but "
        f"{_rounded_down(available)} can be had. {advice}"
    )


def check_pinned_fits(path: Path, options: StoreOptions, available_bytes: int | None = None) -> None:
    """Raise ExpertMemoryError unless the host has memory for the experts that a store beside a GPU keeps there. Pinned
    memory is taken when the store is opened, and cannot be swapped out."""
    layout = read_manifest(path)
    needed = num_kept(layout, options) * layout.format.slab_bytes
    available = usable_memory_bytes() if available_bytes is None else available_bytes
    if available is not None and needed > available:
        raise ExpertMemoryError(
            f"--host-memory would pin {format_size(needed)} of the host's memory, but {_rounded_down(available)} can "
            "be had: lower it"
        )


def _expert_bytes(path: Path, memory: ExpertMemory) -> int:
    """Memory of experts in a store. Pages of a mapping are the kernel's to drop."""
    layout = read_manifest(path)
    whole = layout.num_layers * layout.num_experts * layout.format.slab_bytes
    return {"all": whole, "mmap": 0, "budget": min(memory.num_bytes, whole)}[memory.kind]


def _advice(path: Path, *, converted: bool, left: int, experts: int) -> str:
    if not converted:
        return (
            f"Convert it (`expertshare convert {path} OUT --quantise int4`) and use --expert-memory, after "
            f"`expertshare plan {path}` has said how much"
        )
    if left <= 0 or not experts:
        return "Its dense part alone does not fit: close other programs, or use a smaller model"
    return (
        f"At most {_rounded_down(left)} are left for experts; `expertshare plan {path}` says what of that to give to "
        "--expert-memory"
    )


def _rounded_down(num_bytes: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if num_bytes >= u), (1, "B"))
    return f"{num_bytes * 10 // unit / 10:g}{name}"
