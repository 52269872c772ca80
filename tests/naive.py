"""Slow, obvious references: loops over samples and units, and autograd."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from lightning_mnn.landscape import Network


@dataclass
class Problem:
    """A random network on random data."""

    network: Network
    inputs: torch.Tensor
    targets: torch.Tensor

    def replica(self, r):
        """The problem of one replica."""
        hidden = tuple(w[r] for w in self.network.hidden_weights)
        network = Network(hidden, self.network.output_weights[r], self.network.negative_slope)
        inputs = self.inputs[r] if self.inputs.ndim == 3 else self.inputs
        targets = self.targets[r] if self.targets.ndim == 2 else self.targets
        return Problem(network, inputs, targets)


@st.composite
def problems(draw, max_layers=2, replicas=(None, 1, 3)):
    """Problems of random shapes, slopes 0, 0.1 and −1, with and without replicas, with own or shared data."""
    size = st.integers(1, 7)
    num_samples, dims = draw(size), [draw(size) for _ in range(draw(st.integers(1, max_layers)) + 1)]
    count = draw(st.sampled_from(replicas))
    own_data = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = () if count is None else (count,)
    data_lead = lead if own_data else ()

    def normal(*shape):
        return torch.from_numpy(np.asarray(rng.standard_normal(shape)))

    hidden = tuple(normal(*lead, after, before) for before, after in itertools.pairwise(dims))
    network = Network(hidden, normal(*lead, dims[-1]), draw(st.sampled_from([0.0, 0.1, -1.0])))
    targets = torch.from_numpy(rng.integers(0, 2, (*data_lead, num_samples)).astype(np.float64))
    return Problem(network, normal(*data_lead, num_samples, dims[0]), targets)


def activate(u, slope):
    """f(u) of one number."""
    return u if u > 0 else slope * u


def forward(problem):
    """Pre-activations of each layer and outputs of an unreplicated problem, by loops."""
    layers, outputs = [[] for _ in problem.network.hidden_weights], []
    for x in problem.inputs.tolist():
        hidden = x
        for found, weights in zip(layers, problem.network.hidden_weights, strict=True):
            u = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in weights.tolist()]
            found.append(u)
            hidden = [activate(value, problem.network.negative_slope) for value in u]
        outputs.append(sum(z * h for z, h in zip(problem.network.output_weights.tolist(), hidden, strict=True)))
    return layers, outputs


def layer_inputs(problem):
    """Inputs of each layer, by loops."""
    layers, _ = forward(problem)
    slope = problem.network.negative_slope
    hidden = [[[activate(u, slope) for u in sample] for sample in layer] for layer in layers]
    return [problem.inputs.tolist(), *hidden[:-1]]


def last_correlation(problem):
    """G e of the last hidden layer by a double loop: rows Σ_n e_n A_ni h_n."""
    layers, outputs = forward(problem)
    inputs, slope = layer_inputs(problem)[-1], problem.network.negative_slope
    width = problem.network.hidden_dims[-1]
    found = np.zeros((width, len(inputs[0])))
    for n, (y, out) in enumerate(zip(problem.targets.tolist(), outputs, strict=True)):
        for i in range(width):
            a = 1.0 if layers[-1][n][i] > 0 else slope
            found[i] += (y - out) * a * np.array(inputs[n])
    return found


def gradients(problem):
    """Gradients of the MSE by the hidden weights, by autograd through torch's own layers."""
    slope = problem.network.negative_slope
    weights = [w.clone().requires_grad_() for w in problem.network.hidden_weights]
    hidden = problem.inputs
    for w in weights:
        hidden = torch.nn.functional.leaky_relu(hidden @ w.T, slope)
    mse = (hidden @ problem.network.output_weights - problem.targets).square().mean()
    return [g.numpy() for g in torch.autograd.grad(mse, weights)]
