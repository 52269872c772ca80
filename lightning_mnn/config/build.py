"""Build objects from the config with Hydra; report what is wrong with a node before its class is called."""

from __future__ import annotations

import inspect
import pydoc
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import hydra
import pytorch_lightning as pl
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from lightning_mnn.config.mistakes import UserError, explained, mentioned, nearest, one_line, shown
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_UNIONS = (Union, UnionType)
_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def build(cfg: DictConfig, key: str, node: DictConfig | None = None, **overrides: Any) -> Any:
    """Build the object that a node of the config describes.

    Args:
        cfg: the whole config.
        key: key of the node in the config.
        node: a node to use in place of the one at ``key``.
        **overrides: arguments in addition to those of the node.

    Raises:
        UserError: the node names no class, or one that cannot be imported, or an argument that the class does not have.
        ArgumentError: raised by the class.
    """
    own = OmegaConf.select(cfg, key) if node is None else node
    if not isinstance(own, DictConfig) or "_target_" not in own:
        example = f"{key}={{_target_: package.Class, argument: value}}"
        raise UserError(f"{key}={shown(own)}: has no _target_: name its class, as in {example}")
    for place, content in _targets(own, key):
        target = _import_target(place, content)
        _check_names(place, target, content)
        if target is pl.Trainer:
            _check_types(place, target, content)
    try:
        return hydra.utils.instantiate(own, _convert_="all", **overrides)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ArgumentError):
            raise cause from None
        reason = _reason(cause)
        raise UserError(f"{mentioned(cfg, key, reason)}: {reason}") from cause


def _reason(error: BaseException) -> str:
    """The error of a constructor, in one line."""
    details = getattr(error, "errors", None)  # pydantic's
    if callable(details):
        first = details()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    message = explained(error) or one_line(str(error))
    return f"{type(error).__name__}: {message}" if isinstance(error, KeyError) else message


def _targets(node: DictConfig, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The nodes that describe objects, with their keys: this node and those below it."""
    content: Any = OmegaConf.to_container(node, resolve=False)
    waiting = [(key, content)]
    while waiting:
        place, value = waiting.pop()
        if not isinstance(value, dict):
            continue
        if "_target_" in value:
            yield place, value
        waiting += [(f"{place}.{name}", item) for name, item in value.items()]


def _import_target(key: str, node: Mapping[str, Any]) -> Any:
    """The class or function that a node names."""
    name = str(node["_target_"])
    try:
        if (found := pydoc.locate(name)) is not None:
            return found
        reason = "there is no such module or class"
    except pydoc.ErrorDuringImport as error:
        reason = one_line(str(error))
    raise UserError(f"{key}._target_={name}: cannot be imported ({reason}): write package.module.Class")


def _check_names(key: str, target: Any, node: Mapping[str, Any]) -> None:
    """Refuse an argument that the class or function does not have."""
    known = _parameters(target)
    for name, value in node.items():
        if known is not None and not str(name).startswith("_") and name not in known:
            near = ", ".join(nearest(str(name), known))
            raise UserError(
                f"{key}.{name}={shown(value)}: {target.__name__} has no such argument: leave it out; it has {near}"
            )


def _check_types(key: str, target: Any, node: Mapping[str, Any]) -> None:
    """Refuse an argument whose value has none of the plain types that its annotation allows."""
    for name, annotation in get_type_hints(target.__init__).items():
        value = node.get(name)
        kinds = get_args(annotation) if get_origin(annotation) in _UNIONS else (annotation,)
        if value is None or not all(kind in _PLAIN for kind in kinds) or (isinstance(value, str) and "${" in value):
            continue
        fits = isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
        if not fits:
            wanted = " or ".join(_PLAIN[kind] for kind in dict.fromkeys(kinds) if kind is not NoneType)
            raise UserError(f"{key}.{name}={shown(value)}: must be {wanted}: leave it out to use Lightning's default")


def _parameters(target: Any) -> set[str] | None:
    """Names of the arguments of a class or function; None if it accepts any name."""
    bases = target.__mro__ if inspect.isclass(target) else ()
    calls = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] if bases else [target]
    names: set[str] = set()
    for call in calls:
        try:
            parameters = inspect.signature(call).parameters.values()
        except (TypeError, ValueError):  # of a class written in C
            return None
        names |= {one.name for one in parameters}
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            return names
    return None
