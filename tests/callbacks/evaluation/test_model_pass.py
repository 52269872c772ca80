"""Batches, forward passes and losses of any module."""

import random
from collections import namedtuple

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, WeightedRandomSampler

from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.run_module import (
    LossNotEvaluableError,
    StepFailedError,
    batch_size,
    forward_on,
    loss_on,
    model_batches,
    precision_context,
)
from lightning_mnn.data.loaders.shards import exact_shard, num_samples
from lightning_mnn.utilities.errors import DivergenceError


class Module(pl.LightningModule):
    """Sums what its forward takes; the loss is that of its training step."""

    def __init__(self, *, manual=False):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.automatic_optimization = not manual
        self.calls = []

    def training_step(self, batch, batch_idx):
        self.calls.append(batch_idx)
        return {"loss": self.layer(batch["x"] if isinstance(batch, dict) else batch[0]).mean(), "more": 1}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OneArgument(Module):
    def forward(self, x, scale=2.0):
        return scale * x


class TwoArguments(Module):
    def forward(self, x, lengths, *, flag=False):
        return x + lengths


class AnyArguments(Module):
    def forward(self, *args):
        return args


class NameOnly(Module):
    def forward(self, x, *, lengths):
        return x


X, Y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
Pair = namedtuple("Pair", "x y")  # noqa: PYI024


@pytest.mark.parametrize("batch", [[X, Y], (X, Y), Pair(X, Y)])
def test_forward_takes_the_leading_parts_that_it_needs(batch):
    assert torch.equal(forward_on(OneArgument(), batch), 2 * X)
    assert torch.equal(forward_on(TwoArguments(), batch), X + Y)
    assert torch.equal(forward_on(AnyArguments(), batch)[0], X)
    assert torch.equal(forward_on(OneArgument(), X), 2 * X)
    given = forward_on(OneArgument(), batch, lambda module, got: (module.layer, got))
    assert given[1] is batch


@pytest.mark.parametrize(
    ("kind", "batch"), [(Module, [X, Y]), (OneArgument, {"x": X}), (TwoArguments, [X]), (NameOnly, [X, Y])]
)
def test_else_the_training_step_runs(kind, batch):
    module = kind()
    assert forward_on(module, batch)["loss"] == module.layer(X).mean()
    assert module.calls == [0]
    manual = kind(manual=True)
    with pytest.raises(LossNotEvaluableError, match=f"{kind.__name__} optimises manually.*forward_fn"):
        forward_on(manual, batch)


def test_a_wrong_guess_is_explained():
    class Wrong(Module):
        def forward(self, x):
            return x["image"]

    with pytest.raises(IndexError) as caught:
        forward_on(Wrong(), [X, Y])
    assert "Wrong.forward was called with the first 1 part(s) of a batch" in caught.value.__notes__[0]


def test_losses():
    module = Module()
    assert loss_on(module, [X, Y], 7) == module.layer(X).mean()
    assert module.calls == [7]
    assert loss_on(module, [X, Y], loss_fn=lambda _, batch: batch[0].sum()) == X.sum()
    assert loss_on(Module(manual=True), [X], loss_fn=lambda _, batch: batch[0].sum(0)[:1]) == X[:, 0].sum()
    with pytest.raises(LossNotEvaluableError, match=r"optimises manually.*loss_fn"):
        loss_on(Module(manual=True), [X, Y])
    with pytest.raises(TypeError, match=r"mean over the batch, got a tensor of shape \(2, 3\)"):
        loss_on(module, [X, Y], loss_fn=lambda _, batch: batch[0])


@pytest.mark.parametrize(
    ("result", "told"), [(None, "None"), ({"x": 1}, r"keys \['x'\]"), (X, r"shape \(2, 3\)"), (0.5, "a float")]
)
def test_a_step_without_a_loss_is_named(result, told):
    class Silent(Module):
        def training_step(self, batch):  # without an index
            return result

    with pytest.raises(LossNotEvaluableError, match=f"Silent.training_step returned no loss but .*{told}"):
        loss_on(Silent(), X)


def test_sizes_of_batches():
    assert batch_size([{"a": (torch.tensor(1.0), X)}, torch.zeros(9)]) == 2
    assert batch_size(Pair("text", [X.T])) == 3
    with pytest.raises(TypeError, match="no tensor with a sample axis in a dict"):
        batch_size({"a": "text", "b": torch.tensor(1)})


