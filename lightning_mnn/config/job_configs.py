"""Composing the configs of a sweep's jobs, fast where jobs differ by plain values."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightning_mnn.utilities.compat.hydra_internals import value_of_override

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_OF_HYDRA = re.compile(r"[+~]*hydra([./@=]|$)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


class JobConfigs:
    """The configs of a sweep's jobs, as Hydra composes them.

    Hydra needs about 0.1 s for each. Jobs that assign other values to the same keys, and differ by nothing else, have
    the same config but for these values, so that only the first of them is composed.

    Args:
        compose: Hydra's way to compose the config of a job with these overrides.
    """

    def __init__(self, compose: Callable[[list[str]], DictConfig]) -> None:
        self._compose = compose
        self._templates: dict[tuple[str, ...], DictConfig] = {}
        self._not_plain: set[str] = set()  # keys whose values determine more than themselves
        self._values: dict[str, Any] = {}

    def of(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a job, with Hydra's node, in which Hydra has yet to number the job."""
        template, values = self.template(overrides)
        config = copy.deepcopy(template)
        try:
            fill(config, overrides, values)
        except OmegaConfBaseException:  # a value that its key does not allow: Hydra tells it in its own words
            return self._compose(list(overrides))
        return config

    def template(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """A composed config, which is not to be changed, and the values by which :func:`fill` makes it the job's."""
        while True:
            keys = self._assigned(overrides)
            form = tuple(f"{key}=" if key in keys else override for key, override in keys_of(overrides))
            if form not in self._templates:
                composed = self._compose(list(overrides))
                if more := {key for key in keys if not _is_plain(composed, key)}:
                    self._not_plain |= more
                    continue
                self._templates[form] = composed
            return self._templates[form], {key: self._value(override) for key, override in keys.items()}

    def _assigned(self, overrides: Sequence[str]) -> dict[str, str]:
        """The overrides that assign a value to a key, by key."""
        found = [(key, override) for key, override in keys_of(overrides) if key not in self._not_plain]
        return {key: o for key, o in found if key and [other for other, _ in found].count(key) == 1}

    def _value(self, override: str) -> Any:
        if override not in self._values:
            self._values[override] = value_of_override(override)
        return self._values[override]


def keys_of(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Each override with the key to which it assigns a value; "" if it does something else, or is about Hydra.

    >>> keys_of(["a.b=1", "+c=2", "hydra.verbose=true"])
    [('a.b', 'a.b=1'), ('', '+c=2'), ('', 'hydra.verbose=true')]
    """
    pairs = []
    for override in overrides:
        found = _ASSIGNMENT.match(override)
        key = "" if found is None or _OF_HYDRA.match(override) else found[0][:-1]
        pairs.append((key, override))
    return pairs


def fill(config: DictConfig, overrides: Sequence[str], values: dict[str, Any]) -> None:
    """Assign a job's values in the template's copy, and name its overrides in Hydra's node, as Hydra does."""
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=True)
    hydra = config.hydra
    task = [override for override in overrides if not _OF_HYDRA.match(override)]
    names = hydra.job.config.override_dirname
    shown = sorted(o for o in task if re.split("[=@]", o.lstrip("+~"))[0] not in names.exclude_keys)
    with read_write(hydra.overrides), read_write(hydra.job), open_dict(hydra):
        hydra.overrides.task = task
        hydra.job.override_dirname = names.item_sep.join(shown).replace("=", names.kv_sep)


def numbered(config: DictConfig, number: int, sweep_dir: str) -> DictConfig:
    """The config, with the job's number and the sweep's folder, which may contain the time and is resolved before."""
    with read_write(config.hydra), open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(number), number
        config.hydra.sweep.dir = sweep_dir
    return config


def _is_plain(composed: DictConfig, key: str) -> bool:
    """Whether a key is one of a single value, or of a list of values."""
    if key in composed.hydra.runtime.choices or "@" in key:
        return False
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    if not isinstance(node, DictConfig) or name not in node:
        return False
    value = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index,call-overload]
    return not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(v, dict | list) for v in value)
    )
