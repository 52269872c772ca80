"""What the command line gives, and choices by ``NAME.name=…`` instead of an option of a config group."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict


def given_keys() -> set[str]:
    """The keys that the command line of this job gives, as ``data`` or ``optimizer.lr``."""
    return {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}


def drop_arguments_of_other_names(cfg: DictConfig) -> None:
    """Drop arguments in the files of ``conf/`` that belong to another optimiser or schedule than ``name`` says.

    With ``optimizer.name=RMSprop`` on the command line the arguments of the option that ``optimizer`` has, as Adam's
    ``betas``, do not apply; the learning rate and what the command line gives do.
    """
    if not HydraConfig.initialized():
        return
    given = given_keys()
    for group in ("optimizer", "schedule"):
        node, option = cfg.get(group), HydraConfig.get().runtime.choices.get(group)
        if not isinstance(node, DictConfig) or f"{group}.name" not in given or str(node.name).lower() == option:
            continue
        with open_dict(node):
            for key in set(map(str, node.keys())) - {"name", "lr"}:
                if f"{group}.{key}" not in given:
                    del node[key]
