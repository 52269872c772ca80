"""Networks trained with full-batch Adam, many at once, for the campaign of certificates.

Shapes: R runs, N samples.
"""

import torch
from torch import nn


def train_runs(widths, n, decay, *, runs=24, steps=20_000, first_rate=1e-2, last_rate=1e-9, seed=0):
    """R networks on Gaussian inputs and targets, each with its data: a list of (module, inputs, targets).

    The objective is the squared error, summed over outputs and averaged over samples, plus ½ wd ‖θ‖². The rate falls
    geometrically after a quarter of the steps.
    """
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(runs, n, widths[0], generator=random, dtype=torch.float64)
    y = torch.randn(runs, n, widths[-1], generator=random, dtype=torch.float64)
    parameters = []
    for a, b in zip(widths, widths[1:], strict=False):
        for shape in ((runs, b, a), (runs, 1, b)):
            parameters.append((2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1) / a**0.5)
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
        back = 2 * (hs[-1] - y) / n
        for layer in reversed(range(layers)):
            gradients = (back.mT @ hs[layer], back.sum(1, keepdim=True))
            if layer:
                back = (back @ parameters[2 * layer]) * (zs[layer - 1] > 0)
            for place, g in zip((2 * layer, 2 * layer + 1), gradients, strict=True):
                g = g + decay * parameters[place]
                means[place].lerp_(g, 0.1)
                squares[place].lerp_(g.square(), 0.001)
                size = (squares[place] / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-12)
                parameters[place].addcdiv_(means[place], size, value=-rate / (1 - 0.9 ** (step + 1)))
    return [(_module(widths, [p[run] for p in parameters]), x[run], y[run]) for run in range(runs)]


def _module(widths, parameters):
    layers = []
    for layer, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        linear = nn.Linear(a, b, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(parameters[2 * layer])
            linear.bias.copy_(parameters[2 * layer + 1][0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
