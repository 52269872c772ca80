"""The callbacks only look on: in a project of any kind training goes on as without them, and they say what they saw."""

import json
import os
import pickle
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 (as everybody calls it)
import wandb
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.tensorboard import SummaryWriter

from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
)
from tests.children import side_by_side
from tests.foreign_models import foreign_model, foreign_trainer
from tests.strange_projects import PROJECTS, project


def observers(folder, **options):
    """The three callbacks, in one line."""
    return [
        LocalMinimumDetector(Schedule(every=1), **options),
        ActivationPatternRecorder(dirpath=folder, **options),
        AngularVolumeMonitor(**options, local_volume=LocalVolumeSettings(num_draws=2)),
    ]


def fit(module, loader, callbacks, **options):
    pl.seed_everything(0, verbose=False)
    trainer = foreign_trainer(callbacks=callbacks, **options)
    trainer.fit(module, loader)
    return trainer


def ours(record):
    """Which callbacks have warned."""
    texts = [str(warning.message) for warning in record]
    return [text.partition(" ")[0] for text in texts if "training goes on" in text]


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_trains_as_without_them_and_each_says_what_it_saw(name, tmp_path):
    module, loader = project(name)
    plain = fit(module, loader, [])
    watched, loader = project(name)
    callbacks = observers(tmp_path)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer = fit(watched, loader, callbacks)
    assert trainer.global_step == plain.global_step > 0
    for before, after in zip(module.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert getattr(module, "played", 0) == getattr(watched, "played", 0)
    said = ours(record)
    assert len(said) == len(set(said))  # one warning a callback, at most
    detector, recorder, monitor = callbacks
    summary = detector.summary()
    assert summary["evidence"] == ("first_order" if name in ("GAN", "DQN") else "second_order")
    assert summary["kind"]
    assert summary["reason"].partition(";")[0]
    assert ("ActivationPatternRecorder" in said) == (recorder.summary()["regions_visited"] is None)
    assert ("AngularVolumeMonitor" in said) == (monitor.failure is not None)


class Regression(pl.LightningModule):
    """Trains the squared error by plain SGD, on batches of one loader or of several at once."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        several = list(batch.values()) if isinstance(batch, dict) else batch
        if isinstance(several[0], list):  # of several loaders
            batch = [torch.cat(parts) for parts in zip(*several, strict=True)]
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Seen(pl.Callback):
    """Keeps the batches that training saw in its last epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)


class Backwards(Sampler):
    """An order of its own, which counts how often it was asked for."""

    def __init__(self, size):
        self.size, self.asked = size, 0

    def __iter__(self):
        self.asked += 1
        return iter(range(self.size)[::-1])

    def __len__(self):
        return self.size


class Prefetched(DataLoader):
    """A DataLoader whose own ``__iter__`` changes what training sees."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield [2 * x, y]


class Wrapped:
    """Another's loader, which is no DataLoader."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


def samples(number=20):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(number, 3, generator=generator).double(), torch.randn(number, 2, generator=generator).double()
    )


def few(loader_class=DataLoader, **options):
    return loader_class(samples(), **({"batch_size": 4} | options))


