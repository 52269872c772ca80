"""A pass over a module in the midst of its training, of which nothing is left afterwards."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_mnn.callbacks.evaluation.silence import silence
from lightning_mnn.callbacks.evaluation.snapshots import (
    INTEGER_TYPES,
    is_odd,
    seed_generators,
    snapshot_data,
    snapshot_entries,
    snapshot_rates,
    snapshot_state,
    snapshot_tensor,
)
from lightning_mnn.utilities.compat.torch_internals import (
    forward_pre_hooks,
    hooks_of,
    may_be_compiled,
    parameter_slots,
    without_torch_function,
)
from lightning_mnn.utilities.seeding import set_shared_states, shared_states
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    Undo = Callable[[], Any]


_MOST_OTHERS = 1 << 28  # bytes of parameters that are not trained up to which they are put back, and not only checked


@contextmanager
def isolated(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Restart]:
    """A context in which a module may be run without a trace in its training, also where the run fails.

    Inside, all submodules are in eval mode; ``log`` and ``log_dict`` do nothing, and each of the Trainer's loggers is a
    dummy that says the same name and folders; trackers that are called directly take nothing, and stdout is not seen
    (see :mod:`lightning_mnn.callbacks.evaluation.silence`); hooks of parameters, as ``wandb.watch`` sets them, see no
    gradient; metrics of torchmetrics and ``all_gather`` do not ask the other processes; compiled modules run eagerly; a
    lazy layer that is not initialised yet refuses to run; and the generators of torch (CPU, CUDA and MPS), numpy and
    random start from a fixed seed, so that two passes draw the same numbers.

    Afterwards these are, bit for bit, as before: modes, buffers, parameters that no optimiser trains, ``requires_grad``
    and ``grad``, the generators, the numbers of the optimisers' parameter groups and of their schedulers, and what the
    attributes of the submodules hold: numbers, tensors, arrays, generators, and lists, dicts, sets and deques of such
    (with them the states of torchmetrics, and hooks), and the attributes of objects of other classes, as those of an
    average meter, and of objects within these. Of a container of more than 1,000 parts it is put back which they are,
    not what they hold. Of the training loader's data set, its transforms and collate_fn, and of the data module, the
    generators are put back, and nothing else. Objects of trackers are left as they are.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module, of ``pytorch_lightning`` or ``lightning.pytorch``.

    Yields:
        What puts the state back in the midst of it.

    Raises:
        RuntimeError: (at the end) what ran inside changed a parameter that training trains, or one of more than 256 MiB
            that it does not.
    """
    with ExitStack() as afterwards:
        modules = _all_modules(pl_module)
        trained = trained_parameters(trainer, pl_module)
        parameters = _unique([*(p for module in modules for p in module.parameters(recurse=False)), *trained])
        afterwards.callback(_check_parameters, _sums(trained))
        for undo in (*_snapshot_modes(modules), *_snapshot_gradients(parameters), _snapshot_loggers(trainer)):
            afterwards.callback(undo)
        afterwards.callback(set_shared_states, shared_states())
        for module in modules:
            _silence(module, alone=trainer.world_size == 1)
        trainer.loggers = [_SilentLogger(logger) for logger in trainer.loggers]
        for parameter in parameters:
            parameter.grad = None
            for hooks in hooks_of(parameter):  # which training's gradients go through, and ours shall not
                afterwards.callback(snapshot_entries(hooks))
                hooks.clear()
        afterwards.enter_context(silence())
        pl_module.eval()
        restart = Restart(trainer, modules, parameters, trained)
        afterwards.callback(restart.everything)
        seed_generators(0)
        if may_be_compiled():  # which takes seconds to set where nothing is
            afterwards.enter_context(torch.compiler.set_stance("force_eager"))
        yield restart


def trained_parameters(trainer: pl.Trainer, pl_module: nn.Module) -> list[Tensor]:
    """The parameters that the Trainer's optimisers train; those that require a gradient where they hold none of these.

    Optimisers of strategies that split weights hold tensors of their own. Lazy parameters without numbers are left out.
    """
    groups = [group for optimizer in trainer.optimizers for group in getattr(optimizer, "param_groups", [])]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    free: list[Tensor] = [p for p in pl_module.parameters() if p.requires_grad and not is_lazy(p)]
    return [p for p in free if id(p) in held] or free


class Restart:
    """Puts what a pass changed back to where it was at the start, in the midst of :func:`isolated`."""

    def __init__(
        self, trainer: pl.Trainer, modules: list[nn.Module], parameters: list[Tensor], trained: list[Tensor]
    ) -> None:
        known, training = {id(p) for p in parameters}, {id(p) for p in trained}
        others = [p for p in parameters if id(p) not in training]
        self._trained = [undo for p in trained if (undo := snapshot_tensor(p, numbers=False)) is not None]
        few = sum(p.numel() * p.element_size() for p in others if not is_odd(p)) <= _MOST_OTHERS
        self._others = [(id(p), undo) for p in others if (undo := snapshot_tensor(p, numbers=few)) is not None]
        self._checked = [] if few else _sums(others)
        slots = [own for module in modules if (own := parameter_slots(module)) is not None]
        self._slots = [snapshot_entries(own) for own in slots]  # what is in them is left to the caller until the end
        known |= {id(own) for own in slots}
        self._state = [*snapshot_state(modules, known), *snapshot_rates(trainer, known)]
        self._data = list(snapshot_data(trainer))

    def batch(self, moving: Collection[int] = ()) -> None:
        """Put back the modules, before a batch: its loss shall be a function of the weights and the batch alone.

        Args:
            moving: ids of parameters that are to stay as they are.
        """
        with without_torch_function():  # the caller may calculate in a mode of torch's
            for undo in reversed(self._state):
                undo()
            for key, undo in self._others:
                if key not in moving:
                    undo()

    def data(self) -> None:
        """Put back the data's generators, before a pass."""
        for undo in self._data:
            undo()

    def everything(self) -> None:
        """Put back all that is kept."""
        self.batch()
        self.data()
        for undo in (*self._slots, *self._trained, *(undo for _, undo in self._others)):
            undo()
        _check_parameters(self._checked)


