"""First-order conditions on kinks, against planted minima, dense algebra and losses whose answer is known."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_mnn.landscape import (
    Kind,
    KinkTrace,
    LossSurface,
    Reason,
    ReasonCode,
    check_stationarity,
    kink_distance,
    planted_kink_minimum,
    planted_model_kink_minimum,
)
from lightning_mnn.landscape.curvature import kink_conditions as module
from lightning_mnn.landscape.curvature.kink_conditions import check_kinks, kink_conditions
from lightning_mnn.landscape.curvature.loss_surface import NoDerivativeError

EPS = 2.0**-52


class Problem:
    """A network and its loss, in batches, as ``check_kinks`` takes them."""

    def __init__(self, model, inputs, loss, batch_size=20):
        self.model, self.inputs, self.loss = model, inputs, loss
        self.rows = [slice(i, min(i + batch_size, len(inputs))) for i in range(0, len(inputs), batch_size)]
        self.parameters = list(model.parameters())
        self.surface = LossSurface(self.parameters, self._parts)

    def _weight(self, rows):
        return (rows.stop - rows.start) / len(self.inputs)

    def _value(self, rows):
        return self.loss(self.model(self.inputs[rows]), rows)

    def _parts(self):
        return [(self._weight(rows), lambda rows=rows: self._value(rows)) for rows in self.rows]

    def _trace(self, rows, on_kink, replaced=None):
        with KinkTrace(self.model, on_kink, replace=replaced):
            return self._value(rows)

    def passes(self):
        for rows in self.rows:
            yield (
                self._weight(rows),
                lambda on_kink, rows=rows: self._trace(rows, on_kink),
                lambda active, rows=rows: self._trace(rows, lambda _: None, active),
            )

    def conditions(self, spacing=0.0):
        return kink_conditions(self.surface, self.passes, spacing)

    def verdict(self, reference=1.0, tolerance=1e-6):
        trace = [lambda on_kink, rows=rows: self._trace(rows, on_kink) for rows in self.rows]
        kinks = kink_distance(trace, self.parameters)
        cheap = check_stationarity(self.surface, kinks, reference, gradient_tolerance=tolerance)
        found = check_kinks(
            self.surface, cheap, self.passes, kinks.spacing, reference=reference, gradient_tolerance=tolerance
        )
        return cheap, found


class Custom(nn.Module):
    """The network of an ``nn.Sequential``, written by hand: functions, an in-place method, a view, a skipped name."""

    def __init__(self, layers, slope):
        super().__init__()
        self.layers, self.slope = nn.ModuleList(layers), slope

    def forward(self, x):
        x = x.unsqueeze(1)
        for i, layer in enumerate(self.layers[:-1]):
            h = layer(x)
            if i % 2 == 0:
                functional.leaky_relu_(h, self.slope)  # its result is not used
                x = h
            elif self.slope:
                x = functional.leaky_relu(input=h, negative_slope=self.slope)
            else:
                x = h.relu()
        return self.layers[-1](x).squeeze(1)


def of_planted(planted, *, custom=False, batch_size=20):
    model = planted.module
    if custom:
        relus = [layer for layer in model if not isinstance(layer, nn.Linear)]
        slope = getattr(relus[0], "negative_slope", 0.0)
        model = Custom([layer for layer in model if isinstance(layer, nn.Linear)], slope)
    losses = {
        "squared_error": lambda out, y: (out - y).square().sum(1).mean(),
        "cross_entropy": lambda out, y: -(y * out.log_softmax(1)).sum(1).mean(),
        "logistic": lambda out, y: functional.softplus(-y * out).sum(1).mean(),
    }

    def loss(out, rows):
        penalty = sum(p.square().sum() for p in model.parameters())
        return losses[planted.loss](out, planted.targets[rows]) + planted.weight_decay / 2 * penalty

    return Problem(model, planted.inputs, loss, batch_size)


PLANTED = [
    ({}, {}),
    ({"negative_slope": 0.1, "kinks": 5}, {"custom": True}),
    ({"kinks": 1}, {}),
    ({"loss": "cross_entropy"}, {"custom": True}),
    ({"weight_decay": 1e-3, "kinks": 2}, {}),
    ({"kinks": 6, "seed": 3}, {"custom": True, "batch_size": 7}),
]


@functools.cache
def _plant(options):
    options = dict(options)
    widths = (3, 4, 3, 2) if options.get("loss") else (3, 4, 3, 1)
    return planted_model_kink_minimum(60, widths, options.pop("negative_slope", 0.0), **options)


def plant(options, **more):
    found = _plant(tuple((options | more).items()))
    return replace(found, module=copy.deepcopy(found.module))


@pytest.mark.parametrize(("options", "form"), PLANTED)
def test_a_planted_minimum_is_stationary_on_its_kinks(options, form):
    planted = plant(options)
    problem = of_planted(planted, **form)
    cheap, found = problem.verdict()
    assert cheap.kind is Kind.ON_KINK
    assert (found.kind, found.reason_code) == (Kind.ON_KINK, ReasonCode.STATIONARY_ON_KINKS)
    numbers = next(fact.values for fact in found.because.facts if fact.code is ReasonCode.KINK_CONDITIONS)
    assert (numbers["kinks"], numbers["rank"]) == (len(planted.kinks),) * 2
    assert numbers["residual"] < 1e-10
    assert numbers["growth"] > numbers["error"]
    assert "second-order evidence, not a proof" in found.reason


@pytest.mark.parametrize(("options", "form"), PLANTED)
def test_a_violated_multiplier_is_found_and_its_fall_measured(options, form):
    planted = plant(options, violated=True)
    problem = of_planted(planted, **form)
    found = problem.verdict()[1]
    assert (found.kind, found.reason_code) == (Kind.NOT_STATIONARY, ReasonCode.LOSS_FALLS_OFF_KINK)
    conditions = problem.conditions()
    assert conditions.growth < 0
    before = problem.surface.loss()
    with problem.surface.moved(found.because.values["length"] * conditions.off):
        assert problem.surface.loss() == pytest.approx(before - found.because.values["fall"], abs=1e-14)


@pytest.mark.parametrize("violated", [False, True])
@pytest.mark.parametrize(("options", "form"), PLANTED)
def test_multipliers_and_growth_are_those_that_were_planted(options, form, violated):
    planted = plant(options, violated=violated)
    problem = of_planted(planted, **form)
    found = problem.conditions()
    size = form.get("batch_size", 20)
    keys = [(sample // size, layer, sample, unit) for layer, sample, unit in planted.kinks]
    order = sorted(range(len(keys)), key=keys.__getitem__)  # batch by batch
    multipliers, growth = planted.multipliers[order], planted.growth[order]
    lengths = found.multipliers / multipliers  # distances off a kink are z over the length of its gradient
    assert (lengths > 0).all()
    assert torch.allclose(found.growths, growth * lengths, rtol=1e-6, atol=1e-9)
    assert 0 < found.likq <= 1


def test_multipliers_of_one_layer_against_dense_algebra():
    """The gradient of z_ni is x_n in the row of unit i, so a, Z and b have closed forms."""
    planted = planted_kink_minimum(40, 5, 4, kinks_per_unit=2)
    problem = of_two_layers(planted)
    found = problem.conditions()
    x, w, v = planted.inputs, planted.hidden_weights, planted.output_weights
    slopes = torch.where(planted.kinks, 0.5, (x @ w.T > 0).double())
    error = (slopes * (x @ w.T)) @ v - planted.targets
    a = torch.cat(
        [(2 / len(x) * (error[:, None] * slopes * v).T @ x).flatten(), 2 / len(x) * error @ (slopes * (x @ w.T))]
    )
    batch = [(n // 20, n, i) for n, i in planted.kinks.nonzero().tolist()]
    z, b = torch.zeros(len(batch), len(a), dtype=torch.float64), []
    for k, (_, n, i) in enumerate(sorted(batch)):
        z[k, 5 * i : 5 * i + 5] = x[n] / x[n].norm()
        b.append(float(error[n] * v[i] * x[n].norm() / len(x)))
    multipliers = torch.linalg.lstsq(z.T, -a[:, None]).solution[:, 0]
    assert torch.allclose(found.multipliers, multipliers, rtol=1e-8, atol=1e-12)
    assert torch.allclose(found.growths, torch.tensor(b) - multipliers.abs(), rtol=1e-6, atol=1e-8)
    sigma = torch.linalg.svdvals(z)
    assert found.likq == pytest.approx(float(sigma[-1] / sigma[0]))
    assert (found.kinks, found.rank) == (8, 8)


def of_two_layers(planted, **options):
    rows, outputs = planted.hidden_weights, planted.output_weights
    model = nn.Sequential(
        nn.Linear(rows.shape[1], len(rows), bias=False), nn.ReLU(), nn.Linear(len(rows), 1, bias=False)
    )
    model.double()
    with torch.no_grad():
        model[0].weight.copy_(rows)
        model[2].weight.copy_(outputs[None])
    return Problem(model, planted.inputs, lambda out, at: (out[:, 0] - planted.targets[at]).square().mean(), **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("violated", [False, True])
def test_two_layers(violated, seed):
    planted = planted_kink_minimum(40, 5, 4, violated=violated, seed=seed)
    cheap, found = of_two_layers(planted).verdict()
    assert (cheap.kind, cheap.reason_code) == (Kind.ON_KINK, ReasonCode.ONE_SIDED)
    if violated:
        assert (found.kind, found.reason_code) == (Kind.NOT_STATIONARY, ReasonCode.LOSS_FALLS_OFF_KINK)
    else:
        assert (found.kind, found.reason_code) == (Kind.ON_KINK, ReasonCode.STATIONARY_ON_KINKS)


def test_a_point_moved_along_the_face_is_not_stationary():
    planted = planted_kink_minimum(40, 5, 4)
    moved = replace(planted, output_weights=planted.output_weights * 1.001)  # the kinks stay
    cheap, found = of_two_layers(moved).verdict()
    assert cheap.kind is Kind.ON_KINK
    assert (found.kind, found.reason_code) == (Kind.NOT_STATIONARY, ReasonCode.LOSS_FALLS_ALONG_KINKS)
    assert found.because.values["fall"] > 0
    tolerant = of_two_layers(moved).verdict(tolerance=1.0)[1]  # within a tolerance that large, the rest is undecided
    assert tolerant.kind is Kind.ON_KINK


class One(nn.Module):
    def __init__(self, function, numbers):
        super().__init__()
        self.theta, self.function = nn.Parameter(torch.tensor(numbers, dtype=torch.float64)), function

    def forward(self, x):
        return self.function(self.theta) * x


def of_function(function, numbers):
    return Problem(One(function, numbers), torch.ones(1, dtype=torch.float64), lambda out, _: out.sum())


def fed(t, inner, outer):
    """One kink feeds another: where the second stays, t_0 = −inner |t_1|."""
    size = t[1].abs()
    return 1 + 2 * (t[0] + inner * size).abs() + outer * size


@pytest.mark.parametrize(
    ("function", "numbers", "code"),
    [
        (lambda t: 1 + t[0].abs() + 0.5 * t[0] + t[1] ** 2, (0.0, 0.0), ReasonCode.STATIONARY_ON_KINKS),
        (lambda t: 1 + t[0].abs() + 1.5 * t[0] + t[1] ** 2, (0.0, 0.0), ReasonCode.LOSS_FALLS_OFF_KINK),
        (lambda t: 1 - t[0].abs() + t[1] ** 2, (0.0, 0.0), ReasonCode.LOSS_FALLS_OFF_KINK),
        (lambda t: 1 + t[0].abs() + t[1] ** 2 / 2, (0.0, 0.3), ReasonCode.LOSS_FALLS_ALONG_KINKS),
        (lambda t: 1 + t[0].abs() + t[0] + t[1] ** 2, (0.0, 0.0), ReasonCode.GROWTH_WITHIN_ROUNDING),
        (lambda t: 1 + t[0].abs() - 0.5 * (2 * t[0]).abs(), (0.0, 0.0), ReasonCode.KINKS_NOT_INDEPENDENT),
        (lambda t: 1 + t[0].abs() + 0.5 * (2 * t[0]).abs(), (0.0, 0.0), ReasonCode.STATIONARY_ON_KINKS),
        (lambda t: fed(t, 0.2, -0.3), (0.0, 0.0), ReasonCode.LOSS_FALLS_OFF_KINK),
        (lambda t: fed(t, 1.0, 0.3), (0.0, 0.0), ReasonCode.STATIONARY_ON_KINKS),
    ],
)
def test_simple_functions(function, numbers, code):
    found = check_of(of_function(function, numbers))
    assert found.reason_code is code
    assert (found.kind is Kind.NOT_STATIONARY) == code.startswith("loss_falls")


def check_of(problem, **options):
    cheap = replace(problem.verdict()[0], kind=Kind.ON_KINK, because=Reason.of(ReasonCode.ONE_SIDED))
    return check_kinks(problem.surface, cheap, problem.passes, EPS, reference=1.0, **options)


def test_other_kinks_and_too_many_are_told(monkeypatch):
    found = check_of(of_function(lambda t: 1 + t[0].abs() + t.clamp(-1.0, 1.0)[1].abs(), (0.0, 1.0)))
    assert found.reason_code is ReasonCode.ONE_SIDED
    assert "some are kinks of clamp" in found.reason
    pooled = of_function(lambda t: 1 + functional.max_pool1d(t[None, None], 2).sum(), (1.0, 1.0))
    assert "some are kinks of max_pool1d" in check_of(pooled).reason
    problem = of_function(lambda t: 1 + t.abs().sum(), (0.0, 0.0))
    assert check_of(problem).reason_code is ReasonCode.STATIONARY_ON_KINKS
    monkeypatch.setattr(module, "_MAX_KINKS", 1)
    found = check_of(problem)
    assert (found.kind, found.reason_code) == (Kind.ON_KINK, ReasonCode.ONE_SIDED)
    assert "there are more than 1" in found.reason


def test_units_that_are_zero_nearby_are_no_kinks():
    """The second |·| is of a number that is zero on a neighbourhood; the third is just off its kink."""
    found = of_function(
        lambda t: 1 + t[0].abs() + (t[1] - 2).relu().abs() + (t[1] - 1e-9).abs(), (0.0, 0.0)
    ).conditions()
    assert found.kinks == 1


def test_points_off_kinks_are_returned_as_they_are():
    problem = of_function(lambda t: 1 + t[0].abs() + t[1] ** 2, (1.0, 0.0))
    cheap, found = problem.verdict()
    assert cheap is found


def test_a_pre_activation_without_derivative_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no derivative here")

    with pytest.raises(NoDerivativeError, match="no derivative here"):
        of_function(lambda t: 1 + Opaque.apply(t).abs().sum(), (0.0, 0.0)).conditions()


def test_nothing_remains_changed():
    problem = of_two_layers(planted_kink_minimum(40, 5, 4, violated=True))
    before = [p.detach().clone() for p in problem.parameters]
    problem.verdict()
    assert all(map(torch.equal, before, problem.parameters))
    assert [p.grad for p in problem.parameters] == [None] * len(before)
