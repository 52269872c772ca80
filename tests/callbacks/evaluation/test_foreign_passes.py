"""Training is as without a detector, and never ends by it, whatever a module's training_step does."""

import copy
import os
from dataclasses import dataclass

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_mnn.callbacks import ActivationPatternRecorder, LocalMinimumDetector, Schedule, SecondOrderSettings
from tests.children import side_by_side

mse = nn.functional.mse_loss


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1), nn.Flatten(0))


def data():
    x = torch.randn(14, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).float()


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return mse(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


def run(kind, *, with_detector=True, dataset=None, epochs=2, collate=None, detector=None, **options):
    torch.manual_seed(3)
    module = kind()
    torch.manual_seed(5)
    loader = DataLoader(dataset or TensorDataset(*data()), batch_size=5, shuffle=True, collate_fn=collate)
    callbacks = [detector or LocalMinimumDetector(Schedule(every=1), stop_training=False)] if with_detector else []
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **defaults | quiet | options)
    trainer.fit(module, loader)
    return module, callbacks[0].summary() if callbacks else None


def check_same(kind, *, dataset=lambda: None, **options):
    """Train with and without a detector; returns what the former says, and its module."""
    plain, _ = run(kind, with_detector=False, dataset=dataset(), **options)
    module, summary = run(kind, dataset=dataset(), **options)
    for before, after in zip(plain.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    return summary, module


# Modules that need their own hooks, and such as cannot be run in a pass


class MadeAtStart(Plain):
    def on_train_start(self):
        self.outputs = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss


class MadeEachEpoch(MadeAtStart):
    def on_train_start(self):
        pass

    def on_train_epoch_start(self):
        self.outputs = []


@pytest.mark.parametrize("kind", [MadeAtStart, MadeEachEpoch])
def test_a_step_that_needs_the_modules_hooks_is_run_after_them(kind):
    summary, module = check_same(kind)
    assert summary["evidence"] == "second_order"
    assert len(module.outputs) == (6 if kind is MadeAtStart else 3)


def test_a_recorder_waits_for_the_modules_hooks_too(tmp_path):
    class NoForward(MadeAtStart):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            self.outputs.append(batch_idx)
            return mse(self.net(batch[0]), batch[1])

    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    module, _ = run(NoForward, detector=recorder)
    assert recorder.store.steps == [0, 3, 6]
    assert len(module.outputs) == 6


class Auxiliary(Plain):
    def forward(self, x):
        return (self.net(x), self.net(x)) if self.training else self.net(x)

    def training_step(self, batch, batch_idx):
        out, more = self(batch[0])
        return mse(out, batch[1]) + mse(more, batch[1])


class FailsLater(Plain):
    """At step 4 in eval mode, which comes after the first checks."""

    def training_step(self, batch, batch_idx):
        if self.global_step >= 3 and not self.training:
            raise ZeroDivisionError("too late")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "told"), [(Auxiliary, "failed: ValueError: too many values"), (FailsLater, "ZeroDivisionError: too late")]
)
def test_a_step_that_fails_in_a_pass_leaves_evidence_of_first_order(kind, told):
    summary, _ = check_same(kind)
    assert summary["evidence"] == "first_order"
    assert told in summary["reason"]
    assert "give the callback a loss_fn(module, batch)" in summary["reason"].replace("Give", "give")


def test_errors_of_a_given_loss_and_divergence_stay_errors():
    def broken(module, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Plain, detector=LocalMinimumDetector(loss_fn=broken, strict=True))