class AtEnd(pl.Callback):
    def __init__(self, act):
        self.act = act

    def on_train_end(self, trainer, pl_module):
        self.act(trainer, pl_module)


class Transferred(Module):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2 + torch.rand(1), batch[1]]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_batches_come_as_in_training(make_trainer, precision):
    x = torch.arange(21).reshape(7, 3).float()

    def act(trainer, module):
        found = []
        for _ in range(2):
            with isolated(trainer, module):
                found.append([batch[0] for batch in model_batches(trainer, module)])
            torch.rand(1)
        first, again = (torch.cat(part) for part in found)
        assert torch.equal(first, again)
        assert [len(part) for part in found[0]] == [4, 3]
        assert first.dtype is (torch.float64 if precision == "64-true" else torch.float32)
        assert ((first - (x + 1) * 2) < 1).all()
        with isolated(trainer, module):
            (few,) = model_batches(trainer, module, torch.tensor([2, 5]))
        assert torch.equal(few[0].floor(), (x[[2, 5]].to(few[0].dtype) + 1) * 2)
        for autocast, expected in ((True, torch.bfloat16), (False, torch.float32)):
            with precision_context(trainer, autocast=autocast):
                usual = {"64-true": torch.float64, "32-true": torch.float32}.get(precision, expected)
                assert module.layer(first.to(module.layer.weight.dtype)).dtype is usual
                assert torch.zeros(1).dtype is (torch.float64 if precision == "64-true" else torch.float32)
        seen.append(precision)

    seen = []
    trainer = make_trainer(max_epochs=1, callbacks=[AtEnd(act)], precision=precision)
    trainer.fit(Transferred(), DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True))
    assert seen


class Noted(Dataset):
    """Samples that tell of their worker, with noise."""

    note = -1

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index, self.note, random.random()  # noqa: S311


def note_worker(worker):
    torch.utils.data.get_worker_info().dataset.dataset.note = 100 + worker


def collate(rows):
    return torch.tensor([index for index, *_ in rows]), [note for _, note, _ in rows], [z for *_, z in rows]


def test_a_pass_keeps_the_loaders_options(monkeypatch):
    loader = DataLoader(
        Noted(), 2, num_workers=2, worker_init_fn=note_worker, collate_fn=collate, multiprocessing_context="fork"
    )
    passes = [list(exact_shard(loader)) for _ in range(2)]
    assert [indices.tolist() for indices, *_ in passes[0]] == [[0, 1], [2, 3], [4]]
    assert [notes for _, notes, _ in passes[0]] == [[100, 100], [101, 101], [100]]
    assert [noise for *_, noise in passes[0]] == [noise for *_, noise in passes[1]]
    assert list(exact_shard(loader, 0, 6)) == []  # more processes than samples


def test_samplers_that_choose_are_named():
    dataset = TensorDataset(X)
    weighted = WeightedRandomSampler([1.0, 2.0], 2)
    wrapped = DistributedSampler(weighted, 2, 0)  # what Lightning makes of it for several processes
    for sampler in (weighted, wrapped):
        with pytest.raises(TypeError, match=r"chooses cannot be known: wrap the chosen samples in a .*Subset"):
            num_samples(DataLoader(dataset, sampler=sampler))
    assert num_samples(DataLoader(dataset, sampler=DistributedSampler(dataset, 2, 0))) == 2


def test_a_step_gets_its_index_as_lightning_gives_it():
    class Any(Module):
        def training_step(self, *args):
            return self.layer(args[0]).mean() * args[1]

    class Named(Module):
        def training_step(self, batch, *, batch_idx):
            return self.layer(batch).mean() * batch_idx

    class Options(Module):
        def training_step(self, batch, **options):
            assert not options
            return self.layer(batch).mean()

    for kind, factor in ((Any, 3), (Named, 3), (Options, 1)):
        module = kind()
        assert loss_on(module, X, 3) == module.layer(X).mean() * factor


def test_a_step_that_fails_is_told_and_serious_errors_are_not_taken_for_that():
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            raise batch

    with pytest.raises(StepFailedError, match=r"Failing.training_step .* failed: KeyError: 'x'. Give .* loss_fn"):
        loss_on(Failing(), KeyError("x"))
    for error in (DivergenceError("x"), torch.OutOfMemoryError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            loss_on(Failing(), error)
