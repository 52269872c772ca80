"""Each private part that is used of another library is there, does what is said of it, and is missed where it is not.

A canary for each function: it calls the function on the real library, then takes the part away, as in a new version of
the library that calls it otherwise.
"""

import importlib
import inspect
import multiprocessing.spawn
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from importlib.metadata import requires, version
from pathlib import Path

import hydra
import pytest
import pytorch_lightning as pl
import torch
import wandb
import wandb_workspaces.workspaces as ws
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, MNIST

from lightning_mnn import MNN
from lightning_mnn.data import GaussianData
from lightning_mnn.utilities import compat
from lightning_mnn.utilities.compat import (
    hydra_internals,
    lightning_internals,
    python_internals,
    torch_internals,
    torchvision_internals,
    wandb_internals,
)
from lightning_mnn.utilities.compat.missing import MissingPartError, attribute, ignored_errors, private_part

COVERED = set()


def canary_of(*functions):
    """Says of a test which functions it covers."""
    COVERED.update(functions)
    return lambda test: test


def hide(monkeypatch, owner, name):
    """Take an attribute away: from an object or module, or from all objects of a class."""
    if not inspect.isclass(owner):
        monkeypatch.delitem(vars(owner), name)
        return

    def gone(_):
        raise AttributeError(name)

    monkeypatch.setattr(owner, name, property(gone))


def missing(part):
    return pytest.raises(MissingPartError, match=re.escape(part))


@canary_of(torch_internals.as_evaluated)
def test_layers_in_eval_mode_without_hooks(monkeypatch):
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)), nn.BatchNorm1d(2))
    calls = []
    module[0][0].register_forward_hook(lambda *_: calls.append("a hook"))
    twin = torch_internals.as_evaluated(module)
    assert twin[0][0].weight is module[0][0].weight
    twin(torch.ones(3, 2))
    assert not calls
    assert module.training
    assert len(module[0][0]._forward_hooks) == 1
    hide(monkeypatch, module, "_modules")
    with missing("_modules"):
        torch_internals.as_evaluated(module)


@canary_of(torch_internals.changes_in_training)
@pytest.mark.parametrize(("layer", "said"), [(nn.Dropout2d(), "dropout"), (nn.BatchNorm2d(2), "batch norm")])
def test_layers_that_change_in_training(monkeypatch, layer, said):
    assert said in torch_internals.changes_in_training(nn.Sequential(layer))
    assert torch_internals.changes_in_training(nn.Sequential(layer).eval()) is None
    name = "_DropoutNd" if said == "dropout" else "_NormBase"
    owner = nn.modules.dropout if said == "dropout" else nn.modules.batchnorm
    hide(monkeypatch, owner, name)
    with missing(name):
        torch_internals.changes_in_training(nn.Sequential(layer))


def test_each_function_has_a_canary():
    found = {
        function
        for module in pkgutil.iter_modules(compat.__path__, f"{compat.__name__}.")
        if module.name.endswith("_internals")
        for name, function in vars(importlib.import_module(module.name)).items()
        if (inspect.isfunction(function) or inspect.isclass(function)) and not name.startswith("_")
        if function.__module__ == module.name
    }
    assert found == COVERED
    assert all(function.__doc__ for function in found)


# What is said where a part is missing


def test_the_error_names_library_version_part_and_remedy():
    with pytest.raises(MissingPartError) as caught:
        attribute(torch, "_C.no_such_part", "torch")
    said = str(caught.value)
    assert said.startswith(f"torch {version('torch')} does not have torch._C.no_such_part")
    (needed,) = (one for one in requires("lightning-mnn") if re.match(r"torch\b(?!\w)", one))
    assert said.endswith(needed)


def test_errors_of_a_function_that_uses_one_part_are_of_that_part():
    @private_part("torch", "the part")
    def use(found):
        return found["part"]

    assert use({"part": 1}) == 1
    with missing("the part") as caught:
        use({})
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_missing_part_is_told_where_other_errors_are_ignored():
    with ignored_errors():
        raise ValueError("of a guess")
    with missing("the part"), ignored_errors():
        raise MissingPartError("torch", "the part")


# torch


@canary_of(torch_internals.without_iterator)
def test_a_loader_beside_its_own_iterator(monkeypatch):
    loader = DataLoader(range(4), batch_size=1, num_workers=1, persistent_workers=True)
    running = iter(loader)
    first = next(running)
    assert len(list(torch_internals.without_iterator(loader))) == 4
    assert [first, *running] == [0, 1, 2, 3]
    hide(monkeypatch, loader, "_iterator")
    with missing("DataLoader._iterator"):
        torch_internals.without_iterator(loader)


