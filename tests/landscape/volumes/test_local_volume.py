import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

from lightning_mnn.figures import local_volume_figure
from lightning_mnn.landscape import KinkTrace
from lightning_mnn.landscape.intervals import Proportion
from lightning_mnn.landscape.perturbation import finest_sigma
from lightning_mnn.landscape.volumes.random_moves import (
    ALL_LAYERS,
    SIGMAS,
    KeepCurve,
    LocalVolume,
    count_kept,
    local_volume,
)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def near(proportion, exact):
    """Whether a probability lies in the interval that misses it once in ten thousand times."""
    wide = Proportion.of(proportion.hits, proportion.trials, confidence=1 - 1e-4)
    return wide.low <= exact <= wide.high


def curve_of(*hits, trials=100):
    sigmas = tuple(10.0**k for k in range(len(hits)))
    return KeepCurve(sigmas, tuple(Proportion.of(h, trials) for h in hits))


@pytest.mark.parametrize(("dtype", "margin"), [(torch.float64, 0.1), (torch.float32, 2e-6)])
def test_one_unit_and_one_sample_have_a_closed_form(dtype, margin):
    w, x = drawn(300, seed=1, dtype=dtype), drawn(300, seed=2, dtype=dtype)
    scale = float(w.norm()) / math.sqrt(300)
    w += x * (margin * scale * float(x.norm()) - float(w @ x)) / float(x @ x)
    u = float(w.double() @ x.double())
    scale = float(w.norm()) / math.sqrt(300)
    sigmas = [margin * factor for factor in (0.5, 1.0, 2.0, 5.0)]
    volume = local_volume([w], [lambda: {"unit": x @ w > 0}], sigmas=sigmas, num_draws=2000)
    for sigma, kept in zip(sigmas, volume.total.kept, strict=True):
        assert near(kept, norm.cdf(abs(u) / (sigma * scale * float(x.norm())))), sigma
    assert volume.total == volume.layers["unit"]


def test_orthonormal_samples_are_independent():
    w, x = drawn(3, 4), torch.eye(4, dtype=torch.float64)
    sigmas = [0.03, 0.1, 0.3, 1.0]
    volume = local_volume([w], [lambda: {"units": w @ x > 0}], sigmas=sigmas, num_draws=3000, seed=3)
    scale = float(w.norm()) / math.sqrt(12)
    for sigma, kept in zip(sigmas, volume.total.kept, strict=True):
        assert near(kept, float(norm.cdf(w.abs() / (sigma * scale)).prod()))


def test_two_layers_agree_with_a_simulation_by_numpy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Linear(5, 1)).double()
    nn.init.zeros_(net[2].bias)  # which does not move
    x = drawn(2, 3)
    patterns = {}
    trace = KinkTrace(net, lambda kink: patterns.update({kink.name: kink.pieces()}))

    def run():
        with trace:
            net(x)
        return dict(patterns)

    sigmas = [0.03, 0.1, 0.3]
    volume = local_volume(net.parameters(), [run], sigmas=sigmas, num_draws=2000, seed=1)

    rng = np.random.default_rng(0)
    w1, b1, w2, b2 = (p.detach().numpy() for p in list(net.parameters())[:4])

    def moved(tensor, sigma):
        size = np.linalg.norm(tensor) / math.sqrt(tensor.size)
        return tensor + sigma * size * rng.standard_normal((20_000, *tensor.shape))

    def active(a, b, c, d):
        first = np.einsum("...ij,nj->...ni", a, x.numpy()) + b[..., None, :]
        second = np.einsum("...ij,...nj->...ni", c, np.maximum(first, 0)) + d[..., None, :]
        return first > 0, second > 0

    reference = active(w1, b1, w2, b2)
    for k, sigma in enumerate(sigmas):
        here = active(*(moved(tensor, sigma) for tensor in (w1, b1, w2, b2)))
        kept = [(now == before).all((-2, -1)) for now, before in zip(here, reference, strict=True)]
        for name, hits in {"1": kept[0], "3": kept[1], ALL_LAYERS: kept[0] & kept[1]}.items():
            curve = volume.total if name == ALL_LAYERS else volume.layers[name]
            p = hits.mean()
            error = math.sqrt(p * (1 - p) * (1 / 2000 + 1 / 20_000))
            assert abs(curve.kept[k].value - p) <= 4 * error, (name, sigma)


