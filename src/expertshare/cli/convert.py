"""`expertshare convert`: a checkpoint into the layout whose experts can be read one at a time, and back. `expertshare
make-checkpoint`: a random model of a released one's shapes, for measuring memory and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertshare.cli import flags
from expertshare.cli.console import bytes_progress, megabytes, people, print_json
from expertshare.cli.options import OptionGroup, option
from expertshare.convert import convert as convert_model
from expertshare.convert import restore, verify
from expertshare.convert.sizes import VANILLA_UNIQUE, default_unique, likeness
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.experts import parse_size

LAYOUTS = ("experts", "huggingface")
SHARD_SIZE = "5GB"


class QuantisationOptions(OptionGroup):
    """In how many bits weights are stored."""

    quantise: str = option("How experts are stored: none, int8 or int4.", "none")
    group_size: int | None = option("Weights per scale with int4: 32 or 64.", None)
    quantise_embeddings: str = option("Embedding and head: none or int8.", "none")


def convert(
    source: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to make. Until it is complete it is called OUT.partial.")],
    stored: QuantisationOptions,
    to: str = option("Layout to write: experts or huggingface.", "experts"),
    shard_size: str | None = option("Largest file with --to huggingface; default: 5GB.", None),
    check: bool = option("Read everything back and compare checksums.", False, "--verify"),
    as_json: flags.Json = False,
) -> None:
    """Rewrite a checkpoint expert by expert, for --expert-memory. Run again, an interrupted conversion goes on.

    Example: expertshare convert path/to/model path/to/converted --quantise int4 --verify   (and back: expertshare
    convert path/to/converted path/to/model --to huggingface)
    """
    if to not in LAYOUTS:
        raise ConfigError(f"unknown layout {to!r}. {nearest(to, LAYOUTS)}")
    if to == "huggingface" and stored != QuantisationOptions():
        raise InputError(
            "the Hugging Face layout is written as the source was: leave out --quantise, --group-size and "
            "--quantise-embeddings"
        )
    if to == "experts" and shard_size is not None:
        raise InputError("--shard-size belongs to --to huggingface: leave it out")
    with bytes_progress() as on_progress:
        if to == "experts":
            done = convert_model(source, out, **stored.arguments(), on_progress=on_progress)
        else:
            done = restore(source, out, max_shard_bytes=parse_size(shard_size or SHARD_SIZE), on_progress=on_progress)
        verified = verify(out, on_progress) if check else None
    checked = "" if verified is None else f" All {megabytes(verified)} MB were read back and are right."
    state = "is written" if done.fresh else "was there already, made from the same source in the same way"
    more = {"fresh": done.fresh, "verified_bytes": verified}
    _tell(done.path, to, stored, state, checked, as_json, **more)


def _tell(
    path: Path, layout: str, stored: QuantisationOptions, state: str, told: str, as_json: bool, **more: Any
) -> None:
    """Say in which state a checkpoint is. told, more: what else there is to say of it to people, and in JSON."""
    size = sum(file.stat().st_size for file in path.iterdir())
    people(as_json=as_json).print(f"{path} {state}: {megabytes(size)} MB.{told}", soft_wrap=True)
    if as_json:
        quantised = {"quantise": stored.quantise, "quantise_embeddings": stored.quantise_embeddings}
        print_json({"path": str(path), "layout": layout, **quantised, "bytes": size, **more})


def make_checkpoint(
    *,
    like: str = option(f"Whose shapes: {', '.join(VANILLA_UNIQUE)}."),
    out: Path = option("Directory to make. Until it is complete it is called OUT.partial."),
    stored: QuantisationOptions,
    layers: int | None = option("Layers, leading dense ones included. Default: all.", None),
    experts: int | None = option("Experts per layer instead of the model's number.", None),
    unique: int | None = option("Experts that a block uses in a layer without sharing. Default: as published.", None),
    seed: int = option("Seed of all weights.", 0),
    layout: str = option("Layout to write: experts or huggingface.", "experts"),
    as_json: flags.Json = False,
) -> None:
    """Write a random checkpoint for benchmarks: real shapes, routers that agree as trained ones do, no knowledge.

    Example: expertshare make-checkpoint --like llada2.0-mini --layers 4 --quantise int4 --out checkpoints/mini
    """
    from expertshare.lab.random_checkpoint.make_checkpoint import make_checkpoint as make  # of the laboratory

    config = likeness(like, layers=layers, experts=experts)
    wanted = default_unique(like, config) if unique is None else unique
    with bytes_progress() as on_progress:
        made = make(config, out, unique=wanted, layout=layout, seed=seed, on_progress=on_progress, **stored.arguments())
    told = (
        f"\nUnique experts per block and layer on the calibration blocks: {made.unique:.1f}, asked for {wanted} "
        f"(lowest layer {min(made.unique_by_layer):.1f}, highest {max(made.unique_by_layer):.1f}).\n"
        f"Try: expertshare generate {made.path} --prompt 'Hello' --gen-length {config.block_length}"
    )
    found = {"unique_experts": made.unique, "unique_experts_by_layer": list(made.unique_by_layer)}
    state = "is written" if made.fresh else "was there already, made in the same way"
    more = {"fresh": made.fresh, "like": like, "unique_requested": wanted, **found, "seed": seed}
    _tell(made.path, layout, stored, state, told, as_json, **more)