@canary_of(torch_internals.has_forward_hooks, torch_internals.have_hooks)
@pytest.mark.parametrize(
    ("register", "forward"),
    [
        ("register_forward_hook", True),
        ("register_forward_pre_hook", True),
        ("register_full_backward_hook", False),
        ("register_full_backward_pre_hook", False),
    ],
)
def test_hooks_of_modules_are_seen(register, forward):
    module = nn.Linear(2, 1)
    assert not torch_internals.has_forward_hooks(module)
    assert not torch_internals.have_hooks([module], module.parameters())
    handle = getattr(module, register)(lambda *_: None)
    assert torch_internals.has_forward_hooks(module) is forward
    assert torch_internals.have_hooks([module], module.parameters())
    handle.remove()
    assert not torch_internals.have_hooks([module], module.parameters())


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_weights_are_seen(register):
    module = nn.Linear(2, 1)
    getattr(module.weight, register)(lambda *_: None)
    assert torch_internals.have_hooks([module], module.parameters())
    assert not torch_internals.have_hooks([module], [module.bias])


@pytest.mark.parametrize("name", ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"])
def test_hooks_of_modules_are_missed(monkeypatch, name):
    module = nn.ReLU()
    hide(monkeypatch, module, name)
    with missing(f"ReLU.{name}"):
        torch_internals.have_hooks([module], [])
    if "forward" in name:
        with missing(f"ReLU.{name}"):
            torch_internals.has_forward_hooks(module)


@pytest.mark.parametrize("name", ["_backward_hooks", "_post_accumulate_grad_hooks"])
def test_hooks_of_weights_are_missed(monkeypatch, name):
    hide(monkeypatch, torch.Tensor, name)
    with missing(f"Tensor.{name}"):
        torch_internals.have_hooks([], [torch.zeros(2)])


@canary_of(torch_internals.forward_pre_hooks)
def test_the_dict_of_pre_hooks(monkeypatch):
    module = nn.ReLU()
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert list(torch_internals.forward_pre_hooks(module)) == [handle.id]
    torch_internals.forward_pre_hooks(module).clear()
    assert not torch_internals.has_forward_hooks(module)
    hide(monkeypatch, module, "_forward_pre_hooks")
    with missing("_forward_pre_hooks"):
        torch_internals.forward_pre_hooks(module)


@canary_of(torch_internals.hooks_of)
def test_the_dicts_of_hooks_of_a_tensor(monkeypatch):
    tensor, seen = torch.ones(2, requires_grad=True), []
    assert torch_internals.hooks_of(tensor) == []
    tensor.register_hook(seen.append)
    (hooks,) = torch_internals.hooks_of(tensor)
    kept = dict(hooks)
    hooks.clear()
    torch.autograd.grad(tensor.sum(), tensor)
    assert not seen
    hooks.update(kept)
    torch.autograd.grad(tensor.sum(), tensor)
    assert len(seen) == 1
    hide(monkeypatch, torch.Tensor, "_backward_hooks")
    with missing("_backward_hooks"):
        torch_internals.hooks_of(tensor)


@canary_of(torch_internals.without_torch_function)
def test_no_mode_sees_a_call(monkeypatch):
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    seen = []
    with Seen():
        with torch_internals.without_torch_function():
            torch.zeros(2).add_(1)
        assert not seen
        torch.zeros(2)
    assert seen
    monkeypatch.delattr(torch._C, "DisableTorchFunction")
    with missing("DisableTorchFunction"):
        torch_internals.without_torch_function()


@canary_of(torch_internals.is_functorch_tensor)
def test_tensors_that_stand_for_others(monkeypatch):
    def look(tensor):
        found.append(torch_internals.is_functorch_tensor(tensor))
        return tensor.sum()

    def ask():
        found.clear()
        assert not torch_internals.is_functorch_tensor(torch.zeros(2))
        torch.vmap(look)(torch.zeros(3, 2))
        torch.func.grad(look)(torch.zeros(2))
        return found

    found = []
    assert ask() == [True, True]
    monkeypatch.delattr(torch.func, "debug_unwrap", raising=False)  # the public way, of newer versions
    assert ask() == [True, True]
    monkeypatch.delattr(torch._C._functorch, "is_functorch_wrapped_tensor")
    with missing("is_functorch_wrapped_tensor"):
        ask()


@canary_of(torch_internals.may_be_compiled, torch_internals.named_modules_as_written)
def test_paths_of_a_compiled_module(monkeypatch):
    written = nn.Sequential(nn.Linear(2, 1), nn.Sequential(nn.ReLU()))
    compiled = nn.Sequential(torch.compile(written[0]), torch.compile(nn.Sequential(torch.compile(written[1][0]))))
    assert torch_internals.may_be_compiled()
    for net in (compiled, torch.compile(compiled)):
        found = [(path, type(part)) for path, part in torch_internals.named_modules_as_written(net)]
        assert [one for one in found if one[1].__module__ != "torch._dynamo.eval_frame"] == [
            (path, type(part)) for path, part in written.named_modules()
        ]
    monkeypatch.delattr(torch._dynamo, "OptimizedModule")
    with missing("OptimizedModule"):
        list(torch_internals.named_modules_as_written(compiled))


def test_whether_anything_is_compiled_is_missed(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert not torch_internals.may_be_compiled()
    monkeypatch.setattr(torch_internals, "find_spec", lambda name: None)
    with missing("torch._dynamo"):
        torch_internals.may_be_compiled()


@canary_of(torch_internals.parameter_slots)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_dict_of_parameters(monkeypatch):
    module = nn.Linear(2, 1, bias=False)
    assert torch_internals.parameter_slots(module) == {"weight": module.weight, "bias": None}
    assert torch_internals.parameter_slots(torch.jit.script(module)) is None
    hide(monkeypatch, module, "_parameters")
    with missing("Linear._parameters"):
        torch_internals.parameter_slots(module)


@canary_of(torch_internals.inner_schedulers)
def test_schedulers_in_schedulers():
    schedules = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    inner = [schedules.ConstantLR(optimizer), schedules.LinearLR(optimizer)]
    assert torch_internals.inner_schedulers(inner[0]) == []
    for outer in (schedules.SequentialLR(optimizer, inner, milestones=[1]), schedules.ChainedScheduler(inner)):
        assert torch_internals.inner_schedulers(outer) == inner
        outer.called_otherwise = vars(outer).pop("_schedulers")  # which makes no difference
        assert torch_internals.inner_schedulers(outer) == inner


@canary_of(torch_internals.without_derivative)
def test_what_has_no_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g.clone()

    x = torch.ones(2, requires_grad=True)
    assert torch_internals.without_derivative(x.square().sum()) is None
    first = torch.autograd.grad(Once.apply(x).square().sum(), x, create_graph=True)[0]
    assert "once_differentiable" in torch_internals.without_derivative(first.sum())
    recomputed = checkpoint(torch.sin, x, use_reentrant=True)
    assert "reentrant" in torch_internals.without_derivative(recomputed.sum())


# Lightning


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fitted(make_trainer):
    """A Trainer that has trained a network for two epochs, of a step each, in bundles."""
    trainer, model = make_trainer(max_epochs=2), MNN(4, (3,), default_callbacks=False)
    trainer.fit(model, GaussianData(6, 4))
    model.automatic_optimization = False  # as within a bundle
    assert (trainer.current_epoch, trainer.global_step) == (2, 2)
    return trainer


@canary_of(lightning_internals.training_data_source)
def test_the_data_of_a_fit(monkeypatch, make_trainer):
    class Asks(MNN):
        def setup(self, stage):
            found.append(lightning_internals.training_data_source(self.trainer))
            super().setup(stage)

    found, data, model = [], GaussianData(6, 4), Asks(4, (3,), default_callbacks=False)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data.train_dataloader())
    assert found[0] is data
    assert found[1] is not data
    hide(monkeypatch, trainer.fit_loop, "_data_source")
    with missing("fit_loop._data_source"):
        lightning_internals.training_data_source(trainer)


@canary_of(lightning_internals.training_iterators)
@pytest.mark.parametrize("owner", ["fit_loop", "_combined_loader", "iterators"])
def test_the_iterators_of_a_fit(monkeypatch, make_trainer, owner):
    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (own,) = lightning_internals.training_iterators(trainer)
            assert own._loader is trainer.train_dataloader
            loop = trainer.fit_loop
            with monkeypatch.context() as patched:
                if owner == "fit_loop":
                    hide(patched, loop, "_combined_loader")
                elif owner == "_combined_loader":
                    hide(patched, loop._combined_loader, "_iterator")
                else:
                    hide(patched, loop._combined_loader._iterator, "iterators")
                with missing({"fit_loop": "_combined_loader", "_combined_loader": "_iterator"}.get(owner, owner)):
                    lightning_internals.training_iterators(trainer)
            looked.append(True)

    looked = []
    trainer = make_trainer(max_epochs=1, callbacks=[Looks()])
    trainer.fit(MNN(4, (3,), default_callbacks=False), GaussianData(6, 4))
    assert looked
    assert lightning_internals.training_iterators(make_trainer()) == ()


@canary_of(lightning_internals.load_training_data)
def test_training_data_are_loaded_early(monkeypatch, make_trainer):
    class Looks(Callback):
        def on_fit_start(self, trainer, pl_module):
            before.append(trainer.train_dataloader)
            lightning_internals.load_training_data(trainer)
            loaded.append(trainer.train_dataloader)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            loaded.append(trainer.train_dataloader)

    before, loaded = [], []
    trainer = make_trainer(max_epochs=1, callbacks=[Looks()])
    trainer.fit(Plain(), torch.zeros(3, 1))
    assert before == [None]
    assert loaded[0] is loaded[1] is not None
    hide(monkeypatch, type(trainer.fit_loop), "setup_data")
    with missing("fit_loop.setup_data"):
        lightning_internals.load_training_data(trainer)


@canary_of(lightning_internals.hooks_before_transfer)
def test_hooks_before_transfer(monkeypatch, make_trainer):
    class Doubles(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            found = lightning_internals.hooks_before_transfer(pl_module, torch.ones(2))
            assert found.tolist() == [2, 2]
            hide(monkeypatch, type(pl_module), "_on_before_batch_transfer")
            with missing("_on_before_batch_transfer"):
                lightning_internals.hooks_before_transfer(pl_module, torch.ones(2))
            monkeypatch.undo()
            looked.append(True)

    looked = []
    trainer = make_trainer(max_epochs=1, callbacks=[Looks()])
    trainer.fit(Doubles(), torch.zeros(3, 1))
    assert looked


@canary_of(lightning_internals.count_epochs)
def test_epochs_are_counted(monkeypatch, fitted):
    lightning_internals.count_epochs(fitted)
    assert fitted.current_epoch == 3
    assert fitted.fit_loop.state_dict()["epoch_progress"]["total"]["completed"] == 3
    with monkeypatch.context() as patched:
        patched.setattr(pl.Trainer, "current_epoch", 5)  # which reads another count
        with missing("it is 5 and not 6"):
            lightning_internals.count_epochs(fitted)
    hide(monkeypatch, fitted.fit_loop, "epoch_progress")
    with missing("fit_loop.epoch_progress"):
        lightning_internals.count_epochs(fitted)


@canary_of(lightning_internals.StepCount)
def test_steps_are_counted(monkeypatch, fitted):
    count = lightning_internals.StepCount(fitted)
    count.add()
    count.add()
    assert fitted.global_step == 4
    with monkeypatch.context() as patched:
        patched.setattr(pl.Trainer, "global_step", 4)  # which reads another count
        with missing("it is 4 and not 5"):
            count.add()
    hide(monkeypatch, fitted.fit_loop.epoch_loop.manual_optimization, "optim_step_progress")
    with missing("optim_step_progress"):
        lightning_internals.StepCount(fitted)


@canary_of(lightning_internals.count_batches)
def test_batches_are_counted(monkeypatch, make_trainer):
    class Logs(Plain):
        def training_step(self, batch, batch_idx):
            lightning_internals.count_batches(self.trainer, 9)
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    class Steps(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step):
            steps.append(step)

    steps = []
    trainer = make_trainer(max_epochs=1, logger=Steps())
    trainer.fit(Logs(), torch.zeros(3, 1))
    assert steps == [9, 19, 29]  # Lightning counts from 0, and one a batch
    hide(monkeypatch, trainer.fit_loop.epoch_loop, "_batches_that_stepped")
    with missing("_batches_that_stepped"):
        lightning_internals.count_batches(trainer, 1)


@canary_of(lightning_internals.share_step_count)
@pytest.mark.parametrize("name", ["automatic_optimization", "manual_optimization"])
def test_both_ways_to_optimise_share_a_count(monkeypatch, fitted, name):
    lightning_internals.StepCount(fitted).add()
    model = fitted.lightning_module
    for automatic, steps in ((False, 3), (True, 2)):
        model.automatic_optimization = automatic
        assert fitted.global_step == steps
    lightning_internals.share_step_count(fitted)
    for automatic in (False, True):
        model.automatic_optimization = automatic
        assert fitted.global_step == 3
    with monkeypatch.context() as patched:
        patched.setattr(pl.Trainer, "global_step", 2)
        with missing("it is 2 and not 3"):
            lightning_internals.share_step_count(fitted)
    hide(monkeypatch, fitted.fit_loop.epoch_loop, name)
    with missing(name):
        lightning_internals.share_step_count(fitted)


@canary_of(lightning_internals.share_saved_step_count)
def test_saved_counts_are_shared(tmp_path, fitted):
    def saved():
        return torch.load(tmp_path / "end.ckpt", weights_only=True)

    fitted.fit_loop.epoch_loop.automatic_optimization.optim_progress.reset()
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    content = saved()
    lightning_internals.share_saved_step_count(content)
    assert content["global_step"] == 2
    loop = content["loops"]["fit_loop"]
    totals = [
        loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"],
        loop["epoch_loop.manual_optimization.optim_step_progress"]["total"],
    ]
    assert totals == [{"ready": 2, "completed": 2}] * 2
    with missing("it is 7 and not 2"):
        lightning_internals.share_saved_step_count(saved() | {"global_step": 7})
    content["loops"]["fit_loop"] = {f"new.{name}": value for name, value in loop.items()}
    with missing('checkpoint["loops"]'):
        lightning_internals.share_saved_step_count(content)


@canary_of(lightning_internals.set_limits)
@pytest.mark.parametrize("name", ["fit_loop", "epoch_loop", "max_steps"])
def test_limits_of_training(monkeypatch, fitted, name):
    lightning_internals.set_limits(fitted, 5, 7)
    assert (fitted.max_epochs, fitted.max_steps) == (5, 7)
    with monkeypatch.context() as patched:
        patched.setattr(pl.Trainer, "max_epochs", 4)  # which reads another limit
        with missing("it is (4, 8) and not (6, 8)"):
            lightning_internals.set_limits(fitted, 6, 8)
    loop = fitted.fit_loop
    hide(monkeypatch, {"fit_loop": fitted, "epoch_loop": loop, "max_steps": loop.epoch_loop}[name], name)
    with missing(name):
        lightning_internals.set_limits(fitted, 6, 8)


@canary_of(lightning_internals.complete_saved_epoch)
def test_a_saved_epoch_is_completed(tmp_path, make_trainer):
    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    class Counts(Plain):
        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

    seen = []
    make_trainer(max_epochs=1, callbacks=[Saves()]).fit(Counts(), torch.zeros(3, 1))
    content = torch.load(tmp_path / "epoch.ckpt", weights_only=True)
    lightning_internals.complete_saved_epoch(content)
    torch.save(content, tmp_path / "completed.ckpt")
    seen.clear()
    make_trainer(max_epochs=2).fit(Counts(), torch.zeros(3, 1), ckpt_path=tmp_path / "completed.ckpt")
    assert seen == [(1, 0), (1, 1), (1, 2)]
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        content = torch.load(tmp_path / "epoch.ckpt", weights_only=True)
        del content["loops"]["fit_loop"][name]
        with missing(name):
            lightning_internals.complete_saved_epoch(content)


class FailsAtAnEnd(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise ZeroDivisionError


@canary_of(lightning_internals.completed_epochs)
def test_an_epoch_is_completed_whatever_happens_in_the_hooks_of_its_end(monkeypatch, make_trainer):
    trainer = make_trainer(max_epochs=3, callbacks=[FailsAtAnEnd()])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Plain(), torch.ones(4, 1))
    assert (trainer.current_epoch, lightning_internals.completed_epochs(trainer)) == (1, 2)
    hide(monkeypatch, trainer.fit_loop, "epoch_progress")
    with missing("epoch_progress"):
        lightning_internals.completed_epochs(trainer)


@canary_of(lightning_internals.take_launched_processes)
def test_processes_that_lightning_has_started(monkeypatch, make_trainer):
    assert lightning_internals.take_launched_processes(make_trainer()) == []
    trainer = make_trainer(strategy="ddp", devices=2)
    launcher = trainer.strategy.launcher
    launcher.procs.append(child := subprocess.Popen([sys.executable, "-c", "exit(1)"]))
    observer = _ChildProcessObserver(main_pid=0, child_processes=launcher.procs, sleep_period=0)
    assert lightning_internals.take_launched_processes(trainer) == [child]
    assert child.wait() == 1
    observer.run()  # sees no failure: it would send a signal to process 0, which is this one's group
    hide(monkeypatch, launcher, "procs")
    with missing("procs"):
        lightning_internals.take_launched_processes(trainer)


@canary_of(lightning_internals.leave_out_exchange_of_signals)
def test_processes_exchange_no_signals(monkeypatch, make_trainer):
    trainer = make_trainer(max_epochs=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    exchanged = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: exchanged.append(tensor))
    loop = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor()
    assert len(exchanged) == 1
    lightning_internals.leave_out_exchange_of_signals(trainer)
    loop._broadcast_sigterm_tensor()
    assert len(exchanged) == 1
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop).advance)