def test_a_cone_is_left_once_along_a_direction():
    w, x = drawn(5, 4), drawn(6, 4, seed=1)
    before = None
    for draw in range(30):
        counts = count_kept([w], [lambda: {"units": x @ w.T > 0}], SIGMAS, [draw])[ALL_LAYERS].tolist()
        assert counts == sorted(counts, reverse=True)
        assert set(counts) == {0, 1}
        before = counts if before is None else np.add(before, counts).tolist()
    assert 3 < len(set(before)) <= len(SIGMAS)  # not all at one place


def test_intervals_and_brackets_cover_what_they_should():
    w, x = torch.tensor([1.0, 2.0, 2.5], dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    scale = float(w.norm()) / math.sqrt(3)

    def exact(sigma):
        return float(norm.cdf(w / (sigma * scale)).prod())

    half = brentq(lambda sigma: exact(sigma) - 0.5, 0.1, 10.0)
    sigmas = [half * factor for factor in (0.5, 0.8, 0.95, 1.05, 1.5, 3.0)]
    repeats, covered, bracketed = 300, np.zeros(len(sigmas)), 0
    for seed in range(repeats):
        curve = local_volume([w], [lambda: {"unit": x @ w > 0}], sigmas=sigmas, num_draws=25, seed=seed).total
        covered += [kept.low <= exact(sigma) <= kept.high for kept, sigma in zip(curve.kept, sigmas, strict=True)]
        bracketed += (curve.half_sigma_low or 0.0) < half < (curve.half_sigma_high or math.inf)
        assert curve.half_sigma is None or (curve.half_sigma_low or 0.0) <= curve.half_sigma
        assert curve.half_sigma is None or curve.half_sigma <= (curve.half_sigma_high or math.inf)
    least = 0.95 - 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert covered.min() / repeats > least
    assert bracketed / repeats > least


def test_half_sigma_is_bracketed():
    curve = curve_of(100, 90, 10, 0)
    assert (curve.half_sigma_low, curve.half_sigma_high) == (10.0, 100.0)
    assert curve.half_sigma == pytest.approx(10**1.5)
    assert curve_of(100, 80, 50, 0).half_sigma == 100.0
    up_and_down = curve_of(100, 90, 10, 95, 20, 0)
    assert (up_and_down.half_sigma_low, up_and_down.half_sigma_high) == (10.0, 1e4)
    assert up_and_down.half_sigma == pytest.approx(10**1.5)
    unsure = curve_of(100, 52, 48, 0)
    assert (unsure.half_sigma_low, unsure.half_sigma_high) == (1.0, 1000.0)
    assert unsure.half_sigma == pytest.approx(10**1.5)
    early, late = curve_of(3, 0), curve_of(100, 99)
    assert (early.half_sigma_low, early.half_sigma, early.half_sigma_high) == (None, None, 1.0)
    assert (late.half_sigma_low, late.half_sigma, late.half_sigma_high) == (10.0, None, None)
    assert late.plain()["half_sigma_high"] is None


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_put_back_bit_for_bit(fails):
    w = nn.Parameter(drawn(3, 2, dtype=torch.float32))
    frozen = torch.tensor([0.0, -0.0])
    with torch.no_grad():
        w[0, 0] = -0.0
    before, version, calls = w.detach().clone().view(torch.int32), w._version, []

    def run():
        calls.append(w.detach().clone())
        if fails and len(calls) == 6:
            raise RuntimeError("a forward that fails")
        return {"units": w > 0}

    if fails:
        with pytest.raises(RuntimeError, match="a forward that fails"):
            local_volume([w, frozen], [run], sigmas=[0.1, 1.0], num_draws=5)
    else:
        local_volume([w, frozen], [run], sigmas=[0.1, 1.0], num_draws=5)
        assert len(calls) == 12  # the reference, its check, and each move
        step = calls[3] - calls[0]  # at 1.0 ten times as far as at 0.1 along the same direction
        assert torch.allclose(step, 10 * (calls[2] - calls[0]), rtol=1e-4, atol=1e-6)
    assert torch.equal(w.detach().view(torch.int32), before)
    assert frozen.tolist() == [0.0, 0.0]
    assert w._version == version
    assert not torch.equal(calls[2], calls[0])


def test_parts_of_the_probe_are_left_out_where_all_is_decided():
    w, x = drawn(4, 3), drawn(10, 3, seed=1)
    calls = []

    def part(rows):
        calls.append(len(rows))
        return {"units": rows @ w.T > 0, "half": rows[:, :1] @ w.T[:1] > 0}

    options = {"sigmas": [1e-3, 0.05, 0.3, 1.0, 3.0], "num_draws": 40, "seed": 2}
    whole = local_volume([w], [lambda: part(x)], **options)
    assert calls == [10] * 202
    calls.clear()
    split = local_volume([w], [lambda: part(x[:2]), lambda: part(x[2:])], **options)
    assert split == whole
    assert (calls.count(2), calls.count(8)) == (202, pytest.approx(130, abs=50))
    assert whole.layers["units"] != whole.layers["half"]
    assert whole.total == whole.layers["units"]  # which knows the other's numbers


def test_shares_of_the_draws_add_up():
    w, x = drawn(4, 3), drawn(10, 3, seed=1)
    arguments = [w], [lambda: {"units": x @ w.T > 0}], [0.01, 0.1, 1.0]
    whole = count_kept(*arguments, range(10))
    shares = [count_kept(*arguments, range(rank, 10, 3)) for rank in range(3)]
    assert all(torch.equal(sum(share[name] for share in shares), whole[name]) for name in whole)
    assert LocalVolume.of_counts(arguments[2], whole, 10) == local_volume(
        *arguments[:2], sigmas=arguments[2], num_draws=10
    )


def test_a_layer_that_is_not_met_again_has_changed():
    w = torch.ones(1, dtype=torch.float64)

    def run():
        met = {"always": w > 0}
        if float(w) == 1.0:
            met["sometimes"] = w > 0
        return met

    volume = local_volume([w], [run], sigmas=[1e-3], num_draws=4)
    assert volume.layers["always"].kept[0].hits == 4
    assert volume.layers["sometimes"].kept[0].hits == volume.total.kept[0].hits == 0


def test_coarse_numbers_do_not_resolve_small_moves():
    parameters = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)]
    assert finest_sigma(parameters) == 8 * 2**-7
    with pytest.raises(ValueError, match=r"sigmas must be at least 6\.2e-02, 8 spacings.*got 1\.0e-06"):
        local_volume(parameters, [lambda: {"all": parameters[0] > 0}])
    assert local_volume(parameters, [lambda: {"both": parameters[1] > 0}], sigmas=[0.1], num_draws=9).total.kept[0].hits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": []}, "sigmas must be positive, finite and ascending"),
        ({"sigmas": [0.1, 0.1]}, "sigmas must be positive, finite and ascending"),
        ({"sigmas": [0.0, 0.1]}, "sigmas must be positive, finite and ascending"),
        ({"sigmas": [0.1, math.inf]}, "sigmas must be positive, finite and ascending"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"parameters": []}, "parameters must have at least one tensor to move"),
        ({"runs": []}, "runs must have at least one part of the probe"),
        ({"runs": [dict]}, "runs return no layer"),
        ({"runs": [lambda: {"noise": torch.randn(9) > 0}]}, "runs return different patterns at the same parameters"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"parameters": [torch.ones(2)], "runs": [lambda: {"a": torch.ones(1)}]} | options
    with pytest.raises(ValueError, match=message):
        local_volume(**arguments)


@pytest.mark.parametrize("layers", [2, 30])
def test_the_figure_shows_every_layer(tmp_path, layers):
    curves = {f"block.{i}.relu$": curve_of(100, 100 - 3 * i, 5, 0) for i in range(layers)}
    path = local_volume_figure(LocalVolume(curve_of(99, 10, 0, 0), curves), tmp_path / "a.png", "Net")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
