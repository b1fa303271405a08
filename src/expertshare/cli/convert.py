"""`expertshare convert`: a checkpoint into the layout whose experts can be read one at a time, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertshare.cli import flags
from expertshare.cli.console import bytes_progress, megabytes, people, print_json
from expertshare.cli.options import OptionGroup, option
from expertshare.convert import convert as convert_model
from expertshare.convert import restore, verify
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.experts import parse_size

EXAMPLE = (
    "Example: expertshare convert path/to/model path/to/converted --quantise int4 --verify   "
    "(and back: expertshare convert path/to/converted path/to/model --to huggingface)"
)
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
    """Rewrite a checkpoint expert by expert, for --expert-memory. Run again, an interrupted conversion goes on."""
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
    size = sum(path.stat().st_size for path in done.path.iterdir())
    state = "is written" if done.fresh else "was there already, made from the same source in the same way"
    checked = "" if verified is None else f" All {megabytes(verified)} MB were read back and are right."
    people(as_json=as_json).print(f"{done.path} {state}: {megabytes(size)} MB.{checked}", soft_wrap=True)
    if as_json:
        print_json(
            {
                "path": str(done.path),
                "layout": to,
                "quantise": stored.quantise,
                "quantise_embeddings": stored.quantise_embeddings,
                "bytes": size,
                "fresh": done.fresh,
                "verified_bytes": verified,
            }
        )
