"""Points of known kinds for second-order evidence: families of non-minima, and of minima.

Each function yields pairs of a surface and the norm of a gradient to compare with; where there are kinks, and a smooth
model would be judged otherwise, their distances as a third.
"""

import math
from itertools import pairwise, product

import torch
from torch import nn
from torch.nn import functional

from lightning_mnn.landscape import KinkTrace, LossSurface, kink_distance, planted_minimum

F64 = torch.float64


def rotated(theta, function, seed, extra=0):
    """A function of a few numbers, of random combinations of more; Σ z² of what is orthogonal to them is added."""
    random = torch.Generator().manual_seed(seed)
    n = len(theta) + extra
    basis = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=random))[0]
    start = basis.T @ torch.cat([theta, torch.zeros(extra, dtype=F64)])
    point = start.clone().requires_grad_()

    def loss():
        z = basis @ point
        return function(z[: len(theta)]) + z[len(theta) :].square().sum()

    return LossSurface([point], lambda: [(1.0, loss)])


def of(model, loss, parameters=None):
    return LossSurface(list(model.parameters()) if parameters is None else parameters, lambda: [(1.0, loss)])


def norm(surface):
    return float(surface.value_and_gradient()[1].norm())


def numbers(*values):
    return torch.tensor(values, dtype=F64)


# Not minima


TAILS = {
    "exp": lambda y: torch.exp(-y),
    "softplus": lambda y: functional.softplus(-y),
    "inverse": lambda y: 1 / y,
    "inverse square": lambda y: 1 / y**2,
    "slow exp": lambda y: torch.exp(-y / 5),
    "gauss": lambda y: torch.exp(-(y**2) / 8),
}


def exponential_tails():
    """x² + a tail in y + a constant, at many y, plain and rotated among other directions."""
    for name, y, offset, (extra, seed) in product(
        TAILS, (3.0, 6.0, 9.0, 12.0, 16.0, 25.0, 32.0, 36.0, 40.0, 50.0), (0.0, 1.0), ((0, 0), (6, 1))
    ):
        tail = TAILS[name]
        x = 0.0 if seed else 1e-6
        yield (
            rotated(numbers(x, y), lambda z, tail=tail, c=offset: c + z[0] ** 2 + tail(z[1]), seed, extra),
            1.0,
        )


SADDLES = {
    "quartic": (2, lambda z: z[0] ** 2 - z[1] ** 4),
    "cubic": (2, lambda z: z[0] ** 2 + z[1] ** 3),
    "quintic": (2, lambda z: z[0] ** 2 - z[1] ** 5),
    "sextic": (2, lambda z: z[0] ** 2 - z[1] ** 6),
    "peano": (2, lambda z: (z[0] - z[1] ** 2) * (z[0] - 3 * z[1] ** 2)),
    "bent": (2, lambda z: (z[0] - z[1] ** 2) ** 2 - z[1] ** 6),
    "monkey": (3, lambda z: z[0] ** 2 + z[1] ** 3 - 3 * z[1] * z[2] ** 2),
    "mixed quartic": (3, lambda z: z[0] ** 2 + z[1] ** 4 - z[2] ** 4),
    "product": (4, lambda z: z[0] ** 2 + z[1] * z[2] * z[3]),
}


def degenerate_saddles():
    """At the saddle, and a little beside it, plain and rotated, beside manifolds of other flat directions."""
    for name, offset, (extra, seed), size in product(SADDLES, (0.0, 1.0), ((0, 0), (5, 1), (20, 2)), (0.0, 1e-9, 1e-3)):
        count, function = SADDLES[name]
        start = size * torch.ones(count, dtype=F64)
        start[0] = start[0] ** 2
        yield rotated(start, lambda z, f=function, c=offset: c + f(z), seed, extra), 1.0
    for name, seed in product(SADDLES, range(3)):  # with a product of two numbers, which is flat along a hyperbola
        count, function = SADDLES[name]
        yield (
            rotated(
                torch.cat([torch.zeros(count, dtype=F64), numbers(2.0, 0.5)]),
                lambda z, f=function: 1 + f(z[:-2]) + (z[-2] * z[-1] - 1) ** 2,
                seed,
            ),
            1.0,
        )


def zero_networks():
    """Networks with zero weights, whose last bias fits the mean."""
    for depth, activation, loss, seed in product((2, 3), (nn.Tanh, nn.GELU, nn.SiLU), ("mse", "bce"), range(8)):
        torch.manual_seed(seed)
        widths = [3, *[4] * (depth - 1), 1]
        parts = [p for a, b in pairwise(widths) for p in (nn.Linear(a, b), activation())][:-1]
        model = nn.Sequential(*parts).double()
        x, y = torch.randn(12, 3, dtype=F64), (torch.rand(12, dtype=F64) > 0.4).double()
        y[:2] = numbers(0, 1)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            mean = y.mean()
            model[-1].bias.fill_(float(mean if loss == "mse" else (mean / (1 - mean)).log()))
        function = functional.mse_loss if loss == "mse" else functional.binary_cross_entropy_with_logits
        yield of(model, lambda m=model, x=x, y=y, f=function: f(m(x)[:, 0], y)), 1.0