@canary_of(lightning_internals.steps_between_checkpoints, lightning_internals.time_between_checkpoints)
def test_when_a_model_checkpoint_saves(monkeypatch):
    steps, time = lightning_internals.steps_between_checkpoints, lightning_internals.time_between_checkpoints
    callback = ModelCheckpoint(every_n_train_steps=3)
    assert (steps(callback), time(callback), callback.every_n_epochs) == (3, None, 0)
    callback = ModelCheckpoint(train_time_interval=timedelta(minutes=2))
    assert (steps(callback), time(callback), callback.every_n_epochs) == (0, timedelta(minutes=2), 0)
    callback = ModelCheckpoint()
    assert (steps(callback), time(callback), callback.every_n_epochs) == (0, None, 1)
    hide(monkeypatch, callback, "_every_n_train_steps")
    with missing("_every_n_train_steps"):
        steps(callback)
    hide(monkeypatch, callback, "_train_time_interval")
    with missing("_train_time_interval"):
        time(callback)


@canary_of(lightning_internals.trains_in_children)
def test_where_a_fit_trains(monkeypatch, make_trainer):
    assert not lightning_internals.trains_in_children(make_trainer(strategy="ddp", devices=2))
    assert lightning_internals.trains_in_children(make_trainer(strategy="ddp_spawn", devices=2))
    hide(monkeypatch, pl.strategies.launchers, "_MultiProcessingLauncher")
    with missing("_MultiProcessingLauncher"):
        lightning_internals.trains_in_children(make_trainer())


