"""What a module's ``forward`` is called with in the first batch of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

if TYPE_CHECKING:
    from torch import nn


class ForwardCapture:
    """Keeps a copy of what the first call of a module's ``forward`` gets, between :meth:`begin` and :meth:`end`.

    Args:
        error: why the module's ``forward`` could not be run on a batch of the training set.

    Attributes:
        inputs: the positional and the named arguments; None: there was no call.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: Any = None

    def begin(self, module: nn.Module) -> None:
        """Watch the calls of a module."""
        self._handle = module.register_forward_pre_hook(self._take, with_kwargs=True)

    def end(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002 (of hooks)
        if self.inputs is None:
            self.inputs = apply_to_collection((args, kwargs), torch.Tensor, lambda tensor: tensor.detach().clone())


def call_with_captured(module: Any, batch: Any) -> Any:
    """Run a module's ``forward`` on captured arguments, or on some samples of them."""
    args, kwargs = batch
    return module(*args, **kwargs)
