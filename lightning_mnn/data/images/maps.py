"""Saving maps of inputs to files."""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn

from lightning_mnn.data.loaders.whitening import InputMap
from lightning_mnn.utilities.files import locked_if_free, whole_file

if TYPE_CHECKING:
    from pathlib import Path


def save_map(path: Path, mapping: InputMap) -> None:
    """Write a map to a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {"mean": mapping.mean.cpu().numpy(), "scale": np.float64(mapping.scale)}
    if mapping.matrix is not None:
        numbers["matrix"] = mapping.matrix.cpu().numpy()
    with locked_if_free(path.with_name(path.name + ".lock")) as free:
        if free:  # otherwise another run writes the same map
            with whole_file(path) as unfinished, unfinished.open("wb") as file:
                np.savez(file, allow_pickle=False, **numbers)


def load_map(path: Path) -> InputMap | None:
    """The map in a file; None if the file is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            matrix = torch.from_numpy(file["matrix"]) if "matrix" in file else None
            return InputMap(torch.from_numpy(file["mean"]), matrix, float(file["scale"]))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        rank_zero_warn(f"{path} is damaged, so the map of the inputs is computed again: {error}")
        return None
