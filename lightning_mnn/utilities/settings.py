"""Settings in groups: dataclasses that a constructor takes, in place of an argument for each of their fields."""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Class = TypeVar("Class", bound=type)


def settings_or_defaults(name: str, value: T | None, group: type[T]) -> T:
    """The value of an argument that takes a group of settings; None: all its defaults.

    Raises:
        ArgumentError: the value is not such a group.
    """
    if value is None:
        return group()
    if not isinstance(value, group):
        raise ArgumentError(name, value, f"must be a {group.__name__}", f"give {group.__name__}(…), or leave it out")
    return value


def accepts_fields_of(**groups: Any) -> Callable[[Class], Class]:
    """A decorator for classes whose arguments were grouped: the single ones still work, with a DeprecationWarning.

    They are part of the constructor's signature, which is what LightningCLI and Hydra configs are checked against.
    There None means that the argument is not given.

    Args:
        **groups: by argument, the dataclass that it takes.
    """
    places = {field.name: (name, group) for name, group in groups.items() for field in fields(group)}

    def decorate(cls: Class) -> Class:
        grouped = vars(cls)["__init__"]

        @functools.wraps(grouped)
        def init(self: Any, *args: Any, **arguments: Any) -> None:
            single = {name: arguments.pop(name) for name in places if name in arguments}
            for name, value in single.items():
                if value is None:
                    continue
                argument, group = places[name]
                new = f"{argument}={group.__name__}({name}=…)"
                warnings.warn(
                    f"{cls.__name__}({name}=…) is now {cls.__name__}({new})", DeprecationWarning, stacklevel=2
                )
                known = settings_or_defaults(argument, arguments.get(argument), group)
                arguments[argument] = replace(known, **{name: value})
            grouped(self, *args, **arguments)

        signature, own = inspect.signature(grouped), inspect.Parameter.KEYWORD_ONLY
        types = {field.name: f"{field.type} | None" for group in groups.values() for field in fields(group)}
        single = [inspect.Parameter(name, own, default=None, annotation=kind) for name, kind in types.items()]
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *single])  # type: ignore[attr-defined]
        init.__annotations__ = grouped.__annotations__ | types
        cls.__init__ = init  # type: ignore[misc]
        return cls

    return decorate