@canary_of(lightning_internals.combination)
def test_how_loaders_are_combined(monkeypatch, fitted):
    assert lightning_internals.combination(fitted) == "max_size_cycle"
    hide(monkeypatch, fitted.fit_loop, "_combined_loader")
    with missing("_combined_loader"):
        lightning_internals.combination(fitted)


@canary_of(lightning_internals.computed_metrics)
def test_metrics_that_are_computed_already(monkeypatch, fitted):
    fitted.callback_metrics["known"] = torch.tensor(1.0)
    assert lightning_internals.computed_metrics(fitted)["known"] == 1
    hide(monkeypatch, fitted, "_logger_connector")
    with missing("_logger_connector"):
        lightning_internals.computed_metrics(fitted)


@canary_of(lightning_internals.check_wandb_logger)
@pytest.mark.parametrize("name", ["_experiment", "_id", "_offline", "_prefix", "_save_dir", "_wandb_init"])
def test_attributes_of_the_wandb_logger(monkeypatch, tmp_path, name):
    logger = WandbLogger(save_dir=tmp_path, offline=True, id="a", prefix="b")
    lightning_internals.check_wandb_logger(logger)
    assert (logger._id, logger._offline, logger._prefix, logger._save_dir) == ("a", True, "b", str(tmp_path))
    assert logger._wandb_init["id"] == "a"
    hide(monkeypatch, logger, name)
    with missing(name):
        lightning_internals.check_wandb_logger(logger)


