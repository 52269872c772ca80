"""Running a module during its training without side effects on the training."""

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

from lightning_mnn.callbacks.evaluation.silence import do_nothing, silence
from lightning_mnn.callbacks.evaluation.snapshots import (
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
from lightning_mnn.utilities.transfer import digests, fetched

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    Undo = Callable[[], Any]


_MAX_RESTORED = 1 << 28  # bytes of parameters that are not trained: up to this they are restored, beyond only checked


@contextmanager
def isolated(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Restart]:
    """A context in which a module can run without side effects on its training, even if the run fails.

    Inside:

    - all submodules are in eval mode;
    - ``log`` and ``log_dict`` do nothing, and each of the Trainer's loggers is replaced by a dummy with the same name
      and folders; trackers that are called directly record nothing, and stdout is discarded (see
      :mod:`lightning_mnn.callbacks.evaluation.silence`);
    - hooks of parameters, as ``wandb.watch`` sets them, see no gradient;
    - metrics of torchmetrics and ``all_gather`` do not communicate with other processes;
    - compiled modules run eagerly, and a lazy layer that is not initialised yet raises an error;
    - the generators of torch (CPU, CUDA and MPS), numpy and random start from a fixed seed, so that two passes draw the
      same numbers.

    Afterwards these are, bit for bit, as before: modes, buffers, parameters that no optimiser trains, ``requires_grad``
    and ``grad``, the generators, the numbers of the optimisers' parameter groups and of their schedulers, and the
    content of the submodules' attributes: numbers, tensors, arrays, generators, and lists, dicts, sets and deques of
    these (including the states of torchmetrics, and hooks), and the attributes of objects of other classes, such as an
    average meter, and of objects within these. For a container of more than 1,000 parts, the parts are restored, but
    not their content. For the training loader's data set, its transforms and collate_fn, and for the data module, only
    the generators are restored. Objects of trackers are not restored.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module, of ``pytorch_lightning`` or ``lightning.pytorch``.

    Yields:
        A :class:`Restart`, which restores the state inside the context.

    Raises:
        RuntimeError: (at the end) the code inside changed a parameter that is trained; or one that is not, if those
            that are not trained take more than 256 MiB together.
    """
    with ExitStack() as afterwards:
        modules = _all_modules(pl_module)
        trained = trained_parameters(trainer, pl_module)
        parameters = _unique([*(p for module in modules for p in module.parameters(recurse=False)), *trained])
        whole = [parameter for parameter in trained if not is_odd(parameter)]
        afterwards.callback(_check_parameters, whole, digests(whole))
        for undo in (*_snapshot_modes(modules), *_snapshot_gradients(parameters), _snapshot_loggers(trainer)):
            afterwards.callback(undo)
        afterwards.callback(set_shared_states, shared_states())
        for module in modules:
            _silence(module, alone=trainer.world_size == 1)
        trainer.loggers = [_SilentLogger(logger) for logger in trainer.loggers]
        for parameter in parameters:
            parameter.grad = None
            for hooks in hooks_of(parameter):  # they are for the gradients of training only
                afterwards.callback(snapshot_entries(hooks))
                hooks.clear()
        afterwards.enter_context(silence())
        pl_module.eval()
        restart = Restart(trainer, modules, parameters, trained)
        afterwards.callback(restart.everything)
        seed_generators(0)
        if may_be_compiled():  # setting the stance takes seconds, also if nothing is compiled
            afterwards.enter_context(torch.compiler.set_stance("force_eager"))
        yield restart


def trained_parameters(trainer: pl.Trainer, pl_module: nn.Module) -> list[Tensor]:
    """The parameters that the Trainer's optimisers train; if there are none, all that require a gradient.

    Optimisers of strategies that split weights contain their own tensors. Lazy parameters without numbers are left out.
    """
    groups = [group for optimizer in trainer.optimizers for group in getattr(optimizer, "param_groups", [])]
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    free: list[Tensor] = [p for p in pl_module.parameters() if p.requires_grad and not is_lazy(p)]
    return [p for p in free if id(p) in optimised] or free


class Restart:
    """Restores, within :func:`isolated`, what a pass changed to its state at the start."""

    def __init__(
        self, trainer: pl.Trainer, modules: list[nn.Module], parameters: list[Tensor], trained: list[Tensor]
    ) -> None:
        known, training = {id(p) for p in parameters}, {id(p) for p in trained}
        others = [p for p in parameters if id(p) not in training]
        self._trained = [undo for p in trained if (undo := snapshot_tensor(p, numbers=False)) is not None]
        few = sum(p.numel() * p.element_size() for p in others if not is_odd(p)) <= _MAX_RESTORED
        self._others = [(id(p), undo) for p in others if (undo := snapshot_tensor(p, numbers=few)) is not None]
        self._checked = [] if few else [p for p in others if not is_odd(p)]
        self._digests = digests(self._checked)
        slots = [slot for module in modules if (slot := parameter_slots(module)) is not None]
        self._slots = [snapshot_entries(slot) for slot in slots]  # the caller may replace their content until the end
        known |= {id(slot) for slot in slots}
        self._state = [*snapshot_state(modules, known), *snapshot_rates(trainer, known)]
        self._data = list(snapshot_data(trainer))

    def batch(self, moving: Collection[int] = ()) -> None:
        """Restore the modules before a batch, so that its loss depends only on the weights and the batch.

        Args:
            moving: ids of parameters that must not be restored.
        """
        with without_torch_function():  # the caller may calculate in a torch function mode
            for undo in reversed(self._state):
                undo()
            for key, undo in self._others:
                if key not in moving:
                    undo()

    def data(self) -> None:
        """Restore the data's generators before a pass."""
        for undo in self._data:
            undo()

    def everything(self) -> None:
        """Restore everything."""
        self.batch()
        self.data()
        for undo in (*self._slots, *self._trained, *(undo for _, undo in self._others)):
            undo()
        _check_parameters(self._checked, self._digests)


class _SilentLogger(DummyLogger):
    """Replaces a logger: it has the same name, folders and (by ``__class__``) class, and writes nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__
        # the Trainer selects one of a logger's folders by its class
        return type(attribute("_logger")) if name == "__class__" else attribute(name)

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
    """The submodules, and the modules in their lists and dicts, such as metrics."""
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
    """Disable a module's logging and communication; its attributes are restored afterwards."""
    attributes = vars(module)
    if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):  # of either namespace
        attributes["log"] = attributes["log_dict"] = do_nothing
        if not alone:
            attributes["all_gather"] = _gather_locally
    if isinstance(module, Metric):
        attributes["distributed_available_fn"] = _no_other_processes
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        module.register_forward_pre_hook(_refuse, prepend=True)


