"""Snapshots of the state that a pass over a module may change, and functions that restore it."""

from __future__ import annotations

import random
from collections import deque
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import is_
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mnn.data.loaders.exact import ExactLoader
from lightning_mnn.utilities.compat.torch_internals import (
    inner_schedulers,
)
from lightning_mnn.utilities.seeding import set_shared_states, shared_states
from lightning_mnn.utilities.transfer import digests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytorch_lightning as pl

    Undo = Callable[[], Any]


_MAX_ON_DEVICE = 1 << 24  # bytes of a tensor up to which its copy stays on its device; a larger copy is on the CPU

_MAX_PARTS = 1000  # parts of a container up to which their content is restored

_MAX_NESTED = 2  # levels of nested objects whose attributes are restored

_MAX_SEARCHED = 6  # levels of nested objects to search for generators: Subset, data set, transform, Compose, …

_TRAINERS = ("pytorch_lightning", "lightning", "lightning_fabric")

_LIBRARIES = (*_TRAINERS, "torch", "logging", "threading", "multiprocessing", "wandb", "tensorboardX", "mlflow")


def snapshot_state(modules: list[nn.Module], known: set[int]) -> Iterator[Undo]:
    """Functions that restore the attributes of modules and their content."""
    for module in modules:
        yield from _snapshot(vars(module), known)
        for buffer in module.buffers(recurse=False):
            yield from _snapshot(buffer, known)


def snapshot_rates(trainer: pl.Trainer, known: set[int]) -> Iterator[Undo]:
    """Functions that restore the numbers of parameter groups and schedulers, which a step may change itself."""
    for optimizer in trainer.optimizers:
        for group in getattr(optimizer, "param_groups", []):
            yield from _snapshot(group, known)
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in schedulers:
        yield from _snapshot(vars(scheduler), known)
        schedulers += inner_schedulers(scheduler)  # those that it runs one after the other


def snapshot_data(trainer: pl.Trainer) -> Iterator[Undo]:
    """Functions that restore the generators of the training data."""
    loader: Any = trainer.train_dataloader
    datamodule = getattr(trainer, "datamodule", None)
    parts = CombinedLoader(loader).flattened
    names = ("dataset", "collate_fn", "generator", "sampler", "batch_sampler")
    sources = [getattr(part, name, None) for part in parts for name in names]
    yield from _snapshot_draws([*sources, datamodule], set(), _MAX_SEARCHED)
    for part in parts:  # samplers may count the epochs that they have drawn
        for sampler in (getattr(part, "sampler", None), getattr(part, "batch_sampler", None)):
            if hasattr(sampler, "__dict__") and not isinstance(part, ExactLoader):
                yield snapshot_entries(vars(sampler))


def _snapshot_draws(value: Any, known: set[int], depth: int) -> Iterator[Undo]:
    """Functions that restore the generators within an object of any kind."""
    if id(value) in known or depth < 0:
        return
    known.add(id(value))
    if (undo := _snapshot_generator(value)) is not None:
        yield undo
    elif isinstance(value, MethodType):
        yield from _snapshot_draws(value.__self__, known, depth)
    elif isinstance(value, dict | list | tuple):
        if len(value) <= _MAX_PARTS:
            for part in list(value.values() if isinstance(value, dict) else value):
                yield from _snapshot_draws(part, known, depth)
    elif _has_attributes(value) and not _is_of(_TRAINERS, type(value)):
        for part in list(vars(value).values()):
            yield from _snapshot_draws(part, known, depth - 1)


def _has_attributes(value: Any) -> bool:
    kinds = type | ModuleType | Tensor | np.ndarray
    return bool(getattr(type(value), "__dictoffset__", 0)) and not isinstance(value, kinds)


def _is_of(packages: tuple[str, ...], *kinds: type) -> bool:
    return any(kind.__module__.partition(".")[0] in packages for kind in kinds)


def _is_user_object(value: Any) -> bool:
    """Whether an object is of a user's class: not a function, and not of a class of a library with hidden state."""
    return (
        _has_attributes(value)
        and not _is_of(("builtins",), type(value))
        and not _is_of(_LIBRARIES, *type(value).__mro__)
    )