@canary_of(lightning_internals.loggers_of_remarks)
def test_loggers_of_remarks():
    for name in lightning_internals.loggers_of_remarks():
        assert "getLogger(__name__)" in inspect.getsource(importlib.import_module(name))


# Hydra


@canary_of(hydra_internals.result_of)
def test_what_a_job_returned(monkeypatch, capsys):
    done, failed = JobReturn(status=JobStatus.COMPLETED), JobReturn(status=JobStatus.FAILED)
    done.return_value, failed.return_value = 3, ValueError("no")
    assert hydra_internals.result_of(done) == done.return_value == 3
    assert str(hydra_internals.result_of(failed)) == "no"
    assert capsys.readouterr().err == ""
    hide(monkeypatch, JobReturn, "_return_value")
    with missing("JobReturn._return_value"):
        hydra_internals.result_of(failed)


@canary_of(hydra_internals.singletons, hydra_internals.set_singletons)
def test_the_state_of_hydra(monkeypatch):
    class Own(metaclass=Singleton):
        pass

    before = dict(Singleton._instances)
    try:
        own = Own.instance()
        own.value = 3
        state = hydra_internals.singletons()
        own.value = 4
        hydra_internals.set_singletons(state)
        assert Own.instance().value == 3
    finally:
        Singleton._instances = before
    monkeypatch.delattr(Singleton, "get_state")
    with missing("Singleton.get_state"):
        hydra_internals.singletons()
    monkeypatch.setitem(sys.modules, "hydra.core.singleton", None)
    with missing("hydra.core.singleton"):
        hydra_internals.set_singletons({})