class _SilentLogger(DummyLogger):
    """Takes the place of a logger: says its name and folders, passes for one of its class, and writes nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def __getattribute__(self, name: str) -> Any:
        own = super().__getattribute__
        # by its class the Trainer tells which of a logger's folders is meant
        return type(own("_logger")) if name == "__class__" else own(name)

    @property
    def name(self) -> Any:
        return self._logger.name

    @property
    def version(self) -> Any:
        return self._logger.version

    @property
    def save_dir(self) -> Any:
        return self._logger.save_dir

    @property
    def root_dir(self) -> Any:
        return getattr(self._logger, "root_dir", None)

    @property
    def log_dir(self) -> Any:
        return getattr(self._logger, "log_dir", None)


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


def _silence(module: nn.Module, *, alone: bool) -> None:
    """Take away what a module tells others; its attributes are put back afterwards."""
    own = vars(module)
    if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):  # of either namespace
        own["log"] = own["log_dict"] = _do_nothing
        if not alone:
            own["all_gather"] = _gather_locally
    if isinstance(module, Metric):
        own["distributed_available_fn"] = _no_other_processes
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        module.register_forward_pre_hook(_refuse, prepend=True)


def _refuse(module: nn.Module, _: Any) -> None:
    raise TypeError(
        f"a {type(module).__name__} is not initialised yet: run the module once on a batch before it is trained, in "
        "its __init__ or configure_model, say"
    )


def _do_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a method that logs."""


def _gather_locally(data: Any, *_: Any, **__: Any) -> Any:
    """Take the place of ``all_gather``, as in a group of one: processes have parts of other sizes in a pass."""
    return apply_to_collection(data, Tensor, lambda tensor: tensor[None])


def _no_other_processes() -> bool:
    """Take the place of a metric's own question whether there are processes to ask for their parts."""
    return False


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _sums(parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Parameters, and the sum of the bits of each as integers."""
    plain = [p for p in parameters if not is_odd(p) and p.element_size() in INTEGER_TYPES]
    return [(p, p.data.view(INTEGER_TYPES[p.element_size()]).sum()) for p in plain]


def _check_parameters(before: list[tuple[Tensor, Tensor]]) -> None:
    now = _sums([parameter for parameter, _ in before])
    changed = fetched(*(total != old for (_, total), (_, old) in zip(now, before, strict=True)))
    for (parameter, _), is_changed in zip(before, changed, strict=True):
        if is_changed:
            raise RuntimeError(
                f"a pass over the training set changed a parameter, of shape {tuple(parameter.shape)}, in "
                "place: give the callback a loss_fn or forward_fn that leaves the parameters alone"
            )


def _snapshot_loggers(trainer: pl.Trainer) -> Undo:
    loggers = trainer.loggers

    def undo() -> None:
        trainer.loggers = loggers

    return undo


def _snapshot_gradients(parameters: list[Tensor]) -> Iterator[Undo]:
    for parameter in parameters:

        def undo(
            p: Tensor = parameter,
            grad: Tensor | None = parameter.grad,
            requires_grad: bool = parameter.requires_grad,  # noqa: FBT001 (binds this turn's)
        ) -> None:
            p.requires_grad = requires_grad
            p.grad = grad

        yield undo


def _snapshot_modes(modules: list[nn.Module]) -> Iterator[Undo]:
    """How to put back modes, and what silence takes away."""
    for module in modules:
        yield partial(_set_mode, module, module.training)  # that of a scripted module is none of its attributes
        yield snapshot_entries(vars(module))
        if isinstance(module, LazyModuleMixin):
            yield snapshot_entries(forward_pre_hooks(module))


def _set_mode(module: nn.Module, training: bool) -> None:  # noqa: FBT001 (a mode is what it sets)
    if module.training != training:
        module.training = training
