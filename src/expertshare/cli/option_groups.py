"""Options that several verbs share, declared once.

A verb takes a group as one parameter; `with_option_groups` puts the group's options in its place, where typer finds
them, and builds the group from what was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Protocol, Self, get_type_hints

import typer

from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError, PolicyError
from expertshare.experts import ExpertMemory, StoreOptions
from expertshare.routing import POLICIES, make_policy, parse_knob, parse_policy
from expertshare.tuning import PolicyFile, read_policy_file
from expertshare.types import RoutingPolicy

DECODING_PANEL, KNOB_PANEL, STORE_PANEL = "Decoding", "Policy knobs", "Experts of a converted model"
_DEFAULTS = DecodingOptions()


class OptionGroup(Protocol):
    """Several options as one value."""

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """The options, as keyword-only parameters with typer annotations."""
        ...

    @classmethod
    def collect(cls, values: Mapping[str, Any]) -> Self:
        """The group from its options' values."""
        ...


def with_option_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """Flatten every parameter of `verb` that is an option group."""
    signature = inspect.signature(verb, eval_str=True)
    groups = {p.name: p.annotation for p in signature.parameters.values() if hasattr(p.annotation, "collect")}
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name not in groups
    ]
    shared = {name: group.parameters() for name, group in groups.items()}

    @wraps(verb)
    def flattened(**values: Any) -> None:
        collected = {
            name: group.collect({p.name: values.pop(p.name) for p in shared[name]}) for name, group in groups.items()
        }
        verb(**values, **collected)

    everything = [*own, *(p for parameters in shared.values() for p in parameters)]
    flattened.__signature__ = signature.replace(parameters=everything)  # type: ignore[attr-defined]
    return flattened


def _threshold(text: str) -> float | str:
    if text == "none":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a number or none, got {text!r}") from error


def _option(help_text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=DECODING_PANEL, show_default=True, **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingFlags:
    """How to decode, as flags; `options` names them as DecodingOptions does."""

    gen_length: Annotated[int, _option("Tokens to generate, at most.")] = _DEFAULTS.gen_length
    block_length: Annotated[int | None, _option("Tokens decoded together; default: the model's.")] = None
    steps: Annotated[int | None, _option("Denoising steps per block; default: the block's length.")] = None
    threshold: Annotated[
        Any,
        _option(
            "Commit tokens more probable than this; none: a fixed number per step.", parser=_threshold, metavar="P"
        ),
    ] = _DEFAULTS.threshold
    temperature: Annotated[float, _option("0 takes the most probable token.")] = _DEFAULTS.temperature
    top_k: Annotated[int | None, _option("Sample from this many tokens.")] = None
    top_p: Annotated[float | None, _option("Sample from tokens of this probability mass (not of experts).")] = None
    seed: Annotated[int, _option("Seed of sampling.")] = _DEFAULTS.seed
    editing_threshold: Annotated[
        float | None, _option("Replace committed tokens when another exceeds this (LLaDA2.1); default: never.")
    ] = None
    remasking: Annotated[str, _option("Tokens that stay masked: confidence or random.")] = _DEFAULTS.remasking

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """One for each field."""
        hints = get_type_hints(cls, include_extras=True)
        return [_parameter(field.name, hints[field.name], field.default) for field in fields(cls)]

    @classmethod
    def collect(cls, values: Mapping[str, Any]) -> Self:
        """The flags as given."""
        return cls(**values)

    def options(self) -> dict[str, Any]:
        """Fields of DecodingOptions."""
        values = asdict(self)
        values["steps_per_block"] = values.pop("steps")
        values["threshold"] = None if self.threshold == "none" else self.threshold
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobFlags:
    """The knobs of all policies as flags, from the POLICIES table; `given` holds those that were used."""

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
        return [
            _parameter(
                knob,
                Annotated[
                    str | None,
                    typer.Option(
                        f"--{knob.replace('_', '-')}",
                        help=f"{text[:1].upper()}{text[1:]}. For {', '.join(owners[knob])}.",
                        rich_help_panel=KNOB_PANEL,
                        metavar="VALUE",
                    ),
                ],
                None,
            )
            for knob, text in texts.items()
        ]

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
                flags = ", ".join(f"--{knob.replace('_', '-')}" for knob in self.given)
                raise PolicyError(f"expected --policy beside {flags}, got none: name the policy whose knob it is")
            return None
        if not self.given:
            return parse_policy(text)
        if ":" in text:
            raise InputError(f"expected knobs either in --policy {text!r} or as flags, got both: choose one way")
        return make_policy(text, {knob: parse_knob(value) for knob, value in self.given.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFlags:
    """How the experts of a converted model are kept, as flags."""

    expert_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for experts: 3GiB, 800MB, ...; all: every expert (default); mmap: as the kernel decides.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="On a GPU with --expert-memory SIZE: pinned memory of the host for experts, a size or all.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = None
    direct_io: Annotated[
        bool, typer.Option("--direct-io", help="Read experts past the page cache.", rich_help_panel=STORE_PANEL)
    ] = False
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch/--no-prefetch",
            help="While a layer computes, read the next layer's likely experts, within the same memory.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = True

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """One for each field."""
        hints = get_type_hints(cls, include_extras=True)
        return [_parameter(field.name, hints[field.name], field.default) for field in fields(cls)]

    @classmethod
    def collect(cls, values: Mapping[str, Any]) -> Self:
        """The flags as given."""
        return cls(**values)

    def options(self) -> StoreOptions | None:
        """The store that was asked for; None where nothing was. Raises InputError for an unreadable size."""
        if self == StoreFlags():
            return None
        return StoreOptions(
            memory=ExpertMemory.parse(self.expert_memory or "all"),
            direct=self.direct_io,
            prefetch=self.prefetch,
            host_memory=None if self.host_memory is None else ExpertMemory.parse_host(self.host_memory),
        )


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    value = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=value)
