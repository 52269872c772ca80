"""The detector on kinks of modules that no certificate reads: planted minima, one wrong multiplier, a moved point."""

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.landscape import planted_kink_minimum, planted_model_kink_minimum


class Handwritten(pl.LightningModule):
    """Two layers as plain parameters, so that there is no ``nn.Sequential`` to read, and the squared error."""

    def __init__(self, planted, dtype):
        super().__init__()
        self.rows = nn.Parameter(planted.hidden_weights.to(dtype))
        self.outputs = nn.Parameter(planted.output_weights.to(dtype))

    def forward(self, x):
        hidden = x @ self.rows.T
        return hidden.relu_() @ self.outputs

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Around(pl.LightningModule):
    """A deep network in a list of layers, which no certificate reads, and the squared error."""

    def __init__(self, net):
        super().__init__()
        self.layers = nn.ModuleList(net)

    def training_step(self, batch, batch_idx):
        h, y = batch
        for layer in self.layers:
            h = layer(h)
        return (h - y).square().sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def summary(make_trainer, module, x, y, batch_size=15):
    detector = LocalMinimumDetector(Schedule(every=1), stop_training=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    make_trainer(max_epochs=2, callbacks=[detector]).fit(module, loader)
    return detector.summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("change", "kind", "code"),
    [
        ("none", "on_kink", "stationary_on_kinks"),
        ("violated", "not_stationary", "loss_falls_off_kink"),
        ("moved", "not_stationary", "loss_falls_along_kinks"),
    ],
)
def test_a_hand_written_module(make_trainer, change, kind, code, dtype):
    planted = planted_kink_minimum(40, 5, 4, violated=change == "violated")
    if change == "moved":
        planted = replace(planted, output_weights=1.01 * planted.output_weights)
    found = summary(make_trainer, Handwritten(planted, dtype), planted.inputs.to(dtype), planted.targets.to(dtype))
    assert (found["evidence"], found["kinks"]) == ("second_order", int(planted.kinks.sum()))
    assert (found["kind"], found["reason_code"]) == (kind, code)
    assert (
        f"{int(planted.kinks.sum())} active kinks, whose gradients have rank {int(planted.kinks.sum())}"
        in (found["reason"])
    )
    assert ("certify_model" in found["advice"]) == (change == "none")
    assert found["smallest_eigenvalue"] is None


@pytest.mark.parametrize(("violated", "code"), [(False, "stationary_on_kinks"), (True, "loss_falls_off_kink")])
def test_a_deep_network_that_is_no_sequential(make_trainer, violated, code):
    planted = planted_model_kink_minimum(60, (3, 4, 3, 1), kinks=3, violated=violated)
    found = summary(make_trainer, Around(planted.module), planted.inputs, planted.targets)
    assert (found["evidence"], found["kinks"]) == ("second_order", 3)
    assert found["reason_code"] == code
