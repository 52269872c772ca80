"""Two processes that share the samples find what one finds (run by test_loss_surface)."""

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from lightning_mnn.landscape import (
    DistributedGroup,
    LossSurface,
    NoDerivativeError,
    kink_distance,
    planted_minimum,
    second_order_verdict,
)
from tests.landscape.small_models import build, cross_entropy_surface, kink_passes


def work(store):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, inputs, labels = build("cnn")
    inputs[:, :, :2] = 0  # ties
    parameters = list(model.parameters())
    own = slice(0, 4) if rank == 0 else slice(4, 12)
    process_group = DistributedGroup(own.stop - own.start)
    shared = cross_entropy_surface(model, inputs[own], labels[own], process_group=process_group, total=12)
    alone = cross_entropy_surface(model, inputs, labels)
    (value, gradient), (exact_value, exact_gradient) = shared.value_and_gradient(), alone.value_and_gradient()
    assert abs(value - exact_value) <= 1e-14
    assert torch.allclose(gradient, exact_gradient, rtol=0, atol=1e-14)
    vector = torch.randn(shared.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(shared.product(vector), alone.product(vector), rtol=0, atol=1e-13)
    kinks = kink_distance(kink_passes(model, inputs[own]), parameters, process_group)
    exact_kinks = kink_distance(kink_passes(model, inputs), parameters)
    assert same(kinks, exact_kinks)
    assert kinks.ties > 0
    verdict = second_order_verdict(shared, kinks, 1e6)
    exact_verdict = second_order_verdict(alone, exact_kinks, 1e6)
    assert verdict.kind == exact_verdict.kind == "undecided"  # far from stationary: the gradient can explain it
    # One of them may have taken a product more: of both the eigenvalue lies in [smallest − error, smallest].
    error = max(verdict.eigenvalue_error, exact_verdict.eigenvalue_error)
    assert abs(verdict.smallest_eigenvalue - exact_verdict.smallest_eigenvalue) <= error
    everything = kink_distance([] if rank else kink_passes(model, inputs), parameters, process_group)
    assert same(everything, exact_kinks)

    flat_minimum(rank)

    detached = LossSurface(parameters, lambda: [(1.0, lambda: model(inputs).sum())] if rank else [], process_group)
    detached.value_and_gradient()  # one process holds nothing

    def failing():
        loss = model(inputs).sum()
        if rank:
            loss.register_hook(_fail)
        return loss

    try:
        LossSurface(parameters, lambda: [(1.0, failing)], process_group).value_and_gradient()
    except NoDerivativeError as error:
        assert "no gradient here" in str(error)  # noqa: PT017 (of the other process, on rank 0)
        print("same")
    dist.destroy_process_group()


def flat_minimum(rank):
    """A planted minimum, of which the processes hold unequal parts: all take the same steps to the same verdict."""
    planted = planted_minimum(40, 4, 3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 1, bias=False))
    model = model.double()
    with torch.no_grad():
        model[0].weight.copy_(planted.hidden_weights)
        model[2].weight.copy_(planted.output_weights[None])
    own = slice(0, 15) if rank == 0 else slice(15, 40)
    inputs, targets = planted.inputs[own], planted.targets[own]

    def part():
        return (model(inputs)[:, 0] - targets).square().mean()

    process_group = DistributedGroup(own.stop - own.start)
    surface = LossSurface(list(model.parameters()), lambda: [(len(targets) / 40, part)], process_group)
    kinks = kink_distance(kink_passes(model, inputs), list(model.parameters()), process_group)
    found = second_order_verdict(surface, kinks, 1.0)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, found)
    assert everywhere[0] == everywhere[1]
    assert (found.kind, found.flat) == ("differentiable_minimum", "constant")


def same(found, exact):
    """Whether the counts are equal, and the distances but for what other batches round otherwise."""
    close = abs(found.nearest - exact.nearest) <= 1e-14 and abs(found.relative - exact.relative) <= 1e-14
    return close and replace(found, nearest=0, relative=0) == replace(exact, nearest=0, relative=0)


def _fail(_gradient):
    raise RuntimeError("no gradient here")
