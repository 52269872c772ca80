"""A pass over a module leaves nothing behind."""
# ruff: noqa: NPY002, S311 (a user's generators, each of them)

import random
from collections import deque

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn.callbacks.evaluation.isolation import isolated

pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode at the start of training:UserWarning")


class Hoarder(pl.LightningModule):
    """Keeps state of every kind, changes all of it in each step, and draws from every generator."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
        self.net[1].eval()  # frozen by its user
        self.teacher = nn.Linear(4, 3).requires_grad_(False)  # noqa: FBT003
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(2))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.hidden_metrics = [torchmetrics.MeanMetric()]
        self.outputs, self.seen, self.names, self.window = [], {"n": [0]}, {"a"}, deque([1, 2, 3], maxlen=3)
        self.count, self.hidden, self.table, self.pair = 0, torch.zeros(2), np.zeros(2), (torch.zeros(2), [1])
        self.own = torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x + torch.rand(1) + np.random.rand() + random.random())
        loss = nn.functional.cross_entropy(out, y)
        self.disturb(out, y, loss.detach())
        self.log("loss", loss, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy})
        return loss

    def disturb(self, out, y, loss):
        self.teacher.weight.data.mul_(0.9)
        self.queue += 1
        self.replaced = self.replaced + 1
        self.accuracy(out, y)
        self.hidden_metrics[0].update(loss)
        self.outputs.append(loss)
        self.seen["n"][0] += 1
        self.seen[len(self.seen)] = loss
        self.names.add(len(self.names))
        self.window.append(0)
        self.count += 1
        self.hidden.add_(1)
        self.table += 1
        self.pair[0].add_(1)
        self.pair[1].append(2)
        self.drawn = torch.rand(1, generator=self.own[0]), self.own[1].random(), self.own[2].random()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Passes(pl.Callback):
    """Runs the training step in the midst of training, with or without an error."""

    def __init__(self, error=None):
        self.error = error
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics, results = dict(trainer.callback_metrics), trainer._results
        before = {name: value for name, value in vars(pl_module).items() if name != "training"}
        keys = list(vars(pl_module))
        tensors = {name: t.clone() for name, t in pl_module.state_dict().items()}
        modes = [module.training for module in pl_module.modules()]
        try:
            with isolated(trainer, pl_module):
                assert not any(module.training for module in pl_module.modules())
                pl_module.log("anything", 1.0)
                loss = pl_module.training_step(batch, batch_idx)
                loss.backward()
                self.losses.append(loss.item())
                if self.error:
                    raise self.error
        except ArithmeticError:
            pass
        assert trainer.callback_metrics == metrics
        assert trainer._results is results
        assert list(vars(pl_module)) == keys
        assert all(vars(pl_module)[name] is value for name, value in before.items())
        assert all(torch.equal(t, tensors[name]) for name, t in pl_module.state_dict().items())
        assert [module.training for module in pl_module.modules()] == modes


def train(make_trainer, tmp_path, *callbacks):
    pl.seed_everything(5, verbose=False)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    module, logger = Hoarder(), CSVLogger(tmp_path / str(len(list(tmp_path.iterdir()))), name="", version="")
    trainer = make_trainer(max_epochs=2, callbacks=list(callbacks), logger=logger)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True))
    left = (
        *module.state_dict().values(),
        *module.outputs,
        *(p.grad for p in module.net.parameters()),
        module.hidden_metrics[0].compute(),
        torch.rand(2),
        torch.tensor(np.random.rand()),
        torch.tensor(random.random()),
        torch.tensor(module.own[1].random() + module.own[2].random()),
        torch.rand(2, generator=module.own[0]),
        module.hidden,
        torch.from_numpy(module.table),
        module.pair[0],
    )
    plain = module.count, module.seen["n"], len(module.seen), module.names, list(module.window), module.pair[1]
    rows = (tmp_path / logger.save_dir.split("/")[-1] / "metrics.csv").read_text()
    return left, plain, rows, trainer


@pytest.mark.parametrize("error", [None, ArithmeticError("in the midst of it")])
def test_training_is_the_same_with_passes_in_its_midst(make_trainer, tmp_path, error):
    left, plain, rows, _ = train(make_trainer, tmp_path)
    passes = Passes(error)
    left_after, plain_after, rows_after, trainer = train(make_trainer, tmp_path, passes)
    assert len(passes.losses) == 8
    assert all(torch.equal(a, b) for a, b in zip(left, left_after, strict=True))
    assert plain == plain_after
    assert rows == rows_after
    assert "anything" not in rows
    assert isinstance(trainer.logger, CSVLogger)


class Probe(pl.Callback):
    """Calls a function at the end of training."""

    def __init__(self, act):
        self.act = act

    def on_train_end(self, trainer, pl_module):
        self.act(trainer, pl_module)


def test_each_pass_draws_the_same_numbers_and_gradients_are_put_back(make_trainer, tmp_path):
    def act(trainer, module):
        batch = torch.ones(3, 4), torch.tensor([0, 1, 2])
        frozen = module.net[0].bias.requires_grad_(False)  # noqa: FBT003
        gradient = module.net[0].weight.grad
        kept = gradient.clone()
        losses = []
        for _ in range(2):
            torch.rand(1)
            with isolated(trainer, module):
                module.net[0].bias.requires_grad_(True)  # noqa: FBT003
                losses.append(module.training_step(batch, 0))
                losses[-1].backward()
        assert losses[0] == losses[1]
        assert not frozen.requires_grad
        assert module.net[0].weight.grad is gradient
        assert torch.equal(gradient, kept)
        found.append(losses)

    found = []
    train(make_trainer, tmp_path, Probe(act))
    assert found


def test_a_changed_parameter_is_told(make_trainer, tmp_path):
    def act(trainer, module):
        told = pytest.raises(RuntimeError, match=r"changed a parameter, of shape \(5, 4\)")
        with told, torch.no_grad(), isolated(trainer, module):
            module.net[0].weight.mul_(2)
        with isolated(trainer, module):
            module.net[0].weight.data = torch.zeros(5, 4)
        assert module.net[0].weight.abs().sum() > 0
        found.append(True)

    found = []
    train(make_trainer, tmp_path, Probe(act))
    assert found


def test_what_is_large_is_not_copied_but_checked(make_trainer, tmp_path, monkeypatch):
    def act(trainer, module):
        module.backbone = nn.Linear(50, 50).requires_grad_(False)  # noqa: FBT003
        module.memory = deque(torch.zeros(2) for _ in range(5000))
        first = module.memory[0]
        with isolated(trainer, module) as restart:
            assert not restart._checked
            module.memory.popleft()
            module.memory.append(torch.ones(2))
        assert len(module.memory) == 5000
        assert module.memory[0] is first
        monkeypatch.setattr("lightning_mnn.callbacks.evaluation.isolation._MAX_RESTORED", 1000)
        with isolated(trainer, module):
            pass
        with pytest.raises(RuntimeError, match=r"changed a parameter, of shape \(50, 50\)"), torch.no_grad():  # noqa: SIM117
            with isolated(trainer, module):
                module.backbone.weight.add_(1)
        monkeypatch.undo()
        found.append(True)

    found = []
    train(make_trainer, tmp_path, Probe(act))
    assert found


def test_processes_gather_alone(make_trainer, tmp_path):
    """Their passes take different numbers of batches: who asked the others would wait, or hear of another batch."""

    def act(trainer, module):
        own = module.all_gather
        with monkeypatch.context() as patched:
            patched.setattr(type(trainer), "world_size", 2)
            with isolated(trainer, module):
                assert module.all_gather({"z": torch.zeros(3)})["z"].shape == (1, 3)
        assert module.all_gather == own
        found.append(True)

    found, monkeypatch = [], pytest.MonkeyPatch()
    train(make_trainer, tmp_path, Probe(act))
    assert found


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_tensors_of_odd_kinds_and_compiled_modules(make_trainer, tmp_path):
    def act(trainer, module):
        module.register_buffer("expanded", torch.zeros(1).expand(3))
        module.register_buffer("sparse", torch.eye(2).to_sparse())
        with torch.inference_mode():
            module.inferred = torch.zeros(2)
        module.lazy = nn.LazyBatchNorm1d()
        module.script = torch.jit.script(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
        compiled = torch.compile(lambda x: graphs.append(torch.compiler.is_compiling()) or x + 1, backend="eager")
        with isolated(trainer, module):
            assert not module.script.training
            compiled(torch.zeros(1))
        assert module.script.training
        assert all(part.training for part in module.script.modules())

    graphs = []
    train(make_trainer, tmp_path, Probe(act))
    assert graphs == [False]


def test_a_restart_puts_the_module_back_but_for_what_moves(make_trainer, tmp_path):
    def act(trainer, module):
        teacher, trained = module.teacher.weight, module.net[0].weight
        before, kept = teacher.clone(), trained.clone()
        with isolated(trainer, module) as restart:
            for moving in ((), {id(teacher)}):
                module.count += 1
                module.queue += 1
                with torch.no_grad():
                    teacher.add_(1)
                    trained.add_(1)
                restart.batch(moving)
                assert module.count == 8
                assert torch.equal(module.queue, torch.full((3,), 8.0))
                assert torch.equal(teacher, before + (1 if moving else 0))
                assert not module.training
                assert torch.equal(trained, kept + 1)
                with torch.no_grad():
                    trained.copy_(kept)
        assert torch.equal(teacher, before)
        assert "log" not in vars(module)
        found.append(True)

    found = []
    train(make_trainer, tmp_path, Probe(act))
    assert found