def _refuse(module: nn.Module, _: Any) -> None:
    raise TypeError(
        f"a {type(module).__name__} is not initialised yet: run the module once on a batch before it is trained, for "
        "example in its __init__ or configure_model"
    )


def _gather_locally(data: Any, *_: Any, **__: Any) -> Any:
    """Replace ``all_gather``, as in a group of one process: in a pass, processes have parts of different sizes."""
    return apply_to_collection(data, Tensor, lambda tensor: tensor[None])


def _no_other_processes() -> bool:
    """Replace a metric's own check whether there are other processes to communicate with."""
    return False


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _check_parameters(parameters: list[Tensor], before: list[Tensor]) -> None:
    """Check that the digests of parameters are as before."""
    changed = fetched(*(digest != old for digest, old in zip(digests(parameters), before, strict=True)))
    for parameter, is_changed in zip(parameters, changed, strict=True):
        if is_changed:
            raise RuntimeError(
                f"a pass over the training set changed a parameter, of shape {tuple(parameter.shape)}, in "
                "place: give the callback a loss_fn or forward_fn that does not change parameters"
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
            requires_grad: bool = parameter.requires_grad,  # noqa: FBT001 (binds the value of this iteration)
        ) -> None:
            p.requires_grad = requires_grad
            p.grad = grad

        yield undo


def _snapshot_modes(modules: list[nn.Module]) -> Iterator[Undo]:
    """Functions that restore modes, and what :func:`_silence` replaces."""
    for module in modules:
        yield partial(_set_mode, module, module.training)  # the mode of a scripted module is not an attribute
        yield snapshot_entries(vars(module))
        if isinstance(module, LazyModuleMixin):
            yield snapshot_entries(forward_pre_hooks(module))


def _set_mode(module: nn.Module, training: bool) -> None:  # noqa: FBT001 (a mode is what it sets)
    if module.training != training:
        module.training = training
