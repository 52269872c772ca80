import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn import MNN
from lightning_mnn.data import GaussianData
from lightning_mnn.model.gradients import SquaredErrorGradient


def autograd(model, inputs, targets):
    loss = (model(inputs) - targets).square().mean(-1).sum()
    return torch.autograd.grad(loss, list(model.parameters()))


@given(
    dims=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    slope=st.sampled_from([0.0, 0.3, -1.0, 2.0]),
    replicas=st.integers(1, 3),
    shared=st.booleans(),
    samples=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_the_gradient_is_that_of_autograd(dims, slope, replicas, shared, samples, seed):
    model = MNN(4, dims, negative_slope=slope, replicas=replicas, seed=seed)
    gradient = SquaredErrorGradient(list(model.hidden_weights), model.output_weights, slope)
    draw = torch.Generator().manual_seed(seed)
    for n in samples:  # one after the other, of which some share their memory
        lead = () if shared or replicas == 1 else (replicas,)
        inputs = torch.randn(*lead, n, 4, generator=draw, dtype=torch.float64)
        targets = torch.randn(*lead, n, generator=draw, dtype=torch.float64)
        inputs[..., 0, :] = 0  # a sample on every kink
        predictions, residual = gradient(inputs, targets)
        torch.testing.assert_close(predictions, model(inputs).detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(residual, model(inputs).detach() - targets, rtol=1e-13, atol=1e-13)
        for weights, expected in zip(model.parameters(), autograd(model, inputs, targets), strict=True):
            torch.testing.assert_close(weights.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_inputs_stored_in_a_shorter_dtype_are_those_numbers(storage):
    model = MNN(5, (7,), dtype="float32")
    gradient = SquaredErrorGradient(list(model.hidden_weights), model.output_weights, 0.0)
    inputs = torch.randn(11, 5).to(storage)
    targets = torch.ones(11)
    gradient(inputs, targets)
    for weights, expected in zip(model.parameters(), autograd(model, inputs.float(), targets), strict=True):
        torch.testing.assert_close(weights.grad, expected)


def test_replicas_end_where_single_runs_end(make_trainer):
    """To convergence, 700 steps: what rounding puts between them does not grow."""
    options = {"optimizer": {"name": "adam", "lr": 1e-2, "fused": True}, "schedule": {"name": "exponential_tail"}}

    def trained(seed, replicas):
        model = MNN(10, (10,), replicas=replicas, seed=seed, default_callbacks=False, **options)
        make_trainer(max_epochs=700).fit(model, GaussianData(20, 10, replicas=replicas, seed=seed, dtype="float64"))
        assert not model.automatic_optimization
        return model

    together = trained(3, 2)
    for replica in range(2):
        alone = trained(3 + replica, 1)
        for several, one in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(several[replica], one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch_size", [None, 16])
def test_the_same_seed_ends_in_the_same_bits(make_trainer, batch_size):
    ends = []
    for _ in range(2):
        model = MNN(10, (10, 7), replicas=2, seed=3, default_callbacks=False)
        data = GaussianData(50, 10, replicas=2, seed=3, batch_size=batch_size, dtype="float64")
        make_trainer(max_epochs=60).fit(model, data)
        assert not model.automatic_optimization
        ends.append([weights.detach().clone() for weights in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