@canary_of(hydra_internals.split_sweep)
def test_jobs_of_a_sweep(monkeypatch):
    assert hydra_internals.split_sweep(["a=1,2", "b=range(0,2)"]) == [
        ["a=1", "b=0"],
        ["a=1", "b=1"],
        ["a=2", "b=0"],
        ["a=2", "b=1"],
    ]
    with monkeypatch.context() as patched:
        sweeper = sys.modules["hydra._internal.core_plugins.basic_sweeper"]  # Hydra imports it again for each search
        patched.delattr(sweeper.BasicSweeper, "split_arguments")
        with missing("BasicSweeper.split_arguments"):
            hydra_internals.split_sweep(["a=1"])
    monkeypatch.setitem(sys.modules, "hydra._internal.core_plugins.basic_sweeper", None)
    with missing("hydra._internal.core_plugins.basic_sweeper"):
        hydra_internals.split_sweep(["a=1"])


@canary_of(hydra_internals.errors_told_by)
def test_what_goes_wrong_on_hydras_command_line_is_handed_over(monkeypatch, capsys):
    told = []

    def usage(problem):
        told.append(problem)
        sys.exit(2)

    @hydra.main(version_base="1.3", config_path="pkg://lightning_mnn.conf", config_name="config")
    def program(cfg):
        raise ValueError("of the task")

    def run(*arguments, tell):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as ended, hydra_internals.errors_told_by(tell, usage):
            program()
        return ended.value.code

    assert run("no=key", tell=lambda error: told.append(type(error).__name__) or True) == 1
    assert run("--no-such-option", tell=None) == 2
    assert told == ["ConfigCompositionException", "unrecognized arguments: --no-such-option"]
    assert capsys.readouterr().err == ""
    assert run("no=key", tell=lambda error: False) == 1  # Hydra reports it
    assert "Could not override 'no'" in capsys.readouterr().err
    hidden = {"hydra._internal.utils": "run_and_report", "hydra.main": "get_args_parser"}
    for module, name in hidden.items():
        with monkeypatch.context() as patched:
            patched.delattr(sys.modules[module], name)
            with missing(name), hydra_internals.errors_told_by(lambda error: True, usage):
                pass


