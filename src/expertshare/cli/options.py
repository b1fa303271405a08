"""Options declared once: by themselves, as parameters of a verb, or in groups, as fields of a dataclass.

A type and `option(...)` are what typer needs; a group's `arguments()` gives the values under the names that the API has
for them. A verb takes a group as one parameter; `expanded` puts the group's options in its place and builds the group
from what was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from typing import Annotated, Any, ClassVar, Self, dataclass_transform, get_type_hints

import typer

from expertshare.errors import InputError


def option(
    text: str,
    default: Any = MISSING,
    flag: str | None = None,
    *,
    argument: str | None = None,
    read: Callable[[Any], Any] | None = None,
    **more: Any,
) -> Any:
    """A field of an OptionGroup, or a parameter of a verb. text: its help. flag: where it does not follow from the
    name. argument: the API's name for it, if another. read: makes the API's value of one that was given (not None).
    more: as typer takes it. Without a default, here or of its group, the option is required.
    """
    metadata = {"text": text, "flag": flag, "argument": argument, "read": read, "more": more}
    return field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True)
class OptionGroup:
    """Several options as one value; every group becomes a dataclass. panel: the heading under which help shows
    them. defaults: the API's own, a dataclass, for options that name none."""

    panel: ClassVar[str | None] = None
    defaults: ClassVar[Any] = None

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """The options, as keyword-only parameters with typer annotations."""
        hints = get_type_hints(cls)
        return [_parameter(each.name, hints[each.name], each, cls) for each in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def collect(cls, values: Mapping[str, Any]) -> Self:
        """The group from its options' values."""
        return cls(**values)

    def arguments(self) -> dict[str, Any]:
        """The API's keyword arguments. Raises what `read` of an option raises."""
        found = {}
        for each in fields(self):  # type: ignore[arg-type]
            value, read = getattr(self, each.name), each.metadata["read"]
            found[each.metadata["argument"] or each.name] = value if read is None or value is None else read(value)
        return found


def keyword(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    """A keyword-only parameter that typer reads as an option."""
    value = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=value)


def _parameter(name: str, kind: Any, declared: Any, group: type[OptionGroup] = OptionGroup) -> inspect.Parameter:
    """What typer needs of an `option`."""
    known, default = declared.metadata, declared.default
    if default is MISSING:
        default = getattr(group.defaults, known["argument"] or name, MISSING)
    names = () if known["flag"] is None else (known["flag"],)
    info = typer.Option(*names, help=known["text"], **{"rich_help_panel": group.panel, **known["more"]})
    return keyword(name, kind, info, default)


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer reads it: `option` parameters, and a group's options in the place of an OptionGroup."""
    signature = inspect.signature(verb, eval_str=True)
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, OptionGroup):
            groups[parameter.name] = parameter.annotation
            parameters += parameter.annotation.parameters()
        elif isinstance(parameter.default, Field):
            parameters.append(_parameter(parameter.name, parameter.annotation, parameter.default))
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(verb)
    def command(**values: Any) -> None:
        collected = {
            name: group.collect({each.name: values.pop(each.name) for each in group.parameters()})
            for name, group in groups.items()
        }
        verb(**values, **collected)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def check_at_least_one(name: str, value: int | None) -> None:
    """InputError for a number below 1; None was not given."""
    if value is not None and value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")


def split_names(listed: str) -> list[str]:
    """Names parted by commas, without spaces around them."""
    return [name.strip() for name in listed.split(",") if name.strip()]
