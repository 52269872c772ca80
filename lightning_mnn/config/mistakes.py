"""The one-line message for a mistake in a user's command: KEY=VALUE, what is wrong, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from lightning_mnn.config.schema import needed
from lightning_mnn.utilities.files import relative
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_DELAY_OF_OTHER_RANKS_S = 5.0  # before they print: the first process, if it failed too, prints and ends them by then
_LONGEST_VALUE = 100  # characters of a value that are shown

_MISTAKES = (ValueError, OSError, ArithmeticError, ImportError)
_MISTAKES_BY_NAME = ("MisconfigurationException",)  # Lightning's; by name because its import takes seconds

# Remedies for files that cannot be read or written.
_REMEDIES = {
    errno.ENOSPC: "make room there, or choose another folder",
    errno.EDQUOT: "make room there, or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EACCES: "change its permissions, or choose another",
    errno.EPERM: "change its permissions, or choose another",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "choose a path in which every parent is a folder, not a file",
    errno.EEXIST: "choose another, or move what is there",
    errno.EISDIR: "give a file, not a folder",
    errno.EFBIG: "allow larger files (ulimit -f), or choose another folder",
}


class UserError(CompactHydraException, ValueError):
    """A command cannot be carried out; the message is one line with the reason."""


def explained(error: BaseException, cfg: DictConfig | None = None, command: Sequence[str] = ()) -> str | None:
    """The one-line message for an error; None for an error that is not a user's mistake and needs its traceback.

    Args:
        error: what was raised.
        cfg: the composed config, if there is one; the keys of arguments are looked up in it.
        command: the arguments of the command line.
    """
    if isinstance(error, ArgumentError):
        return _argument_error(error, cfg, command)
    if isinstance(error, HydraException | OmegaConfBaseException) and not isinstance(error, UserError):
        return _composition_error(error, command)
    if isinstance(error, OSError) and error.filename is not None:
        return of_file(error)
    message = one_line(str(error)) or type(error).__name__
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"not enough memory ({message}): choose a smaller network, data set or batch, or fewer replicas"
    return message if isinstance(error, _MISTAKES) or type(error).__name__ in _MISTAKES_BY_NAME else None


def print_error(line: str) -> None:
    """Print the line on standard error. If the first of several processes fails in the same way, only it prints."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_DELAY_OF_OTHER_RANKS_S)
    sys.stderr.write(f"error: {line}\n")


def one_line(text: str) -> str:
    """The text on one line, its lines joined by semicolons."""
    return "; ".join(line.strip().rstrip(":") for line in text.strip().splitlines() if line.strip())