@canary_of(hydra_internals.submitit_job)
def test_what_runs_a_job_of_submitit(monkeypatch):
    job = hydra_internals.submitit_job()
    taken = list(inspect.signature(job.__call__).parameters)
    assert taken == ["self", "sweep_overrides", "job_dir_key", "job_num", "job_id", "singleton_state"]
    with monkeypatch.context() as patched:
        patched.delattr(sys.modules[job.__module__], "SlurmLauncher")
        with missing("SlurmLauncher"):
            hydra_internals.submitit_job()
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher", None)
    with pytest.raises(ImportError):
        hydra_internals.submitit_job()


# Python


@canary_of(python_internals.preparation, python_internals.prepare)
def test_how_another_process_is_prepared(monkeypatch):
    found = python_internals.preparation()
    assert [path for path in found["sys_path"] if path in sys.path]
    assert found.keys() <= {"sys_path", "init_main_from_name", "init_main_from_path"}
    before = list(sys.path)
    try:
        python_internals.prepare({"sys_path": ["/somewhere"]})
        assert sys.path == ["/somewhere"]
    finally:
        sys.path = before
    monkeypatch.delattr(multiprocessing.spawn, "get_preparation_data")
    with missing("get_preparation_data"):
        python_internals.preparation()
    monkeypatch.delattr(multiprocessing.spawn, "prepare")
    with missing("prepare"):
        python_internals.prepare({})


@canary_of(python_internals.recorded_reads)
def test_what_is_read_from_the_environment_one_at_a_time_is_told_from_copies(monkeypatch):
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(name, "here")
    plain = type(os.environ)
    with python_internals.recorded_reads() as names:
        assert os.environ.get("ONE") == os.getenv("TWO") == "here"
        assert "NOT_THERE" not in os.environ
    assert names == {"ONE", "TWO", "NOT_THERE"}
    with python_internals.recorded_reads() as names:
        copies = [os.environ.copy(), dict(os.environ), dict(os.environ.items()), os.environ | {}]
    assert names == set()
    assert all(one == dict(os.environ) for one in copies)
    assert type(os.environ) is plain


@canary_of(python_internals.renew_temporary_directory)
def test_a_temporary_folder_is_replaced_by_a_new_one(monkeypatch, tmp_path):
    folder = tempfile.TemporaryDirectory("end", dir=tmp_path)
    before = Path(folder.name)
    python_internals.renew_temporary_directory(folder, ("end",), {"dir": tmp_path})
    after = Path(folder.name)
    assert before.exists()
    assert after.exists()
    assert after.name.endswith("end")
    folder.cleanup()
    assert [path.exists() for path in (before, after)] == [True, False]
    monkeypatch.delattr(folder, "_finalizer")
    with missing("_finalizer"):
        python_internals.renew_temporary_directory(folder, (), {})


