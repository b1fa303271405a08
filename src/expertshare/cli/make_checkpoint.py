"""`expertshare make-checkpoint`: a random model of a released one's shapes, for measuring memory and speed."""

from __future__ import annotations

from pathlib import Path

from expertshare.cli import flags
from expertshare.cli.console import bytes_progress, megabytes, people, print_json
from expertshare.cli.convert import QuantisationOptions
from expertshare.cli.options import option
from expertshare.convert.sizes import VANILLA_UNIQUE, default_unique, likeness
from expertshare.lab.random_checkpoint.make_checkpoint import make_checkpoint as make

EXAMPLE = "Example: expertshare make-checkpoint --like llada2.0-mini --layers 4 --quantise int4 --out checkpoints/mini"


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
    """Write a random checkpoint for benchmarks: real shapes, routers that agree as trained ones do, no knowledge."""
    config = likeness(like, layers=layers, experts=experts)
    wanted = default_unique(like, config) if unique is None else unique
    with bytes_progress() as on_progress:
        made = make(config, out, unique=wanted, layout=layout, seed=seed, on_progress=on_progress, **stored.arguments())
    size = sum(path.stat().st_size for path in made.path.iterdir())
    people(as_json=as_json).print(
        f"{made.path} {'is written' if made.fresh else 'was there already, made in the same way'}: "
        f"{megabytes(size)} MB.\n"
        f"Unique experts per block and layer on the calibration blocks: {made.unique:.1f}, asked for {wanted} "
        f"(lowest layer {min(made.unique_by_layer):.1f}, highest {max(made.unique_by_layer):.1f}).\n"
        f"Try: expertshare generate {made.path} --prompt 'Hello' --gen-length {config.block_length}",
        soft_wrap=True,
    )
    if as_json:
        print_json(
            {
                "path": str(made.path),
                "like": like,
                "layout": layout,
                "quantise": stored.quantise,
                "quantise_embeddings": stored.quantise_embeddings,
                "bytes": size,
                "fresh": made.fresh,
                "unique_requested": wanted,
                "unique_experts": made.unique,
                "unique_experts_by_layer": list(made.unique_by_layer),
                "seed": seed,
            }
        )