def _snapshot(value: Any, known: set[int], within: int = 0) -> Iterator[Undo]:
    """Functions that restore the content of an object of a known kind, nested in ``within`` objects of other kinds."""
    if id(value) in known:
        return
    known.add(id(value))
    undo = _snapshot_generator(value)
    if undo is None and isinstance(value, Tensor | np.ndarray):
        # a large array in a nested object is data, not a state
        undo = _snapshot_numbers(value) if not within or not _is_large(value) else None
    elif isinstance(value, dict | list | set | deque | tuple):
        undo = None if isinstance(value, tuple) else snapshot_entries(value)
        parts = list(value.values() if isinstance(value, dict) else value)
        for part in parts if len(parts) <= _MAX_PARTS else ():
            yield from _snapshot(part, known, within)
    elif undo is None and within < _MAX_NESTED and _is_user_object(value):
        yield from _snapshot(vars(value), known, within + 1)
    if undo is not None:
        yield undo


def _snapshot_numbers(value: Tensor | np.ndarray[Any, Any]) -> Undo | None:
    if isinstance(value, Tensor):
        return snapshot_tensor(value)
    return partial(np.copyto, value, value.copy()) if value.flags.writeable else None


def _is_large(value: Tensor | np.ndarray[Any, Any]) -> bool:
    return not (isinstance(value, Tensor) and is_odd(value)) and value.nbytes > _MAX_ON_DEVICE


def _snapshot_generator(value: Any) -> Undo | None:
    """A function that restores a generator of random numbers; None for other objects."""
    match value:
        case torch.Generator():
            return partial(value.set_state, value.get_state())
        case np.random.Generator():
            return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        case np.random.RandomState():
            return partial(value.set_state, value.get_state())
        case random.Random():
            return partial(value.setstate, value.getstate())
    return None


def snapshot_entries(value: Any) -> Undo:
    """A function that restores which objects a container has."""
    content = dict(value) if isinstance(value, dict) else list(value)
    add = value.extend if isinstance(value, list | deque) else value.update

    def undo() -> None:
        if not _same(value, content):  # some kinds of dict must not be written to
            value.clear()
            add(content)

    return undo


def _same(value: Any, content: Any) -> bool:
    """Whether two containers have the same objects in the same order; fast, since it runs before each batch."""
    if len(value) != len(content) or not all(map(is_, value, content)):
        return False
    return not isinstance(content, dict) or all(map(is_, value.values(), content.values()))


def snapshot_tensor(tensor: Tensor, *, numbers: bool = True) -> Undo | None:
    """A function that restores a tensor's memory, and the numbers in it; None if nothing can write to it."""
    if is_odd(tensor):
        return None
    alias = tensor.data  # it keeps this memory, also if the tensor gets another
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(alias.stride(), alias.shape, strict=True))
    old = None
    if numbers and not overlaps:
        small = alias.numel() * alias.element_size() <= _MAX_ON_DEVICE
        old = alias.to(alias.device if small else "cpu", copy=True)

    def undo() -> None:
        if old is not None:
            alias.copy_(old)
        if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
            tensor.data = alias

    return undo


def is_odd(tensor: Tensor) -> bool:
    """Whether a tensor has no plain memory, or none that may be written to."""
    return is_lazy(tensor) or tensor.is_inference() or tensor.is_meta or tensor.layout is not torch.strided


@contextmanager
def restoring_generators(trainer: pl.Trainer | None = None) -> Iterator[None]:
    """A context that restores, at its end, the generators that a program shares, and those of a Trainer's data."""
    with ExitStack() as afterwards:
        afterwards.callback(set_shared_states, shared_states())
        for undo in () if trainer is None else snapshot_data(trainer):
            afterwards.callback(undo)
        yield


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, numpy and random; for use within :func:`isolated`."""
    # torch.manual_seed would also seed a GPU that is not in use yet, when it is first used
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def weights_of(pl_module: pl.LightningModule) -> list[Tensor]:
    """Digests that change when a parameter of a module does; they stay on its device, so that nothing waits for it."""
    known = [parameter for parameter in pl_module.parameters() if not is_lazy(parameter)]
    return digests(known)