def separable_heads():
    """Heads on frozen random ReLU features of separable data, and whole networks, after some training."""
    for kind, optimizer, steps, seed in product(
        ("bce", "softmax", "network"), ("adam", "sgd", "lbfgs"), (100, 1000), range(8)
    ):
        torch.manual_seed(seed)
        x = torch.randn(20, 5, dtype=F64)
        features = torch.relu(x @ torch.randn(5, 30, dtype=F64))
        classes = 3 if kind == "softmax" else 1
        y = torch.randint(0, 3, (20,)) if classes == 3 else (torch.rand(20) < 0.5).double()
        model = nn.Linear(30, classes).double()
        if kind == "network":
            model, features = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 1)).double(), x

        def loss(model=model, features=features, y=y, classes=classes):
            out = model(features)
            if classes == 3:
                return functional.cross_entropy(out, y)
            return functional.binary_cross_entropy_with_logits(out[:, 0], y)

        surface = of(model, loss)
        reference = norm(surface)
        train(model, loss, optimizer, steps)
        yield surface, reference


def train(model, loss, optimizer, steps):
    parameters = list(model.parameters())
    if optimizer == "lbfgs":
        chosen = torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe")
        steps //= 20
    else:
        make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        chosen = make(parameters, lr=0.1)

    def closure():
        chosen.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        chosen.step(closure)
    for parameter in parameters:
        parameter.grad = None


def plateaus():
    """Saturated functions beside a bowl, and saturated units of networks."""
    shapes = {
        "tanh": lambda y: 1 - torch.tanh(y),
        "sigmoid": lambda y: torch.sigmoid(-y),
        "erf": lambda y: torch.erfc(y / 2),
        "bump": lambda y: 1 - torch.exp(-((y - 1) ** 2)),
        "lorentz": lambda y: y**2 / (1 + y**2),
    }
    for name, y, offset, (extra, seed) in product(shapes, (4.0, 8.0, 15.0, 30.0), (0.0, 1.0), ((0, 0), (6, 1))):
        shape = shapes[name]
        yield rotated(numbers(0.0, y), lambda z, f=shape, c=offset: c + z[0] ** 2 + f(z[1]), seed, extra), 1.0
    for seed, size in product(range(12), (4.0, 10.0)):  # a unit that is saturated on all samples, wrongly
        torch.manual_seed(seed)
        x, y = torch.randn(15, 3, dtype=F64), torch.randn(15, dtype=F64)
        model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1)).double()

        def loss(model=model, x=x, y=y):
            penalty = (
                model[2].weight.square().sum() + model[0].weight[1:].square().sum() + model[0].bias[1:].square().sum()
            )
            return functional.mse_loss(model(x)[:, 0], y) + 0.01 * penalty

        with torch.no_grad():
            model[0].bias[0] = -size * 3
        to_stationary(list(model.parameters()), loss)
        surface = of(model, loss)
        yield surface, 1.0


NON_MINIMA = {
    "separable heads": separable_heads,
    "exponential tails": exponential_tails,
    "degenerate saddles": degenerate_saddles,
    "zero networks": zero_networks,
    "plateaus": plateaus,
}


# Minima


