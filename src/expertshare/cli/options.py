"""Options declared once: groups of them as dataclasses, from which a command's options and an API's arguments follow.

A field of a group is an option: its type, default and `option(...)` are what typer needs, and `arguments()` gives the
values under the names that the API has for them. A verb takes a group as one parameter; `expanded` puts the group's
options in its place and builds the group from what was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from typing import Annotated, Any, ClassVar, Self, get_type_hints

import typer


def option(
    text: str,
    *names: str,
    default: Any = MISSING,
    argument: str | None = None,
    read: Callable[[Any], Any] | None = None,
    **more: Any,
) -> Any:
    """A field of an OptionGroup. text: its help. names: flags that do not follow from the field's name. argument: the
    API's name for it, if another. read: makes the API's value of one that was given (not None). more: as typer takes
    it. Without a default the option is required.
    """
    metadata = {"text": text, "names": names, "argument": argument, "read": read, "more": more}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Several options as one value. panel: the heading under which help shows them."""

    panel: ClassVar[str | None] = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """The options, as keyword-only parameters with typer annotations."""
        hints = get_type_hints(cls)
        return [
            keyword(
                each.name,
                hints[each.name],
                typer.Option(
                    *each.metadata["names"],
                    help=each.metadata["text"],
                    rich_help_panel=cls.panel,
                    **each.metadata["more"],
                ),
                each.default,
            )
            for each in fields(cls)
        ]

    @classmethod
    def collect(cls, values: Mapping[str, Any]) -> Self:
        """The group from its options' values."""
        return cls(**values)

    def arguments(self) -> dict[str, Any]:
        """The API's keyword arguments. Raises what `read` of an option raises."""
        found = {}
        for each in fields(self):
            value, read = getattr(self, each.name), each.metadata["read"]
            found[each.metadata["argument"] or each.name] = value if read is None or value is None else read(value)
        return found


def keyword(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    """A keyword-only parameter that typer reads as an option."""
    value = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=value)


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options of a group in the place of every parameter that is an OptionGroup."""
    signature = inspect.signature(verb, eval_str=True)
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, OptionGroup):
            groups[parameter.name] = parameter.annotation
            parameters += parameter.annotation.parameters()
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
