import pytest
import torch

from lightning_mnn.landscape import Architecture
from lightning_mnn.model import zero_error
from lightning_mnn.model.zero_error import train_to_zero_error
from lightning_mnn.utilities.seeding import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(num_samples=12, dim=3):
    inputs = normal(num_samples, dim)
    return inputs, (inputs @ normal(dim, seed=1)).sign()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_full_batch_training_is_that_of_each_network_alone(optimizer):
    network, (inputs, labels) = Architecture(3, (4, 3), bias=True), samples()
    options = {"optimizer": optimizer, "lr": 0.05, "max_steps": 60, "seed": 3}
    found = train_to_zero_error(network, inputs, labels, replicas=5, **options)
    start = zero_error._initial_weights(network, 5, generator(3, "zero error"))
    for replica in range(5):
        theta = start[replica : replica + 1].clone().requires_grad_()
        stepper = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]([theta], lr=0.05)
        first = -1
        for step in range(61):
            margins = network.outputs(theta, inputs)[0] * labels
            if bool((margins > 0).all()):
                first = step
                break
            if step < 60:
                stepper.zero_grad()
                torch.log1p((-margins).exp()).mean().backward()
                stepper.step()
        assert int(found.steps[replica]) == first
        torch.testing.assert_close(found.weights[replica], theta.detach()[0], rtol=1e-6, atol=1e-6)


def test_networks_that_get_there_are_right_and_the_others_are_marked():
    network = Architecture(3, (6,))
    inputs, labels = samples()
    found = train_to_zero_error(network, inputs, labels, lr=0.5, batch_size=4, replicas=8, max_steps=2000)
    assert bool(found.reached.any())
    right = (network.outputs(found.weights, inputs) * labels > 0).all(1)
    assert right.tolist() == found.reached.tolist()
    impossible = torch.ones(2, 1, dtype=torch.float64)
    never = train_to_zero_error(Architecture(1, ()), impossible, torch.tensor([1.0, -1.0]), replicas=3, max_steps=20)
    assert never.steps.tolist() == [-1, -1, -1]


def test_batches_differ_between_networks_and_seeds_decide():
    network, (inputs, labels) = Architecture(3, (4,)), samples()
    options = {"batch_size": 1, "max_steps": 3, "replicas": 2, "lr": 0.3}
    one, other, third = (train_to_zero_error(network, inputs, labels, **options, seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(one.weights, other.weights)
    assert bool((one.weights != third.weights).any())


def test_bad_input_is_named():
    inputs, labels = samples()
    for match, change in {
        "optimizer must be one of sgd, adam": {"optimizer": "lbfgs"},
        "lr must be a number, above 0": {"lr": 0.0},
        "batch_size must be at most 12": {"batch_size": 13},
        "replicas must be at least 1": {"replicas": 0},
        "max_steps must be at least 1": {"max_steps": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            train_to_zero_error(Architecture(3, (2,)), inputs, labels, **change)