# Loaders of which each epoch sees the same samples: the verdict's loss is exactly that of what training saw.
STEADY = {
    "own order": lambda: few(sampler=Backwards(20)),
    "own __iter__": lambda: few(Prefetched),
    "a wrapper": lambda: Wrapped(few()),
    "batches of a batch sampler": lambda: few(batch_size=1, batch_sampler=BatchSampler(SequentialSampler(samples()), 4, drop_last=False)),  # noqa: E501
    "own batches": lambda: few(batch_size=1, batch_sampler=[[0, 1, 2], [3], [4, 5, 6, 7, 8]]),
    "repeated batches": lambda: few(batch_size=1, batch_sampler=[[0, 1], [0, 1], [2, 3]]),
    "a subset": lambda: few(sampler=SubsetRandomSampler([1, 5, 7, 9], generator=torch.Generator())),
    "a list of loaders": lambda: [few(), DataLoader(Subset(samples(), range(8)), batch_size=4)],
    "a dict of loaders": lambda: {"a": few(), "b": few(Prefetched)},
    "loaders together": lambda: CombinedLoader([few(), DataLoader(samples(8), batch_size=4)], "min_size"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEADY)
def test_the_verdict_is_of_what_training_saw(kind, tmp_path):
    loader, seen = STEADY[kind](), Seen()
    detector, recorder, monitor = callbacks = observers(tmp_path)
    detector.stop_training = False
    module = Regression()
    fit(module, loader, [seen, *callbacks])
    assert (recorder.failure, monitor.failure) == (None, None)
    with torch.no_grad():
        pairs = [(module.training_step(batch, 0), size_of(batch)) for batch in seen.batches]
    expected = sum(float(loss) * size for loss, size in pairs) / sum(size for _, size in pairs)
    summary = detector.summary()
    enumerated = kind in ("batches of a batch sampler", "a subset")  # sample by sample
    undecided = "no certificate: there are flat directions" in summary["reason"]
    assert (undecided or summary["evidence"] == "certificate") == enumerated
    assert summary["loss"] == pytest.approx(expected, rel=1e-12)
    plain, again = Regression(), STEADY[kind]()
    fit(plain, again, [])
    for before, after in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(before, after)
    if kind == "own order":
        assert loader.sampler.asked == again.sampler.asked
        assert "one epoch as drawn by a Backwards" in summary["reason"]


def size_of(batch):
    """Samples of a batch as the callbacks count them: rows of its first tensor."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)


def test_weighted_draws_are_those_of_one_epoch_and_are_named(tmp_path):
    def loader():
        return few(sampler=WeightedRandomSampler([*[0.0] * 10, *[1.0] * 10], 40))

    module, detector = Regression(), LocalMinimumDetector(Schedule(every=1), stop_training=False)
    fit(module, loader(), [detector])
    summary = detector.summary()
    assert "one epoch as drawn by a WeightedRandomSampler" in summary["reason"]
    x, y = samples()[10:]  # the others are never drawn
    with torch.no_grad():
        losses = (module(x) - y).square().mean(1)
    assert losses.min() < summary["loss"] < losses.max()
    plain = Regression()
    fit(plain, loader(), [])
    assert all(map(torch.equal, plain.parameters(), module.parameters()))


class Shrinks(pl.Callback):
    """Writes weights at the end."""

    def on_train_end(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)


AVERAGES = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
    "own": Shrinks,
}


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("kind", AVERAGES)
def test_the_last_word_is_of_the_weights_that_the_module_ends_in(kind, place, tmp_path):
    callbacks = observers(tmp_path)
    callbacks[0].stop_training = False
    detector = callbacks[0]
    callbacks.insert(place, AVERAGES[kind]())
    module, seen = Regression(), []
    module.on_train_epoch_end = lambda: seen.append([p.detach().clone() for p in module.parameters()])
    fit(module, few(batch_size=5, sampler=RandomSampler(samples())), callbacks, max_epochs=4)
    assert not all(map(torch.equal, seen[-1], module.parameters()))
    x, y = samples()[:]
    with torch.no_grad():
        expected = float(F.mse_loss(module(x), y))
    assert detector.summary()["loss"] == pytest.approx(expected, rel=1e-9)


def test_a_fit_without_a_step_keeps_what_was_found_and_copies_hold_it(tmp_path):
    callbacks = observers(tmp_path)
    module, loader = project("UNet")
    trainer = fit(module, loader, callbacks)
    found = [callback.summary() for callback in callbacks]
    assert all(found)
    trainer.fit(module, loader)
    assert [callback.summary() for callback in callbacks] == found
    copies = pickle.loads(pickle.dumps(callbacks))  # noqa: S301 (as ddp_spawn copies them)
    assert [callback.summary() for callback in copies] == found


def summaries_of_children(path):
    found = []
    for strategy in ("ddp_fork", "auto"):
        callbacks = observers(None, strict=True)
        options = {"strategy": strategy, "devices": 2 if strategy != "auto" else 1}
        foreign_trainer(callbacks=callbacks, max_epochs=1, **options).fit(*foreign_model("mlp", batch_size=24))
        found.append([sorted(callback.summary()) for callback in callbacks])
    path.write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_what_children_found_comes_back(tmp_path):
    side_by_side(tmp_path, 1, summaries_of_children, tmp_path / "found.json")
    in_children, alone = json.loads((tmp_path / "found.json").read_text())
    assert in_children == alone
    assert all(in_children)


class Talkative(Regression):
    """Tells trackers, the console and a hook of each step."""

    def __init__(self, folder):
        super().__init__()
        self.run = wandb.init(mode="offline", dir=folder)
        self.writer = SummaryWriter(folder / "board")
        self.gradients = []
        self.net[0].weight.register_hook(lambda gradient: self.gradients.append(gradient) or 0.5 * gradient)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        number = loss.item()
        wandb.log({"loss": number})
        self.run.log({"again": number})
        self.writer.add_scalar("loss", number, self.global_step)
        print("loss", number)
        return loss


def test_passes_tell_nobody(tmp_path, capsys):
    found = []
    for name, callbacks in (("plain", []), ("watched", observers(tmp_path))):
        (tmp_path / name).mkdir()
        module = Talkative(tmp_path / name)
        for callback in callbacks:
            callback.stop_training = False
        fit(module, few(), callbacks)
        module.writer.close()
        (events,) = (tmp_path / name / "board").iterdir()
        rows = sum(1 for event in LegacyEventFileLoader(str(events)).Load() if event.summary.value)
        found.append((module.run.step, rows, capsys.readouterr().out.count("loss"), len(module.gradients)))
        module.run.finish()
    assert found[0] == found[1] == (20, 10, 10, 10)
    x, y = samples()[:]
    without_hooks = Regression()
    without_hooks.load_state_dict(module.state_dict())
    gradients = torch.autograd.grad(F.mse_loss(without_hooks(x), y), list(without_hooks.parameters()))
    expected = float(sum(gradient.square().sum() for gradient in gradients)) ** 0.5
    assert callbacks[0].summary()["gradient_norm"] == pytest.approx(expected, rel=1e-9)


class Failing(LocalMinimumDetector):
    def act(self, trainer, pl_module):
        if trainer.global_step:
            raise RuntimeError("out of luck")
        super().act(trainer, pl_module)


def test_an_error_in_the_midst_ends_the_callback_and_not_the_training():
    detector = Failing(Schedule(every=1))
    with pytest.warns(UserWarning, match=r"Failing stops here, and training goes on: .* RuntimeError: out of luck"):
        trainer = fit(Regression(), few(), [detector], max_epochs=3)
    assert trainer.current_epoch == 3
    assert detector.summary() == {
        "evidence": "none", "kind": "undecided", "reason_code": "error", "reason": "RuntimeError: out of luck",
        "advice": "use strict=True, to see where the error arises",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Regression(), few(), [Failing(Schedule(every=1), strict=True)], max_epochs=3)
