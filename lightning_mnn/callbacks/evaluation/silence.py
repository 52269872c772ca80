"""Disables a module's logging and printing while it runs outside its training."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# For each tracker: the module, the class in it (None: its functions), and the methods that send something.
_SENDING = ("log", "log_artifact", "log_code", "log_model", "alert", "save", "define_metric")
_SCALARS = (
    *("add_scalar", "add_scalars", "add_histogram", "add_image", "add_images", "add_figure", "add_text", "add_graph"),
    *("add_video", "add_audio", "add_embedding", "add_pr_curve", "add_hparams", "add_mesh"),
)
_METRICS = (
    "log_metric",
    "log_metrics",
    "log_param",
    "log_params",
    "log_artifact",
    "log_text",
    "log_dict",
    "log_figure",
)
_TRACKERS: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    ("wandb", "Run", _SENDING),
    ("torch.utils.tensorboard", "SummaryWriter", _SCALARS),
    ("tensorboardX", "SummaryWriter", _SCALARS),
    ("mlflow", None, (*_METRICS, "log_image")),
)


@contextmanager
def silence() -> Iterator[None]:
    """A context in which W&B's runs, TensorBoard's writers and MLflow record nothing, and stdout is discarded.

    This is limited to these: it does not prevent a module from appending to a list in its own source file, writing to a
    file or sending by other means.
    """
    with ExitStack() as afterwards:
        for name, of_class, methods in _TRACKERS:
            module = sys.modules.get(name)
            owner = module if of_class is None else getattr(module, of_class, None)
            for method in methods if owner is not None else ():
                if callable(original := getattr(owner, method, None)):
                    setattr(owner, method, do_nothing)
                    afterwards.callback(setattr, owner, method, original)
        if "wandb" in sys.modules and callable(original := getattr(sys.modules["wandb"], "log", None)):
            sys.modules["wandb"].log = do_nothing  # type: ignore[attr-defined] # the method, bound to the run
            afterwards.callback(setattr, sys.modules["wandb"], "log", original)
        nowhere = afterwards.enter_context(Path(os.devnull).open("w"))
        afterwards.enter_context(redirect_stdout(nowhere))
        yield


def do_nothing(*_: Any, **__: Any) -> None:
    """Replace a function that sends something."""