class Adversarial(Plain):
    """By hand, with a forward that takes noise."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))

    def forward(self, noise):
        return self.generator(noise)

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.net(self(torch.randn(5, 3))).mean())
        self.optimizers().step()


class SparseByHand(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.embedding = nn.Embedding(9, 4, sparse=True)

    def forward(self, x):
        return self.net(x + self.embedding(x[:, 0].abs().long()))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(mse(self(batch[0]), batch[1]))
        self.square = sum(p.grad.to_dense().double().square().sum() for p in self.parameters())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_first_order_evidence_where_forward_fails_and_where_gradients_are_sparse():
    summary, _ = check_same(Adversarial)
    assert summary["kind"] == "undecided"
    assert "kinks were not checked: Adversarial.forward fails" in summary["reason"]
    assert "forward_fn" not in summary["reason"]
    summary, module = check_same(SparseByHand)
    assert summary["gradient_norm"] == pytest.approx(float(module.square) ** 0.5, rel=1e-6)


class Unusual(Plain):
    """Any arguments, the logger's folders, gradients of its own, and a frozen mask with infinities."""

    def __init__(self):
        super().__init__()
        self.mask = nn.Parameter(torch.full((2, 2), -torch.inf), requires_grad=False)

    def training_step(self, *args):
        batch, _ = args
        assert isinstance(self.logger, CSVLogger)
        assert self.trainer.log_dir == self.logger.log_dir == os.path.join(self.logger.save_dir, "a", "b")  # noqa: PTH118
        x = batch[0].clone().requires_grad_()
        out = self(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return mse(out, batch[1]) + 0.1 * slope.square().mean()


def test_usual_things_of_a_step_work_in_a_pass(tmp_path):
    detector = LocalMinimumDetector(
        Schedule(every=1), stop_training=False, second_order=SecondOrderSettings(gradient_tolerance=10.0)
    )
    _, summary = run(Unusual, detector=detector, logger=CSVLogger(tmp_path, name="a", version="b"))
    assert summary["evidence"] == "second_order"
    assert summary["smallest_eigenvalue"] is not None


def test_a_lazy_layer_is_left_to_training():
    class Lazy(Plain):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.LazyLinear(6)

    module, summary = run(Lazy)
    assert summary["evidence"] == "first_order"
    assert "LazyLinear is not initialised yet: run the module once on a batch" in summary["reason"]
    assert type(module.net[0]) is nn.Linear
    assert not module.net[0]._forward_pre_hooks


# State that a step changes, and data that draw


class Teacher(Plain):
    """An average of the weights, which its step updates, and which requires gradients."""

    hidden = False

    def __init__(self):
        super().__init__()
        teacher = copy.deepcopy(self.net)
        self.kept = [teacher] if self.hidden else nn.ModuleList([teacher])

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for old, new in zip(self.kept[0].parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 0.1)
            target = self.kept[0](batch[0])
        return mse(self(batch[0]), batch[1]) + mse(self(batch[0]), target)


class HiddenTeacher(Teacher):
    hidden = True


class Meter:
    def __init__(self):
        self.count, self.values, self.average = 0, [], torch.zeros(())


class Metered(Plain):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.meter.count += 1
        self.meter.values.append(1.0)
        self.meter.average += 0.1
        return loss * (self.meter.count + len(self.meter.values) + self.meter.average)


class Scheduled(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


@pytest.mark.parametrize("kind", [Teacher, HiddenTeacher, Metered, Scheduled])
def test_what_a_step_changes_is_put_back(kind):
    summary, _ = check_same(kind)
    assert summary["evidence"] == "second_order"


class Noise:
    def __init__(self, draw):
        self.draw = draw

    def __call__(self, x):
        return x + torch.from_numpy(self.draw.normal(size=4)).float()


class Noisy(Dataset):
    def __init__(self):
        self.x, self.y = data()
        self.transform = [Noise(np.random.default_rng(0))]
        self.drawing = torch.Generator().manual_seed(0)

    def __len__(self):
        return 14

    def __getitem__(self, index):
        return self.transform[0](self.x[index]) + torch.randn(4, generator=self.drawing), self.y[index]


class Augmented(Plain):
    def __init__(self):
        super().__init__()
        self.noise = Noise(np.random.default_rng(0))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.noise(batch[0]), batch[1]


def test_the_datas_own_generators_are_put_back():
    summary, _ = check_same(Plain, dataset=lambda: Subset(Noisy(), range(14)))
    assert summary["evidence"] == "second_order"
    check_same(Augmented)


class Ramped(Plain):
    """A loss that grows with the steps: of the state in which training left it."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.register_buffer("scale", torch.tensor(5.0))

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.scale *= 1.5
        return self.count * self.scale * mse(self(batch[0]), batch[1])


def test_a_loss_with_a_state_is_that_of_the_state_that_training_left():
    summary, module = check_same(Ramped)
    x, y = data()
    expected = (module.count + 1) * module.scale * 1.5 * mse(module(x), y).detach()
    assert summary["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_depends_on_something_else_is_told():
    steps = []

    class Outside(Plain):
        def training_step(self, batch, batch_idx):
            steps.append(1)
            return len(steps) * mse(self(batch[0]), batch[1])

    _, summary = run(Outside)
    assert summary["evidence"] == "first_order"
    assert "depends on a state outside the module" in summary["reason"]


# Batches, and parameters that are not trained


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, *args, **kwargs):
        return type(self)(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


class Graphs:
    """A batch of a class of its own."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, *args, **kwargs):
        return type(self)(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


class Uncopied(Graphs):
    def __deepcopy__(self, memo):
        raise RuntimeError


class InPlace(Plain):
    def training_step(self, batch, batch_idx):
        batch.x.mul_(2)
        return mse(self(batch.x), batch.y)


@pytest.mark.parametrize("kind", [Frozen, Graphs, Uncopied])
def test_batches_of_any_class(kind):
    def collate(rows):
        return kind(*(torch.stack(column) for column in zip(*rows, strict=True)))

    summary, module = check_same(InPlace, collate=collate)
    x, y = data()
    assert summary["loss"] == pytest.approx(mse(module(2 * x), y).item(), rel=1e-5)


def test_the_weights_are_those_that_the_optimiser_trains():
    class Head(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.net[4].parameters(), max_iter=100, line_search_fn="strong_wolfe")

    detector = LocalMinimumDetector(Schedule(every=1), stop_training=False)
    module, summary = run(Head, epochs=10, detector=detector)
    assert any(p.grad is not None for p in module.net[0].parameters())
    x, y = data()
    gradient = torch.autograd.grad(mse(module(x), y), list(module.net[4].parameters()))
    expected = sum(float(part.double().square().sum()) for part in gradient) ** 0.5
    assert summary["gradient_norm"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


# Several processes


class FailsOnOne(MadeAtStart):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and not self.training and self.global_step > 0:
            raise ZeroDivisionError("here only")
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        (detector,) = (found for found in self.trainer.callbacks if isinstance(found, LocalMinimumDetector))
        found = detector.summary()
        print(found["evidence"], "here only" in found["reason"])


@pytest.mark.slow
def test_a_failure_on_one_process_is_one_of_all(tmp_path):
    side_by_side(tmp_path, 2, in_two_processes)
    for rank in range(2):
        assert "first_order True\n" in (tmp_path / f"rank_{rank}" / "out.txt").read_text()


def in_two_processes():
    run(FailsOnOne, devices=2, strategy="ddp")
