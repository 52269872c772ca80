"""A pass over a module in the midst of its training, of which nothing is left afterwards."""

from __future__ import annotations

import random
import sys
from collections import deque
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytorch_lightning as pl

    Undo = Callable[[], Any]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_MOST_ON_DEVICE = 1 << 24  # bytes of a tensor up to which it is kept where it is; a larger one is kept on the CPU


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """A context in which a module may be run without a trace in its training, also where the run fails.

    Inside, all submodules are in eval mode; ``log`` and ``log_dict`` do nothing, and each of the Trainer's loggers is a
    dummy; metrics of torchmetrics do not ask the other processes; compiled modules run eagerly; and the generators of
    torch (CPU, CUDA and MPS), numpy and random start from a fixed seed, so that two passes draw the same numbers.

    Afterwards these are, bit for bit, as before: modes, buffers, frozen parameters, ``requires_grad`` and ``grad``, the
    generators, and what the attributes of the submodules hold: numbers, tensors, arrays, generators, and lists, dicts,
    sets and deques of such (with them the states of torchmetrics, and hooks). Objects of other classes that training
    changes, an average meter's, say, are not known and keep what the pass did to them.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module, of ``pytorch_lightning`` or ``lightning.pytorch``.

    Raises:
        RuntimeError: (at the end) what ran inside changed a parameter that training trains.
    """
    with ExitStack() as afterwards:
        modules = _all_modules(pl_module)
        afterwards.callback(_check_parameters, _sums_of_parameters(pl_module))
        for undo in (*_kept_state(modules), *_kept_gradients(pl_module), _kept_loggers(trainer), *_kept_generators()):
            afterwards.callback(undo)
        for module in modules:
            _silence(module)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        for parameter in pl_module.parameters():
            parameter.grad = None
        pl_module.eval()
        seed_generators(0)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to import
            afterwards.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _all_modules(pl_module: nn.Module) -> list[nn.Module]:
    """The submodules and those in their lists and dicts, such as metrics that are kept there."""
    found = {id(module): module for module in pl_module.modules()}
    waiting = list(found.values())
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            parts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
            for part in parts:
                if isinstance(part, nn.Module) and id(part) not in found:
                    new = {id(module): module for module in part.modules()}
                    waiting += [module for key, module in new.items() if key not in found]
                    found = new | found
    return list(found.values())


def _silence(module: nn.Module) -> None:
    """Take away what a module tells others; its attributes are put back afterwards."""
    own = vars(module)
    if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):  # of either namespace
        own["log"] = own["log_dict"] = _say_nothing
    for name in ("_to_sync", "sync_on_compute", "dist_sync_on_step"):  # of torchmetrics
        if isinstance(own.get(name), bool):
            own[name] = False


def _say_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a method that logs."""


def _sums_of_parameters(pl_module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The parameters that training trains, and the sum of the bits of each as integers."""
    trained = [p for p in pl_module.parameters() if p.requires_grad and not _is_odd(p)]
    return [(p, p.data.view(_INTEGERS[p.element_size()]).sum()) for p in trained if p.element_size() in _INTEGERS]


