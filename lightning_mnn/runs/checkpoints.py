"""Checkpoints from which a run starts or resumes, checked before there is any work to lose."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.utilities.files import DamagedFileError, check_archive
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from lightning_mnn.model.mnn import MNN

_LIGHTNING_WORDS = ("best", "last", "hpc")  # words that Lightning accepts in place of a path
_NEEDS = ("state_dict", "loops", "optimizer_states", "lr_schedulers")


def read_checkpoint(path: Path, remedy: str) -> dict[str, Any]:
    """What Lightning saved in a file, with its checksums verified, without running code from it.

    Raises:
        DamagedFileError: the file was cut or changed, or is not a checkpoint of Lightning's.
    """
    check_archive(path, remedy)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, AttributeError) as error:
        reason = f"it cannot be loaded as plain weights: {str(error).strip().splitlines()[0]}"
        raise DamagedFileError(path, reason, remedy) from error
    missing = [key for key in _NEEDS if not isinstance(state, dict) or key not in state]
    if missing:
        raise DamagedFileError(path, f"it is not a checkpoint of a Trainer: it lacks {', '.join(missing)}", remedy)
    checked: dict[str, Any] = state
    return checked


def check_fits(given: str, model: MNN) -> None:
    """Check that a network can start from a checkpoint.

    Args:
        given: ``ckpt_path``; anything but a local path is left to Lightning.
        model: the network.

    Raises:
        ArgumentError: there is no such file, or it belongs to another network or optimiser.
        DamagedFileError: see :func:`read_checkpoint`.
    """
    if given in _LIGHTNING_WORDS or given.startswith("registry") or "://" in given:
        return
    path = Path(given)
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "is not a file"
        raise ArgumentError("ckpt_path", given, problem, "give the path of a checkpoint, as RUN/checkpoints/last.ckpt")
    state = read_checkpoint(path, "choose another ckpt_path")
    saved, own = (_shapes(weights) for weights in (state["state_dict"], model.state_dict()))
    for name in sorted(saved | own):
        if saved.get(name) != own.get(name):
            problem = (
                f"belongs to another network: {name} is {_as_text(saved.get(name))}, not {_as_text(own.get(name))}"
            )
            raise ArgumentError("ckpt_path", given, problem, "choose widths, replicas and data as in that run")
    hparams = state.get("hyper_parameters") or {}
    before, now = (hparams.get("optimizer") or {}).get("name"), model.hparams["optimizer"]["name"]
    if before is not None and before.lower() != now.lower():
        problem = f"belongs to a run with optimizer={before}, whose state {now} cannot use"
        raise ArgumentError("ckpt_path", given, problem, f"choose optimizer={before}")
    if (frozen := hparams.get("frozen", [])) != model.hparams["frozen"]:
        problem = "belongs to a run that trained other parameters"
        raise ArgumentError("ckpt_path", given, problem, f"choose model.frozen=[{','.join(frozen)}]")


def _shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, torch.Tensor)}


def _as_text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "a number"
