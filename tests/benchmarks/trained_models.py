"""Networks trained with full-batch Adam, many at once, for the campaign of certificates.

Shapes: R runs, N samples.
"""

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def gaussian(widths, n, random, runs):
    """Inputs and targets, (R, N, …)."""
    x, y = (torch.randn(runs, n, size, generator=random, dtype=torch.float64) for size in (widths[0], widths[-1]))
    return x, y


def digits(folder, n, pixels, runs):
    """MNIST digits averaged to pixels × pixels, of mean 0 and variance 1, and their labels, (R, N, …)."""
    raw = Path(folder) / "MNIST" / "raw"
    images = np.frombuffer(gzip.decompress((raw / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((raw / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    x = torch.from_numpy(images[: runs * n * 784].reshape(runs * n, 1, 28, 28).astype(np.float64))
    x = functional.adaptive_avg_pool2d(x, pixels)
    x = (x - x.mean()) / x.std()
    return x.reshape(runs, n, 1, pixels, pixels), torch.from_numpy(labels[: runs * n].astype(np.int64)).reshape(runs, n)


def train_runs(widths, n, decay, *, data=None, runs=24, steps=20_000, first_rate=1e-2, last_rate=1e-9, seed=0):
    """R networks, each with its data: a list of (module, inputs, targets).

    The objective is the squared error, summed over outputs and averaged over samples, or the cross-entropy of labels,
    plus ½ wd ‖θ‖². The rate falls geometrically after a quarter of the steps.

    Args:
        widths: d0, d1, …, K.
        n: N.
        decay: wd.
        data: inputs (R, N, d0) and targets, Gaussian by default.
        runs: R.
        steps: number of steps.
        first_rate: the rate at first.
        last_rate: the rate at the end.
        seed: of the data and the initial weights.
    """
    random = torch.Generator().manual_seed(seed)
    x, y = gaussian(widths, n, random, runs) if data is None else data
    classes = None if y.is_floating_point() else functional.one_hot(y, widths[-1]).double()
    parameters = []
    for a, b in pairwise(widths):
        shapes = ((runs, b, a), (runs, 1, b))
        draws = [torch.rand(shape, generator=random, dtype=torch.float64) for shape in shapes]
        parameters += [(2 * draw - 1) / a**0.5 for draw in draws]
    layers = len(widths) - 1
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(steps):
        fraction = max(0.0, (step / steps - 0.25) / 0.75)
        rate = first_rate * (last_rate / first_rate) ** fraction
        hs, zs = [x], []
        for layer in range(layers):
            z = hs[-1] @ parameters[2 * layer].mT + parameters[2 * layer + 1]
            zs.append(z)
            hs.append(z.relu() if layer < layers - 1 else z)
        back = (2 * (hs[-1] - y) if classes is None else hs[-1].softmax(2) - classes) / n
        for layer in reversed(range(layers)):
            gradients = (back.mT @ hs[layer], back.sum(1, keepdim=True))
            if layer:
                back = (back @ parameters[2 * layer]) * (zs[layer - 1] > 0)
            for place, of_loss in zip((2 * layer, 2 * layer + 1), gradients, strict=True):
                g = of_loss + decay * parameters[place]
                means[place].lerp_(g, 0.1)
                squares[place].lerp_(g.square(), 0.001)
                size = (squares[place] / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-12)
                parameters[place].addcdiv_(means[place], size, value=-rate / (1 - 0.9 ** (step + 1)))
    return [(_module(widths, [p[run] for p in parameters]), x[run], y[run]) for run in range(runs)]


def _module(widths, parameters):
    layers = []
    for layer, (a, b) in enumerate(pairwise(widths)):
        linear = nn.Linear(a, b, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(parameters[2 * layer])
            linear.bias.copy_(parameters[2 * layer + 1][0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_module(module, x, y, decay, *, steps=4000, first_rate=1e-2, last_rate=1e-4):
    """Adam on the squared error of any module."""
    optimizer = torch.optim.Adam(module.parameters(), first_rate, foreach=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = first_rate * (last_rate / first_rate) ** (step / steps)
        optimizer.zero_grad()
        penalty = 0.5 * decay * sum(p.square().sum() for p in module.parameters())
        ((module(x) - y).square().sum(1).mean() + penalty).backward()
        optimizer.step()
    return module
