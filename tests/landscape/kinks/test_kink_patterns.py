"""Which numbers of a kink call belong to which sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_mnn.landscape.kinks.layers import NoKinksError, PatternRows, find_layers
from lightning_mnn.landscape.kinks.tracing import KinkTrace


class Form(nn.Module):
    """A ReLU on what a function makes of (n, 3, 4); what goes into it is kept."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.relu, self.form = nn.Linear(4, 4), nn.ReLU(), form

    def forward(self, x):
        self.relu(self.form(self.linear(x)))
        return x


def rows_of(module, inputs, sizes):
    """The packed pattern of the layer "relu", filled by batches of these sizes."""
    found = find_layers(module, lambda n: module(inputs[:n]))
    rows = PatternRows(found.layers, len(inputs))
    trace = KinkTrace(module, rows.take)
    for batch in inputs.split(sizes):
        with trace:
            module(batch)
        rows.end_batch()
    assert rows.row == len(inputs)
    return found.layers["relu"], rows.patterns()["relu"].unpack().active


FORMS = {
    "batch first": (lambda h: h, 0),
    "sequence first": (lambda h: h.transpose(0, 1), 1),
    "channels first": (lambda h: h.permute(1, 2, 0), 2),
    "folded, samples first": (lambda h: h.flatten(0, 1), 0),
    "folded, steps first": (lambda h: h.transpose(0, 1).flatten(0, 1), 0),
    "two views": (lambda h: torch.cat([h[:, 0], h[:, 1]]), 0),
    "folded in the middle": (lambda h: h.reshape(-1, 3, 2, 2).permute(1, 0, 2, 3).flatten(0, 2), 0),
    "folded behind": (lambda h: h.flatten(0, 1).T, 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_samples_are_found_on_any_axis(name):
    form, axis = FORMS[name]
    module, inputs = Form(form), torch.randn(7, 3, 4)
    layer, active = rows_of(module, inputs, [3, 3, 1])  # as many samples as steps, which sizes would confuse
    assert layer.axis == axis
    for sample, row in zip(inputs, active, strict=True):
        own = form(module.linear(sample[None])).detach()  # of one sample alone
        assert torch.equal(row, (own.movedim(axis, 0) > 0).flatten())


def test_what_cannot_be_told_is_refused():
    inputs = torch.randn(7, 3, 4)
    for form, why in (
        (lambda h: h.flatten(1) @ h.flatten(1).T, "its shape is (3, 3) for 3 samples and (2, 2) for 2"),
        (lambda h: torch.cat([h, h[:1]]), "its shape is (4, 3, 4) for 3 samples"),
        (lambda h: h.flatten(0, 1)[torch.randperm(len(h) * 3)], "agrees with no known order"),
        (lambda h: h.flatten(0, 1) * 0 + 1, "agrees with no known order"),  # all alike
    ):
        module = Form(form)
        with pytest.raises(ValueError, match="layer relu belong to which sample is unknown: ") as error:
            find_layers(module, lambda n, module=module: module(inputs[:n]))
        assert why in str(error.value)


def test_layers_without_samples_and_mixed_ones_are_reported():
    inputs = torch.randn(7, 3, 4)

    def both(h):
        h.abs().amax()  # one number for all samples
        F.relu(h[:, 0] - h[:, 0].mean(0))
        return h.flip(0) + 1

    module = Form(both)
    found = find_layers(module, lambda n: module(inputs[:n]))
    assert list(found.layers) == ["F.abs", "F.relu", "relu"]
    assert found.without_samples == ("F.amax",)
    assert found.mixed == ("F.relu", "relu")


def test_layers_that_change_from_batch_to_batch_are_named():
    inputs = torch.randn(7, 3, 4)
    module = Form(lambda h: h)
    found = find_layers(module, lambda n: module(inputs[:n]))
    rows = PatternRows(found.layers, 7)
    trace = KinkTrace(module, rows.take)
    with pytest.raises(ValueError, match=r"layer relu is not the same.*had 12 units.*\(2, 5, 4\).*modules="), trace:
        module(torch.randn(2, 5, 4))
    with trace:
        module.linear(inputs)
    with pytest.raises(ValueError, match="layer relu is not the same in every batch: it was not called in every batch"):
        rows.end_batch()
    module.form = F.relu
    with pytest.raises(ValueError, match=r"layer F\.relu .*: it was not called in the pass on a few samples"), trace:
        module(inputs)
    module.form = lambda h: h
    with trace:
        module(torch.randn(8, 3, 4))
    with pytest.raises(ValueError, match="more than the 7 that are recorded"):
        rows.end_batch()


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
def test_what_runs_within_a_transform_is_said_to_be_unseen(transform):
    def form(h):
        transform(lambda row: F.relu(row).sum())(h)
        return h

    module, inputs = Form(form), torch.randn(3, 3, 4)
    found = find_layers(module, lambda n: module(inputs[:n]))
    assert list(found.layers) == ["relu"]
    assert found.opaque == ("F.relu (within torch.vmap or torch.func)",)


def test_functions_with_unseen_kinks_are_told():
    places = torch.zeros(3, 3, 4, dtype=torch.int64)

    def form(h):
        h.cummax(1), h % 1.0, torch.fmod(h, 1.0), h.aminmax(), torch.quantile(h, 0.5)
        h.scatter_reduce(1, places[: len(h)], h, "amax"), h.scatter_reduce(1, places[: len(h)], h, "sum")
        F.embedding_bag(places[0, :2], torch.ones(2, 2))  # a mean
        torch.logsumexp(h, 1), h.exp().log1p(), h**2, torch.special.expit(h), F.smooth_l1_loss(h, h), F.normalize(h)
        return h

    module, inputs = Form(form), torch.randn(3, 3, 4)
    found = find_layers(module, lambda n: module(inputs[:n]))
    assert found.opaque == ("aminmax", "cummax", "fmod", "quantile", "remainder", "scatter_reduce")
    assert {"logsumexp", "log1p", "pow", "special_expit", "smooth_l1_loss", "normalize"} < {*found.smooth}


def test_no_kinks_and_names_that_match_nothing():
    module, inputs = Form(lambda h: h), torch.randn(3, 3, 4)
    with pytest.raises(NoKinksError, match=r"modules='leaky' matches none of the layers .*: relu"):
        find_layers(module, lambda n: module(inputs[:n]), "leaky")
    module.relu = nn.Tanh()
    with pytest.raises(NoKinksError, match="Form has no kink in its forward pass"):
        find_layers(module, lambda n: module(inputs[:n]))
