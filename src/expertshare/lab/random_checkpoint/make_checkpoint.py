"""`expertshare make-checkpoint`: a random checkpoint of a released model's shapes, for measuring memory and speed."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from expertshare.config import ModelConfig
from expertshare.convert.convert import MAX_SHARD_BYTES
from expertshare.convert.storage import FLOAT_NAMES, check_embeddings, settings_of, slab_format
from expertshare.convert.workspace import is_complete, open_workspace
from expertshare.convert.writing import Progress, SmallFile, json_bytes, silent, write_expert_layout, write_huggingface
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.lab.random_checkpoint.characters import tokenizer_files
from expertshare.lab.random_checkpoint.random_source import RandomSource
from expertshare.lab.random_checkpoint.random_tensors import RandomModel
from expertshare.models.checkpoint import generation_config, read_json
from expertshare.models.family import family_named

METHOD = 1
"""Goes up when the same recipe gives other bytes."""
MEASURED = "random_model.json"
"""Beside the model: what it was made from, and what was measured on the calibration blocks."""
LAYOUTS = ("experts", "huggingface")


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeCheckpoint:
    """unique_by_layer: experts that the calibration blocks use in each MoE layer, mean over blocks. activations: root
    mean square of the residual stream behind each of those layers. fresh: False where it already was there."""

    path: Path
    fresh: bool
    unique_by_layer: tuple[float, ...]
    activations: tuple[float, ...]

    @property
    def unique(self) -> float:
        """Unique experts of a block, mean over layers."""
        return sum(self.unique_by_layer) / len(self.unique_by_layer)


def make_checkpoint(
    config: ModelConfig,
    out: str | os.PathLike[str],
    *,
    unique: int,
    quantise: str = "none",
    group_size: int | None = None,
    quantise_embeddings: str = "none",
    layout: str = "experts",
    seed: int = 0,
    dtype: str = "BF16",
    on_progress: Progress = silent,
) -> MadeCheckpoint:
    """Write a random model of this configuration; docs/memory.md describes how it is made.

    unique: experts per block and layer that vanilla routing should use. quantise: none, int8 or int4, of experts;
    quantise_embeddings: none or int8. layout: "experts" or "huggingface" (which is not quantised). Resumable and atomic
    as `convert`. Raises subclasses of ExpertShareError for options that do not go together, an OUT that is something
    else, a full disk.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}. {nearest(layout, LAYOUTS)}")
    check_embeddings(quantise_embeddings)
    for what, stored, advice in (
        ("experts", quantise, "--quantise none"),
        ("embeddings", quantise_embeddings, "leave --quantise-embeddings out"),
    ):
        if layout == "huggingface" and stored != "none":
            raise InputError(f"the Hugging Face layout holds no {stored} {what}: use --layout experts, or {advice}")
    least, most = config.router.top_k, config.router.num_experts
    if not least <= unique <= most:
        raise InputError(f"--unique must lie in {least}..{most}, from experts per token to all, got {unique}")
    form = slab_format(config, quantise, group_size=group_size, expert_dtype=dtype)
    model = RandomModel(config=config, unique=unique, seed=seed, dtype=dtype)
    recipe = {"kind": "random", "method": METHOD, **asdict(model)}
    settings = settings_of(layout, form, quantise_embeddings, recipe=recipe)
    target = Path(out).expanduser()
    complete = is_complete(target, settings)
    if not complete:
        source = RandomSource(model, form)
        files: dict[str, SmallFile] = {
            "config.json": json_bytes({**family_named(config.family).to_config(config), "dtype": FLOAT_NAMES[dtype]}),
            "generation_config.json": json_bytes(generation_config(config)),
            **tokenizer_files(config),
            MEASURED: lambda: json_bytes({"recipe": asdict(model), **source.measured()}),
        }
        with open_workspace(target, settings) as work:
            if layout == "experts":
                write_expert_layout(
                    source,
                    work,
                    form,
                    files=files,
                    provenance={**recipe, "expert_dtype": dtype},
                    embeddings=quantise_embeddings,
                    on_progress=on_progress,
                )
            else:
                write_huggingface(
                    source,
                    work,
                    expert_dtype=dtype,
                    merged=False,
                    max_shard_bytes=MAX_SHARD_BYTES,
                    files=files,
                    on_progress=on_progress,
                )
    measured = read_json(target / MEASURED)
    return MadeCheckpoint(
        path=target,
        fresh=not complete,
        unique_by_layer=tuple(measured["unique_by_layer"]),
        activations=tuple(measured["activations"]),
    )
