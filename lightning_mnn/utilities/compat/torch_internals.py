"""Private parts of torch."""

from __future__ import annotations

import sys
from copy import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lightning_mnn.utilities.compat.missing import MissingPartError, attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_OF_MODULES = (*_FORWARD, "_backward_hooks", "_backward_pre_hooks")
_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_WITHOUT_DERIVATIVE = {  # by the ends of the names of a graph's nodes
    "::Error": "a function of it is marked once_differentiable",
    "CheckpointFunctionBackward": "it has reentrant checkpointing; torch.utils.checkpoint with use_reentrant=False can",
}


def without_iterator(loader: Any) -> Any:
    """A copy of a loader that shares its data and leaves a running iterator of it alone: ``DataLoader._iterator``."""
    twin = copy(loader)
    if isinstance(loader, DataLoader):
        attribute(loader, "_iterator", "torch")
        twin._iterator = None
    return twin


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks: ``Module._forward_hooks`` and ``Module._forward_pre_hooks``."""
    return any(attribute(module, name, "torch") for name in _FORWARD)


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The dict that holds a module's forward pre-hooks: ``Module._forward_pre_hooks``."""
    hooks: dict[int, Any] = attribute(module, "_forward_pre_hooks", "torch")
    return hooks


def have_hooks(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> bool:
    """Whether modules or tensors have hooks of any kind: the dicts in which torch keeps them."""
    return any(attribute(module, name, "torch") for module in modules for name in _OF_MODULES) or any(
        attribute(tensor, name, "torch") for tensor in tensors for name in _OF_TENSORS
    )


def hooks_of(tensor: Tensor) -> list[dict[int, Any]]:
    """The dicts that hold a tensor's hooks, where it has any: ``Tensor._backward_hooks`` and its like."""
    return [hooks for name in _OF_TENSORS if (hooks := attribute(tensor, name, "torch"))]


def without_torch_function() -> AbstractContextManager[Any]:
    """A context in which no ``TorchFunctionMode`` sees a call: ``torch._C.DisableTorchFunction``."""
    context: AbstractContextManager[Any] = attribute(torch, "_C.DisableTorchFunction", "torch")()
    return context


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether a tensor stands for others, as within ``torch.vmap``.

    By ``torch.func.debug_unwrap``; in a torch without it by ``torch._C._functorch.is_functorch_wrapped_tensor``.
    """
    if hasattr(torch.func, "debug_unwrap"):
        return torch.func.debug_unwrap(tensor) is not tensor
    return bool(attribute(torch, "_C._functorch.is_functorch_wrapped_tensor", "torch")(tensor))


def may_be_compiled() -> bool:
    """Whether any module can have been compiled yet: whether ``torch._dynamo``, slow to import, was imported."""
    if "torch._dynamo" in sys.modules:
        return True
    if find_spec("torch._dynamo") is None:
        raise MissingPartError("torch", "the module torch._dynamo")
    return False


def named_modules_as_written(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module's ``named_modules()`` without what ``torch.compile`` puts into paths: ``torch._dynamo.OptimizedModule``.

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
    """The dict that holds a module's own parameters, ``Module._parameters``; None: a scripted module has none."""
    slots = attribute(module, "_parameters", "torch")
    return slots if isinstance(slots, dict) else None


def inner_schedulers(scheduler: Any) -> list[LRScheduler]:
    """The schedulers that a scheduler goes through, in whatever private attribute it keeps their list."""
    lists = [value for value in vars(scheduler).values() if isinstance(value, list | tuple)]
    return [one for several in lists for one in several if isinstance(one, LRScheduler)]


def without_derivative(output: Tensor) -> str | None:
    """What in a graph has no derivative, though torch does not say so but leaves its part out: names of its nodes.

    Torch would raise there, but does not come by when asked for gradients of the parameters alone.
    """
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        for end, meaning in _WITHOUT_DERIVATIVE.items():
            if node.name().endswith(end):
                return meaning
        seen.add(node)
        left.extend(following for following, _ in node.next_functions)
    return None
