"""What the callbacks take for a module's network."""

import itertools
import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import AngularVolumeMonitor, LocalMinimumDetector
from lightning_mnn.callbacks.evaluation.module_network import network_of
from lightning_mnn.callbacks.evaluation.training_set import (
    input_rank,
    patterns_of_training_set,
    training_set_statistics,
)
from lightning_mnn.utilities.errors import DivergenceError


class Regressor(pl.LightningModule):
    """Any module around one nn.Sequential."""

    def __init__(self, *parts):
        super().__init__()
        self.net = nn.Sequential(*parts).double()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class AtEnd(pl.Callback):
    """Calls a function at the end of training, where the loaders still are."""

    def __init__(self, act):
        self.act = act

    def on_train_end(self, trainer, pl_module):
        self.act(trainer, pl_module)


def data(num_samples=30):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 5, dtype=torch.float64, generator=rng)
    return x, torch.randint(0, 2, (num_samples,), generator=rng).double()


def fit(make_trainer, module, act, x=None, epochs=3):
    x, y = data() if x is None else (x, data(len(x))[1])
    trainer = make_trainer(max_epochs=epochs, callbacks=[AtEnd(act)])
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=10))


@pytest.mark.parametrize(
    ("kink", "slope"), [(nn.ReLU, 0.0), (lambda: nn.LeakyReLU(0.3), 0.3), (lambda: nn.PReLU(init=-0.5), -0.5)]
)
@pytest.mark.parametrize("biases", list(itertools.product([False, True], repeat=2)))
def test_a_sequential_is_surveyed_with_its_biases(make_trainer, kink, slope, biases):
    torch.manual_seed(0)
    module = Regressor(nn.Linear(5, 4, bias=biases[0]), kink(), nn.Linear(4, 1, bias=biases[1]))
    network = network_of(module)
    assert network.negative_slope == slope
    assert (network.hidden_bias is not None, network.output_bias is not None) == biases
    x, y = data()

    def check(trainer, pl_module):
        found = training_set_statistics(trainer, pl_module)
        prediction = module.net(x)[:, 0].detach()
        torch.testing.assert_close(found.mse, (y - prediction).square().mean())
        assert int(found.wrong) == int(((prediction - 0.5) * (y - 0.5) <= 1e-12).sum())
        hidden = module.net[0](x) > 0
        (pattern,) = patterns_of_training_set(trainer, pl_module)
        assert torch.equal(pattern.unpack().active, hidden)
        with torch.no_grad():
            for tensor in module.parameters():
                tensor.add_(1.0)  # patterns of the new weights, without a survey of them
        (pattern,) = patterns_of_training_set(trainer, pl_module)
        assert torch.equal(pattern.unpack().active, module.net[0](x) > 0)

    fit(make_trainer, module, check)


def test_the_network_is_a_view_of_the_parameters():
    module = Regressor(nn.Flatten(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    for tensor in network_of(module).tensors:
        assert not tensor.requires_grad
        tensor.copy_(torch.full_like(tensor, 7.0))
    assert all(bool((p == 7.0).all()) for p in module.parameters())


def test_deep_networks_without_biases_and_no_others():
    def deep(*, bias):
        return Regressor(
            nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=bias), nn.ReLU(), nn.Linear(3, 1, bias=False)
        )

    assert network_of(deep(bias=False)).hidden_dims == (4, 3)
    assert network_of(deep(bias=True)) is None


@pytest.mark.parametrize(
    "parts",
    [
        (nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 1)),  # a slope a unit
        (nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)),
        (nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
        (nn.Linear(5, 4), nn.ReLU()),
        (nn.Linear(5, 4), nn.ReLU(), nn.ReLU()),
        (nn.Linear(5, 1),),
    ],
)
def test_other_sequentials_are_not_judged(parts):
    assert network_of(Regressor(*parts)) is None


def test_rank_of_the_inputs_counts_the_ones(make_trainer):
    x = data()[0]
    x = x - x.mean(0)
    x[:, 4] = x[:, 3]

    def rank(expected):
        return lambda trainer, module: ranks.append((int(input_rank(trainer, module, network_of(module))), expected))

    ranks = []
    for bias, expected in ((False, 4), (True, 5)):
        fit(
            make_trainer, Regressor(nn.Linear(5, 4, bias=bias), nn.ReLU(), nn.Linear(4, 1)), rank(expected), x, epochs=1
        )
    assert len(ranks) == 2
    assert all(found == expected for found, expected in ranks)


def test_rank_of_many_inputs_is_bounded_alone(make_trainer, monkeypatch):
    monkeypatch.setattr("lightning_mnn.callbacks.evaluation.training_set._MAX_MULTIPLICATIONS", (30 + 5) * 5**2 - 1)
    x = data()[0]
    x[:, 4] = x[:, 3]
    ranks = []

    def rank(trainer, module):
        ranks.append(int(input_rank(trainer, module, network_of(module))))

    fit(make_trainer, Regressor(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)), rank, x, epochs=1)
    assert ranks == [5]


@pytest.mark.parametrize("name", ["net.0.bias", "net.2.bias", "net.1.weight"])
def test_a_change_of_a_bias_or_slope_is_noticed(make_trainer, name):
    module = Regressor(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 1))
    errors = []

    @torch.no_grad()
    def check(trainer, pl_module):
        parameter = dict(module.named_parameters())[name]
        for value in (0.1, 0.2):
            parameter.fill_(value)
            errors.append(float(training_set_statistics(trainer, pl_module).mse))
            assert errors[-1] == pytest.approx(float((module.net(data()[0])[:, 0] - data()[1]).square().mean()))
        parameter.fill_(math.nan)
        with pytest.raises(DivergenceError, match="not finite"):
            training_set_statistics(trainer, pl_module)

    fit(make_trainer, module, check, epochs=1)
    assert errors[0] != errors[1]


def test_callbacks_run_on_a_biased_network(make_trainer):
    torch.manual_seed(0)
    x, y = data()
    callbacks = [LocalMinimumDetector(), AngularVolumeMonitor()]
    module = Regressor(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    make_trainer(max_epochs=2, callbacks=callbacks).fit(module, DataLoader(TensorDataset(x, y), batch_size=10))
    out = module.net(x)[:, 0].detach()
    assert callbacks[0].summary()["mse"] == pytest.approx(float((out - y).square().mean()))
    assert callbacks[1].summary()["log_volume_lower_bound"] < 0


def test_mnn_has_no_biases():
    network = network_of(MNN(5, (4,)))
    assert network.hidden_bias is None
    assert network.output_bias is None
    assert network.rows is network.hidden_weights[0]