def _check_parameters(before: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, total in before:
        if parameter.data.view(_INTEGERS[parameter.element_size()]).sum() != total:
            raise RuntimeError(
                f"a pass over the training set changed a trained parameter, of shape {tuple(parameter.shape)}, in "
                "place: give the callback a loss_fn or forward_fn that leaves the parameters alone"
            )


def _kept_loggers(trainer: pl.Trainer) -> Undo:
    loggers = trainer.loggers

    def undo() -> None:
        trainer.loggers = loggers

    return undo


def _kept_gradients(pl_module: nn.Module) -> Iterator[Undo]:
    for parameter in pl_module.parameters():

        def undo(
            p: Tensor = parameter,
            grad: Tensor | None = parameter.grad,
            requires_grad: bool = parameter.requires_grad,  # noqa: FBT001 (binds this turn's)
        ) -> None:
            p.requires_grad = requires_grad
            p.grad = grad

        yield undo


def _kept_state(modules: list[nn.Module]) -> Iterator[Undo]:
    """How to put back the attributes of modules and what these hold."""
    known: set[int] = set()
    for module in modules:
        yield partial(_set_mode, module, module.training)  # that of a scripted module is none of its attributes
        yield from _kept(vars(module), known)
        yield from _kept(tuple(module.buffers(recurse=False)), known)


def _set_mode(module: nn.Module, training: bool) -> None:  # noqa: FBT001 (a mode is what it sets)
    if module.training != training:
        module.training = training


def _kept(value: Any, known: set[int]) -> Iterator[Undo]:
    """How to put back what an object holds, where it is of a known kind."""
    if id(value) in known:
        return
    known.add(id(value))
    if isinstance(value, Tensor):
        if (undo := _kept_tensor(value)) is not None:
            yield undo
    elif isinstance(value, np.ndarray):
        array = value.copy()
        if value.flags.writeable:
            yield partial(np.copyto, value, array)
    elif isinstance(value, dict | list | set | deque):
        yield from _kept_container(value, known)
    elif isinstance(value, tuple):
        for part in value:
            yield from _kept(part, known)
    elif (undo := _kept_generator(value)) is not None:
        yield undo


def _kept_generator(value: Any) -> Undo | None:
    """How to put back a generator of random numbers; None for other objects."""
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


def _kept_container(value: Any, known: set[int]) -> Iterator[Undo]:
    content = dict(value) if isinstance(value, dict) else list(value)
    add = value.extend if isinstance(value, list | deque) else value.update

    def undo() -> None:
        if not _same(value, content):  # some kinds of dict may not be written to
            value.clear()
            add(content)

    yield undo
    for part in content.values() if isinstance(content, dict) else content:
        yield from _kept(part, known)


def _same(value: Any, content: Any) -> bool:
    """Whether two containers hold the same objects in the same order."""
    if isinstance(content, dict):
        return list(value) == list(content) and _same(list(value.values()), list(content.values()))
    return len(value) == len(content) and all(a is b for a, b in zip(value, content, strict=True))


def _kept_tensor(tensor: Tensor) -> Undo | None:
    """How to put back a tensor's numbers; None where nothing could write to it, or training is what writes to it."""
    if _is_odd(tensor):
        return None
    alias = tensor.data  # of the same memory, whatever memory the tensor is given
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(alias.stride(), alias.shape, strict=True))
    trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
    numbers = None
    if not (overlaps or trained):
        small = alias.numel() * alias.element_size() <= _MOST_ON_DEVICE
        numbers = alias.to(alias.device if small else "cpu", copy=True)

    def undo() -> None:
        if numbers is not None:
            alias.copy_(numbers)
        if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
            tensor.data = alias

    return undo


def _is_odd(tensor: Tensor) -> bool:
    """Whether a tensor has no plain memory, or none that may be written to."""
    return is_lazy(tensor) or tensor.is_inference() or tensor.is_meta or tensor.layout is not torch.strided


def _kept_generators() -> Iterator[Undo]:
    """How to put back the generators that a program shares."""
    cpu, numpy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (user's own use)
    yield partial(torch.set_rng_state, cpu)
    yield partial(np.random.set_state, numpy)
    yield partial(random.setstate, python)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all()
        yield partial(torch.cuda.set_rng_state_all, cuda)
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        yield partial(torch.mps.set_rng_state, mps)


@contextmanager
def kept_generators() -> Iterator[None]:
    """A context after which the generators that a program shares are as before."""
    with ExitStack() as afterwards:
        for undo in list(_kept_generators()):
            afterwards.callback(undo)
        yield


def seed_generators(seed: int) -> None:
    """Let the generators of torch, numpy and random start anew; for use within :func:`undisturbed`."""
    # torch.manual_seed would also seed, when it is first used, a GPU that is not in use yet
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
