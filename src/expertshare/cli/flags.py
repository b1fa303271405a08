"""Options that several verbs have, each declared here once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from expertshare import native
from expertshare.cli.options import OptionGroup, check_at_least_one, keyword, option
from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError, PolicyError
from expertshare.experts import ExpertMemory, StoreOptions
from expertshare.routing import POLICIES, RoutingPolicy, make_policy, parse_knob, parse_policy
from expertshare.tuning.policy_file import PolicyFile, read_policy_file

Model = Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")]
JudgedPrompts = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help='JSONL file of objects with "prompt" and, for accuracy, "reference", "task", "tests". Code that the '
        "model writes for code tasks is run, in a sandbox with limits that is no security boundary.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Prompts decoded together.")]
Policy = Annotated[
    str | None, typer.Option(help="Policy, or policy:knob=value,... Default: what the model was trained with.")
]
PolicyFromFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Policy file of `expertshare tune`, for this very model.")
]
PoliciesFromFiles = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Also the policy of this file of `expertshare tune`; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout; everything else goes to stderr.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of one operation. Default: OMP_NUM_THREADS if set, else one for each physical core."),
]
ELASTIC = "Every block draws its number of experts, at least this many, so that any budget serves."
ELASTIC_FREE = "Share of blocks that use all experts, with --elastic."
ELASTIC_SETS = "How --elastic draws experts: random, or votes (likelier those that the block votes for)."
MOST_THREADS = 1024


def set_threads(asked: int | None) -> None:
    """Torch's threads, in which our kernels compute too. Raises InputError for fewer than 1 or too many."""
    check_at_least_one("threads", asked)
    if asked is not None and asked > MOST_THREADS:
        raise InputError(f"threads must be at most {MOST_THREADS}, got {asked}")
    if asked is not None:
        native.choose_threads(asked)
    elif not os.environ.get("OMP_NUM_THREADS"):
        native.choose_threads(native.usable_cores())


class Compute(OptionGroup):
    """In which numbers and by what a model computes."""

    dtype: str | None = option("float32 or bfloat16; default: the checkpoint's.", None)
    backend: str = option("Expert computation: auto, cpu, torch or triton.", "auto")


class Device(Compute):
    """Where a model computes, too."""

    device: str = option("Where the model runs: cpu or cuda.", "cpu")


class Answering(Compute):
    """How prompts are given to it, too."""

    chat: bool | None = option("Use the chat template, or not. Default: if there is one.", None, "--chat/--raw")


def _threshold(text: str) -> float | str:
    if text == "none":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a number or none, got {text!r}") from error


class Decoding(OptionGroup):
    """How to decode; `arguments` are fields of DecodingOptions."""

    panel = "Decoding"
    defaults = DecodingOptions()
    gen_length: int = option("Tokens to generate, at most.")
    block_length: int | None = option("Tokens decoded together; default: the model's.")
    steps: int | None = option("Denoising steps per block; default: the block's length.", argument="steps_per_block")
    threshold: Any = option(
        "Commit tokens more probable than this; none: a fixed number per step.",
        read=lambda value: None if value == "none" else value,
        parser=_threshold,
        metavar="P",
    )
    temperature: float = option("0 takes the most probable token.")
    top_k: int | None = option("Sample from this many tokens.")
    top_p: float | None = option("Sample from tokens of this probability mass (not of experts).")
    seed: int = option("Seed of sampling.")
    editing_threshold: float | None = option(
        "Replace committed tokens when another exceeds this (LLaDA2.1); default: never."
    )
    remasking: str = option("Tokens that stay masked: confidence or random.")

    def given(self, context: typer.Context) -> dict[str, Any]:
        """The arguments that were on the command line; the others are left to presets and tasks."""
        sources = [context.get_parameter_source(each.name) for each in fields(self)]
        # by name: typer may bring a click of its own, whose values are not equal to those of the installed one
        named = [source is not None and source.name != "DEFAULT" for source in sources]
        return dict(compress(self.arguments().items(), named))


class Knobs(OptionGroup):
    """The knobs of all policies, from the declarations in POLICIES; `given` holds those that were used."""

    given: Mapping[str, str]

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """One for each knob that any policy has."""
        texts: dict[str, str] = {}
        owners: dict[str, list[str]] = {}
        for name, kind in POLICIES.items():
            for knob in fields(kind):
                texts.setdefault(knob.name, str(knob.metadata.get("help", "")))
                owners.setdefault(knob.name, []).append(name)

        def parameter(knob: str, text: str) -> inspect.Parameter:
            told = f"{text[:1].upper()}{text[1:]}. For {', '.join(owners[knob])}."
            info = typer.Option(_flag(knob), help=told, rich_help_panel="Policy knobs", metavar="VALUE")
            return keyword(knob, str | None, info)

        return [parameter(knob, text) for knob, text in texts.items()]

    @classmethod
    def collect(cls, values: Mapping[str, Any]) -> Self:
        """Leave out what was not given."""
        return cls(given={knob: value for knob, value in values.items() if value is not None})

    def policy(self, text: str | None, file: Path | None = None) -> RoutingPolicy | PolicyFile | None:
        """The policy that --policy and the knob flags, or --policy-file, name; None: left to the checkpoint."""
        if file is not None:
            if text is not None or self.given:
                raise InputError("expected --policy-file alone, got --policy or a knob beside it: choose one way")
            return read_policy_file(file)
        if text is None:
            if self.given:
                flags = ", ".join(map(_flag, self.given))
                raise PolicyError(f"expected --policy beside {flags}, got none: name the policy whose knob it is")
            return None
        if not self.given:
            return parse_policy(text)
        if ":" in text:
            raise InputError(f"expected knobs either in --policy {text!r} or as flags, got both: choose one way")
        return make_policy(text, {knob: parse_knob(value) for knob, value in self.given.items()})


def _flag(knob: str) -> str:
    return f"--{knob.replace('_', '-')}"


class Storage(OptionGroup):
    """How the experts of a converted model are kept."""

    panel = "Experts of a converted model"
    expert_memory: str | None = option(
        "Memory for experts: 3GiB, 800MB, ...; all: every expert (default); mmap: as the kernel decides.",
        None,
        metavar="SIZE",
    )
    host_memory: str | None = option(
        "On a GPU with --expert-memory SIZE: pinned memory of the host for experts, a size or all.",
        None,
        metavar="SIZE",
    )
    direct_io: bool = option("Read experts past the page cache.", False, "--direct-io")
    prefetch: bool = option(
        "While a layer computes, read the next layer's likely experts, within the same memory.",
        True,
        "--prefetch/--no-prefetch",
    )

    def store(self) -> StoreOptions | None:
        """The store that was asked for; None where nothing was. Raises InputError for an unreadable size."""
        if self == Storage():
            return None
        return StoreOptions(
            memory=ExpertMemory.parse(self.expert_memory or "all"),
            direct=self.direct_io,
            prefetch=self.prefetch,
            host_memory=None if self.host_memory is None else ExpertMemory.parse_host(self.host_memory),
        )


class Ray(OptionGroup):
    """Whether and where to use Ray."""

    panel = "Scale-out"
    ray: bool = option("Use Ray: that of --ray-address, else one that is started for this.", False, "--ray")
    ray_address: str | None = option(
        "Ray cluster to use; `auto`: the one of this machine. Default: RAY_ADDRESS.", None, metavar="HOST:PORT"
    )