def shown(value: Any) -> str:
    """A value as it is written on the command line, shortened if it is long.

    >>> shown([0.9, None, True]), shown("a b")
    ('[0.9,null,true]', "'a b'")
    """
    text = _written(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def key_of(cfg: DictConfig | None, name: str, value: Any) -> str:
    """The shortest key of a config that ends in an argument's name and has its value.

    If no key has the value: the key that ends in the name, if there is exactly one, else the name itself.

    >>> cfg = OmegaConf.create({"seed": -1, "model": {"seed": "${seed}"}, "data": {"seed": 0}})
    >>> key_of(cfg, "seed", -1), key_of(cfg, "seed", 0), key_of(cfg, "width", 0)
    ('seed', 'data.seed', 'width')
    """
    keys = [] if cfg is None else [key for key in _keys(cfg) if f".{key}".endswith(f".{name}")]
    equal = [key for key in keys if _is_equal(cfg, key, value)]
    found = min(equal, key=lambda key: key.count("."), default=None)
    return found or (keys[0] if len(keys) == 1 else name)


def mentioned(cfg: DictConfig, key: str, message: str) -> str:
    """KEY=VALUE of the argument, below a key, whose name or value a message contains; the key alone if there is none.

    >>> cfg = OmegaConf.create({"trainer": {"max_steps": 3, "precision": "abc"}})
    >>> mentioned(cfg, "trainer", "Precision 'abc' is invalid")
    'trainer.precision=abc'
    """
    below = {name.rpartition(".")[2].lower(): f"{key}.{name}" for name in _keys(OmegaConf.select(cfg, key))}
    paths = [below[word] for word in re.findall(r"\w+", message.lower()) if word in below]
    found = max(paths, key=lambda path: path.count("."), default=None)  # the deepest; of equally deep ones the first
    if found is None:
        texts = {path: OmegaConf.select(cfg, path) for path in below.values()}
        found = next((path for path, text in texts.items() if isinstance(text, str) and repr(text) in message), None)
    return key if found is None else f"{found}={shown(OmegaConf.select(cfg, found))}"


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most similar to a word, at most ``count``; if none is similar, the first eight."""
    names = sorted(known)
    return difflib.get_close_matches(word, names, count, cutoff=0.5) or names[:8]


def of_file(error: OSError) -> str:
    """The message for a file that cannot be read or written."""
    remedy = _REMEDIES.get(error.errno or 0, "check it, or choose another")
    return _line(str(relative(Path(os.fsdecode(error.filename)))), str(error.strerror), remedy)


def _argument_error(error: ArgumentError, cfg: DictConfig | None, command: Sequence[str]) -> str:
    key = key_of(cfg, error.name, error.value)
    given = _given(key, command)
    return _line(given.lstrip("+") if given else f"{key}={shown(error.value)}", error.problem, error.remedy)


def _composition_error(error: HydraException | OmegaConfBaseException, command: Sequence[str]) -> str:
    """The message for an error of Hydra's when it composes the config."""
    if isinstance(error, OverrideParseException):
        return _grammar_error(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return one_line(str(error))
    key = str(cause.full_key or "")
    if isinstance(cause, MissingMandatoryValue):
        return _missing_value(cause)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and not isinstance(cause, InterpolationKeyError):
        return _unknown_key(cause, key, command)
    message = one_line(str(error)) or one_line(str(cause))
    return _type_error(cause, key.partition("[")[0], command) if isinstance(cause, ValidationError) and key else message


def _grammar_error(error: OverrideParseException) -> str:
    """The message for an override that Hydra cannot parse."""
    given = error.override
    key, equals, value = given.partition("=")
    if not equals:
        return _line(shlex.quote(given), "is not an override", f"write {given or 'KEY'}=VALUE; --help lists the keys")
    reason = error.message.splitlines()[0]
    why = "cannot be read" if given in reason else f"cannot be read ({reason})"
    return _line(given, why, f"quote special characters, as in \"{key}='{value.strip('=')}'\"")


def _missing_option(error: MissingConfigException) -> str:
    """The message for an option that its group does not have."""
    missing, options = error.missing_cfg_file or "", list(error.options or ())
    group, _, option = missing.rpartition("/")
    if not group or not options:
        return _line(missing, str(error).splitlines()[0].rstrip("."), "choose config, or leave the option out")
    near = difflib.get_close_matches(option, options, 1, cutoff=0.5)
    first = [*near, *(name for name in options if name not in near)]
    return _line(f"{group}={option}", "there is no such option", f"choose {group}={'|'.join(first)}")


def _missing_value(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or str(error).splitlines()[0].rpartition(" ")[2])
    return _line(f"{key}=???", "has no value", f"give {key}=VALUE")


def _unknown_key(error: OmegaConfBaseException, key: str, command: Sequence[str]) -> str:
    """The message for a key that the config does not have."""
    above, _, name = key.rpartition(".")
    below = list(_keys(error.parent_node)) if isinstance(error.parent_node, DictConfig) else []
    moved = [one for one in below if one.endswith(f".{name}")]
    found = moved[:3] or nearest(name, (one for one in below if "." not in one))
    near = ", ".join(f"{above}.{one}".lstrip(".") for one in found)
    longer = (one for one in command if one.lstrip("+~").startswith(f"{key}."))
    given = _given(key, command) or next(longer, key)
    return _line(given, f"there is no key {key}", f"did you mean {near}? A new key needs a +, as +{given.lstrip('+~')}")


def _type_error(error: OmegaConfBaseException, key: str, command: Sequence[str]) -> str:
    """The message for a value that does not have its key's type."""
    given = _given(key, command) or f"{key}={shown(error.value)}"
    words = needed(key)
    problem = f"must be {words}" if words else str(error.msg).splitlines()[0]
    value = error.parent_node.get(error.key) if isinstance(error.parent_node, DictConfig) else None
    remedy = f"for example {key}={shown(value)}" if value is not None else f"give one, or leave {key} out"
    return _line(given, problem, remedy)


def _given(key: str, command: Sequence[str]) -> str | None:
    """The override of a key, as it is written in a command; the last one, if there are several."""
    return next((one for one in reversed(command) if one.partition("=")[0].lstrip("+~") == key), None)


def _line(what: str, problem: str, remedy: str) -> str:
    return one_line(f"{what}: {problem}{': ' * bool(remedy)}{remedy}")


def _written(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!s}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = str(value)
    return text if text and re.fullmatch(r"[\w./${}:,@%+-]+", text) else repr(text)


def _keys(node: Any, above: str = "") -> Iterator[str]:
    """All keys below a node, dotted; references are not followed."""
    content = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if isinstance(content, dict):
        for key, item in content.items():
            yield f"{above}{key!s}"
            yield from _keys(item, f"{above}{key!s}.")


def _is_equal(cfg: Any, key: str, value: Any) -> bool:
    try:
        return _written(OmegaConf.select(cfg, key)) == _written(value)
    except OmegaConfBaseException:
        return False


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
