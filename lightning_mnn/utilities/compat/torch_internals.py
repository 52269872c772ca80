"""Private parts of torch."""

from __future__ import annotations

import sys
from collections import OrderedDict
from copy import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lightning_mnn.utilities.compat.missing import MissingPartError, attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_OF_MODULES = (*_FORWARD, "_backward_hooks", "_backward_pre_hooks")
_HOOKS = (
    *(*_OF_MODULES, "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks_with_kwargs",),
)
_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_WITHOUT_DERIVATIVE = {  # keyed by the endings of the names of graph nodes
    "::Error": "a function of it is marked once_differentiable",
    "CheckpointFunctionBackward": "it has reentrant checkpointing; torch.utils.checkpoint with use_reentrant=False can",
}


def without_iterator(loader: Any) -> Any:
    """A copy of a loader that shares its data but not its running iterator: ``DataLoader._iterator``."""
    copied = copy(loader)
    if isinstance(loader, DataLoader):
        attribute(loader, "_iterator", "torch")
        copied._iterator = None
    return copied


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks: ``Module._forward_hooks`` and ``Module._forward_pre_hooks``."""
    return any(attribute(module, name, "torch") for name in _FORWARD)


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The dict of a module's forward pre-hooks: ``Module._forward_pre_hooks``."""
    hooks: dict[int, Any] = attribute(module, "_forward_pre_hooks", "torch")
    return hooks


def have_hooks(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> bool:
    """Whether any of the modules or tensors has a hook of any kind: the dicts in which torch keeps hooks."""
    return any(attribute(module, name, "torch") for module in modules for name in _OF_MODULES) or any(
        attribute(tensor, name, "torch") for tensor in tensors for name in _OF_TENSORS
    )


def hooks_of(tensor: Tensor) -> list[dict[int, Any]]:
    """The non-empty dicts of a tensor's hooks: ``Tensor._backward_hooks`` and ``_post_accumulate_grad_hooks``."""
    return [hooks for name in _OF_TENSORS if (hooks := attribute(tensor, name, "torch"))]


def without_torch_function() -> AbstractContextManager[Any]:
    """A context in which no ``TorchFunctionMode`` sees a call: ``torch._C.DisableTorchFunction``."""
    context: AbstractContextManager[Any] = attribute(torch, "_C.DisableTorchFunction", "torch")()
    return context


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is a functorch wrapper of another tensor, as inside ``torch.vmap``.

    It uses ``torch.func.debug_unwrap``, or ``torch._C._functorch.is_functorch_wrapped_tensor`` if torch lacks that.
    """
    if hasattr(torch.func, "debug_unwrap"):
        return torch.func.debug_unwrap(tensor) is not tensor
    return bool(attribute(torch, "_C._functorch.is_functorch_wrapped_tensor", "torch")(tensor))


def may_be_compiled() -> bool:
    """Whether a module may have been compiled: whether ``torch._dynamo``, which is slow to import, was imported."""
    if "torch._dynamo" in sys.modules:
        return True
    if find_spec("torch._dynamo") is None:
        raise MissingPartError("torch", "the module torch._dynamo")
    return False


def named_modules_as_written(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module's ``named_modules()`` without the parts that ``torch.compile`` adds to the paths.

    Such parts come from ``torch._dynamo.OptimizedModule``.

    >>> [path for path, _ in named_modules_as_written(torch.nn.Sequential(torch.nn.ReLU()))]
    ['', '0']
    """
    named = list(module.named_modules())
    wrappers: set[str] = set()
    if may_be_compiled():
        kind: Any = attribute(sys.modules["torch._dynamo"], "OptimizedModule", "torch")
        wrappers = {path for path, part in named if isinstance(part, kind)}
    for path, part in named:
        names = path.split(".")
        yield ".".join(name for i, name in enumerate(names) if ".".join(names[:i]) not in wrappers), part


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None] | None:
    """The dict of a module's own parameters, ``Module._parameters``; None for a scripted module, which has none."""
    slots = attribute(module, "_parameters", "torch")
    return slots if isinstance(slots, dict) else None


def inner_schedulers(scheduler: Any) -> list[LRScheduler]:
    """The schedulers that a scheduler contains in lists, whatever the names of these private attributes."""
    lists = [value for value in vars(scheduler).values() if isinstance(value, list | tuple)]
    return [one for values in lists for one in values if isinstance(one, LRScheduler)]


def without_derivative(output: Tensor) -> str | None:
    """The reason why a part of an autograd graph has no derivative, by its node names; None: all parts have one.

    torch raises an error at such a node only if it visits it. If gradients are requested for the parameters only, it
    may skip the node and silently leave out its contribution.
    """
    seen, remaining = set(), [output.grad_fn]
    while remaining:
        node = remaining.pop()
        if node is None or node in seen:
            continue
        for end, meaning in _WITHOUT_DERIVATIVE.items():
            if node.name().endswith(end):
                return meaning
        seen.add(node)
        remaining.extend(following for following, _ in node.next_functions)
    return None


def as_evaluated(module: nn.Module) -> nn.Module:
    """The same layers with the same parameters and buffers, in eval mode and without hooks; the module stays as it is.

    >>> layer = nn.Dropout()
    >>> as_evaluated(layer).training, layer.training
    (False, True)
    """
    twin = copy(module)
    attributes = vars(twin)
    children = attribute(module, "_modules", "torch")
    attributes["_modules"] = {name: child and as_evaluated(child) for name, child in children.items()}
    attributes["training"] = False
    for name in _HOOKS:
        if name in attributes:
            attributes[name] = OrderedDict()
    return twin


def changes_in_training(module: nn.Module) -> str | None:
    """A layer that computes something else in training mode, if it is in that mode now, in words."""
    dropout = attribute(torch, "nn.modules.dropout._DropoutNd", "torch")
    batch_norm = attribute(torch, "nn.modules.batchnorm._NormBase", "torch")
    for layer in module.modules():
        if layer.training and isinstance(layer, dropout) and layer.p > 0:
            return f"dropout is active in training ({layer})"
        if layer.training and isinstance(layer, batch_norm):
            return f"batch norm normalises by its batch in training ({type(layer).__name__})"
    return None
