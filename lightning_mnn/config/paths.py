"""Paths in Hydra's own part of a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from omegaconf import DictConfig


def hydra_path(config: DictConfig, *keys: str) -> Path:
    """The path that keys of the node ``hydra`` name together, resolved with what Hydra knows only of this job."""
    hydra_config = HydraConfig.instance()
    before = hydra_config.cfg
    try:
        hydra_config.set_config(config)
        return Path(*(str(OmegaConf.select(config.hydra, key)) for key in keys))
    finally:
        hydra_config.cfg = before