def to_stationary(parameters, loss, *, iterations=3000, newton=4):
    """L-BFGS, then damped steps of Newton's method with the dense Hessian, whose small eigenvalues are left out."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    for parameter in parameters:
        parameter.grad = None
    surface = LossSurface(parameters, lambda: [(1.0, loss)])
    for _ in range(newton):
        values, vectors = torch.linalg.eigh(surface.hessian.dense())
        value, gradient = surface.value_and_gradient()
        used = values > 1e-9 * values[-1]
        step = -(vectors[:, used] / values[used]) @ (vectors[:, used].T @ gradient)
        with surface.moved(step):
            better, after = surface.value_and_gradient()
        if not (better <= value + 1e-12 * abs(value) and after.norm() < gradient.norm()):
            return
        move(parameters, step)


@torch.no_grad()
def move(parameters, step):
    for parameter, piece in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
        parameter.add_(piece.view_as(parameter))


def is_minimum(surface, reference, *, flat=False):
    """By dense eigenvalues; ``flat``: of a loss of zero, whose Hessian need not be positive."""
    loss, gradient = surface.value_and_gradient()
    values = torch.linalg.eigvalsh(surface.hessian.dense())
    if flat:
        return loss < 1e-24
    return float(gradient.norm()) <= 1e-6 * reference and float(values[0]) > 1e-8 * float(values[-1])


def penalised_networks():
    """Two and three layers with a quadratic penalty, trained to the end; those that are minima by dense eigenvalues."""
    for activation, depth, size, seed in product(
        (nn.Tanh, nn.GELU, nn.Softplus, nn.ReLU), (2, 3), (1e-3, 1e-2), range(6)
    ):
        torch.manual_seed(seed)
        widths = [3, *[4] * (depth - 1), 1]
        parts = [p for a, b in pairwise(widths) for p in (nn.Linear(a, b), activation())][:-1]
        model = nn.Sequential(*parts).double()
        x, y = torch.randn(25, 3, dtype=F64), torch.randn(25, dtype=F64)

        def loss(model=model, x=x, y=y, size=size):
            penalty = sum(p.square().sum() for p in model.parameters())
            return functional.mse_loss(model(x)[:, 0], y) + size * penalty

        surface = of(model, loss)
        reference = norm(surface)
        to_stationary(list(model.parameters()), loss)
        if is_minimum(surface, reference):
            yield surface, reference


def penalised_heads():
    """Logistic and softmax regression with a penalty."""
    for classes, size, seed in product((1, 3), (1e-4, 1e-2), range(10)):
        torch.manual_seed(seed)
        features = torch.relu(torch.randn(25, 8, dtype=F64))
        y = torch.randint(0, 3, (25,)) if classes == 3 else (torch.rand(25) < 0.5).double()
        model = nn.Linear(8, classes).double()

        def loss(model=model, features=features, y=y, classes=classes, size=size):
            out = model(features)
            own = (
                functional.cross_entropy(out, y)
                if classes == 3
                else functional.binary_cross_entropy_with_logits(out[:, 0], y)
            )
            return own + size * sum(p.square().sum() for p in model.parameters())

        surface = of(model, loss)
        reference = norm(surface)
        to_stationary(list(model.parameters()), loss)
        yield surface, reference


def bowls():
    """Quadratic bowls of many conditions, at and next to their bottoms."""
    for n, condition, offset, (distance, seed) in product(
        (2, 10, 60), (1.0, 1e2, 1e4), (0.0, 1.0, -3.0), ((0.0, 0), (1e-9, 1), (1e-6, 2))
    ):
        random = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=random))[0]
        matrix = basis @ torch.diag(torch.logspace(-math.log10(condition), 0, n, dtype=F64)) @ basis.T
        centre = torch.randn(n, dtype=F64, generator=random)
        point = (centre + distance * torch.randn(n, dtype=F64, generator=random)).requires_grad_()

        def loss(point=point, matrix=matrix, centre=centre, offset=offset):
            return offset + 0.5 * (point - centre) @ matrix @ (point - centre)

        yield LossSurface([point], lambda loss=loss: [(1.0, loss)]), float((matrix @ centre).norm())


def planted():
    """Sub-optimal minima of two-layer ReLU networks."""
    for (num, dim, width), slope, seed in product(((60, 6, 5), (100, 10, 4), (40, 4, 8)), (0.0, 0.3), range(6)):
        found = planted_minimum(num, dim, width, slope, seed=seed)
        act = nn.LeakyReLU(slope) if slope else nn.ReLU()
        model = nn.Sequential(nn.Linear(dim, width, bias=False), act, nn.Linear(width, 1, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(found.hidden_weights)
            model[2].weight.copy_(found.output_weights[None])
        kinks = kink_distance([traced(model, found.inputs)], list(model.parameters()))
        yield of(model, lambda m=model, f=found: functional.mse_loss(m(f.inputs)[:, 0], f.targets)), 1.0, kinks


def traced(model, inputs):
    def run(on_kink):
        with KinkTrace(model, on_kink):
            model(inputs)

    return run


def interpolating():
    """More weights than samples, trained to zero error, almost or altogether."""
    for activation, width, depth, seed in product((nn.ReLU, nn.Tanh, nn.GELU), (12, 24), (2, 3), range(6)):
        torch.manual_seed(seed)
        widths = [4, *[width] * (depth - 1), 1]
        parts = [p for a, b in pairwise(widths) for p in (nn.Linear(a, b), activation())][:-1]
        model = nn.Sequential(*parts).double()
        x, y = torch.randn(12, 4, dtype=F64), torch.randn(12, dtype=F64)

        def loss(model=model, x=x, y=y):
            return functional.mse_loss(model(x)[:, 0], y)

        surface = of(model, loss)
        reference = norm(surface)
        to_stationary(list(model.parameters()), loss, iterations=4000, newton=0 if seed % 2 else 4)
        if float(loss().detach()) < 1e-12:
            yield surface, reference


MINIMA = {
    "penalised networks": penalised_networks,
    "penalised heads": penalised_heads,
    "bowls": bowls,
    "planted": planted,
    "interpolating": interpolating,
}