@canary_of(python_internals.end_process)
def test_a_process_ends_as_by_sys_exit_but_keeps_its_objects(monkeypatch):
    code = """
import atexit, sys, threading, time
from lightning_mnn.utilities.compat.python_internals import end_process

class Freed:
    def __del__(self):
        print("freed")

kept = Freed()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("end")
END
"""
    said = {}
    for end in ("end_process(3)", "sys.exit(3)"):
        command = [sys.executable, "-c", code.replace("END", end)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 3, done.stderr
        said[end] = done.stdout.split("\n")[:-1]
    assert said["end_process(3)"] == ["end", "thread", "at exit"]
    assert said["sys.exit(3)"] == [*said["end_process(3)"], "freed"]
    monkeypatch.delattr(threading, "_shutdown")
    with pytest.raises(SystemExit):
        python_internals.end_process(3)


# torchvision


@canary_of(
    torchvision_internals.mnist_archives, torchvision_internals.cifar10_archive, torchvision_internals.cifar10_folder
)
def test_files_of_data_sets(monkeypatch):
    archives = torchvision_internals.mnist_archives()
    kinds = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    assert archives.keys() == {f"{part}-{kind}" for part in ("train", "t10k") for kind in kinds}
    name, md5 = torchvision_internals.cifar10_archive()
    folder, batches = torchvision_internals.cifar10_folder()
    assert (name, folder) == ("cifar-10-python.tar.gz", "cifar-10-batches-py")
    assert batches.keys() == {*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"}
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in (md5, *batches.values(), *archives.values()))
    monkeypatch.delattr(MNIST, "resources")
    with missing("resources"):
        torchvision_internals.mnist_archives()
    with monkeypatch.context() as patched:
        patched.delattr(CIFAR10, "tgz_md5")
        with missing("tgz_md5"):
            torchvision_internals.cifar10_archive()
    for name in ("train_list", "base_folder", "meta"):
        with monkeypatch.context() as patched:
            patched.delattr(CIFAR10, name)
            with missing(name):
                torchvision_internals.cifar10_folder()


# W&B


@pytest.fixture
def offline_run(tmp_path):
    run = wandb.init(mode="offline", dir=tmp_path, project="p", settings=wandb.Settings(silent=True))
    yield run
    run.finish()


def test_what_is_imported_when_a_run_starts(tmp_path):
    """What wandb alone does not import; else the list is of no use."""
    code = f"""
import sys, wandb
names = set({wandb_internals.IMPORTED_WHEN_A_RUN_STARTS})
assert not names & set(sys.modules)
wandb.init(mode="offline", dir={str(tmp_path)!r}, project="p", settings=wandb.Settings(silent=True)).finish()
assert names <= set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@canary_of(wandb_internals.local_step)
def test_the_step_of_what_is_logged_next(monkeypatch, offline_run):
    for _ in range(2):
        offline_run.log({"a": 1}, step=offline_run.step + 4, commit=True)
        assert wandb_internals.local_step(offline_run) == offline_run.step > 0
    expected = offline_run.step
    held = {"_local_step", "_step"} & vars(offline_run).keys()
    assert held
    monkeypatch.setattr(type(offline_run), "step", expected)  # read from what is taken away, in older versions
    for name in held:
        hide(monkeypatch, offline_run, name)
    assert wandb_internals.local_step(offline_run) == expected
    monkeypatch.undo()


def test_a_disabled_run_counts_no_steps():
    with wandb.init(mode="disabled") as run:
        run.log({"a": 1}, step=5)
        assert wandb_internals.local_step(run) == 0


@canary_of(wandb_internals.forget_foreign_service)
def test_the_service_of_another_process_is_forgotten(monkeypatch, offline_run):
    own = os.environ["WANDB_SERVICE"]
    wandb_internals.forget_foreign_service()
    assert os.environ["WANDB_SERVICE"] == own
    for foreign in (own.replace(str(os.getpid()), str(os.getppid())), "in another form"):
        monkeypatch.setenv("WANDB_SERVICE", foreign)
        wandb_internals.forget_foreign_service()
        assert "WANDB_SERVICE" not in os.environ


@canary_of(wandb_internals.tell_terminal_to)
def test_what_wandb_says_is_heard(monkeypatch):
    class Listener:
        def info(self, message):
            heard.append(message)

        warning = error = info

    heard = []
    wandb_internals.tell_terminal_to(Listener())
    try:
        wandb.termwarn("mind the step")
    finally:
        wandb.termsetup(wandb.Settings(), None)
    assert any("mind the step" in message for message in heard)
    monkeypatch.delattr(wandb, "termsetup")
    with missing("termsetup"):
        wandb_internals.tell_terminal_to(Listener())


@canary_of(wandb_internals.workspace_content)
def test_a_workspace_as_wandb_keeps_it(monkeypatch):
    workspace = ws.Workspace(entity="e", project="p", name="three", sections=[ws.Section(name="one")])
    content = wandb_internals.workspace_content(workspace)
    assert content["displayName"] == "three"
    assert content["spec"]["section"]["panelBankConfig"]["sections"][0]["name"] == "one"
    monkeypatch.delattr(ws.Workspace, "_to_model")
    with missing("Workspace._to_model"):
        wandb_internals.workspace_content(workspace)


@canary_of(hydra_internals.replace_composition)
def test_sweeps_compose_their_jobs_in_another_way(monkeypatch):
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        asked = []
        hydra_internals.replace_composition(lambda compose: lambda overrides: asked.append(overrides) or compose([]))
        assert loader.load_sweep_config(master_config=master, sweep_overrides=["seed=7"]).seed == 0
        assert asked == [["seed=7"]]
        vars(loader).pop("load_sweep_config")
        for kind in (type(loader), ConfigLoader):
            monkeypatch.delattr(kind, "load_sweep_config")
        with missing("load_sweep_config"):
            hydra_internals.replace_composition(lambda compose: compose)


@canary_of(hydra_internals.value_of_override)
def test_values_of_overrides_are_read(monkeypatch):
    assert hydra_internals.value_of_override("a.b=[1,x]") == [1, "x"]
    monkeypatch.delattr(OverridesParser, "create")
    with missing("OverridesParser.create"):
        hydra_internals.value_of_override("a=1")
