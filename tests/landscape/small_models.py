"""Small models of other people's kinds, float64, with data and a loss: what the tests of second order share."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_mnn.landscape import KinkTrace, LossSurface


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 3), reentrant

    def forward(self, x):
        return self.last(checkpoint(lambda h: self.first(h).relu().square(), x, use_reentrant=self.reentrant))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)),
    "cnn": (convolutional, (1, 6, 6)),
    "gru": (Recurrent, (5, 3)),
    "transformer": (Attention, (5, 4)),
    "checkpointed": (lambda: Checkpointed(reentrant=False), (4,)),
}


def build(name, *, num_samples=12, dtype=torch.float64, seed=0):
    """A model in eval mode, inputs and labels."""
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make().to(dtype)
    inputs = torch.randn(num_samples, *shape, dtype=dtype)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return model.eval(), inputs, torch.randint(3, (num_samples,))


def batches(size, count):
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def cross_entropy_surface(model, inputs, labels, *, batch_size=5, process_group=None, total=None, parameters=None):
    """The mean cross-entropy over the inputs (of ``total`` samples), in batches."""
    total = total or len(inputs)

    def part(rows):
        return len(labels[rows]) / total, lambda: functional.cross_entropy(model(inputs[rows]), labels[rows])

    return LossSurface(
        list(model.parameters()) if parameters is None else parameters,
        lambda: (part(rows) for rows in batches(batch_size, len(inputs))),
        process_group,
    )


def kink_passes(model, inputs, *, batch_size=5):
    """Forward passes for ``kink_distance``."""

    def one(rows):
        def run(on_kink):
            with KinkTrace(model, on_kink):
                model(inputs[rows])

        return run

    return [one(rows) for rows in batches(batch_size, len(inputs))]
