import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import certify, polish
from lightning_mnn.landscape.minima import certificate, polishing
from lightning_mnn.landscape.minima.planted import planted_kink_minimum, planted_minimum, planted_saddle
from tests.landscape.probes import activate, lowest_change, outputs, train

SLOPES = (0.0, 0.01, 0.3, -1.0)
MINIMA = ("differentiable_minimum", "kink_minimum")


def of(planted, **options):
    return certify(
        planted.hidden_weights,
        planted.output_weights,
        planted.inputs,
        planted.targets,
        planted.negative_slope,
        **options,
    )


def linear_mse(planted):
    """MSE of the linear model on inputs times the slopes of the first row's pattern, by numpy."""
    x, y, w = (t.numpy() for t in (planted.inputs, planted.targets, planted.hidden_weights))
    features = np.where(x @ w[1] > 0, 1.0, planted.negative_slope)[:, None] * x
    return float(np.mean((y - features @ np.linalg.lstsq(features, y, rcond=None)[0]) ** 2))


def drawn_minimum(rng):
    input_dim, slope = int(rng.integers(2, 61)), float(rng.choice(SLOPES))
    num_samples, width = int(rng.integers(input_dim + 2, 401)), int(rng.integers(2, 21))
    return planted_minimum(num_samples, input_dim, width, slope, seed=int(rng.integers(2**31)))


def check(found, asked, rng, count=2000):
    """Recompute what a certificate says, and try to lower the loss around it."""
    w, z, x, y, slope = asked
    w_star, z_star = found.hidden_weights.numpy(), found.output_weights.numpy()
    e = y - outputs(w_star, z_star, x, slope)
    assert found.mse == pytest.approx(np.mean(e**2), rel=1e-9, abs=10 * found.rounding_bound**2)
    flat, flat_star = z[:, None] * w, z_star[:, None] * w_star
    if found.kind != "not_stationary" and np.linalg.norm(flat) > 0:
        distance = np.linalg.norm(flat_star - flat) / np.linalg.norm(flat)
        assert found.distance == pytest.approx(distance, rel=1e-6, abs=1e-12) or (z == 0).any()
    if found.kind in MINIMA:
        sizes = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w_star, axis=1)
        kinks = (np.abs(x @ w_star.T) <= 1e-13 * sizes) & (np.linalg.norm(x, axis=1) > 0)[:, None]
        assert (kinks.sum() > 0) == (found.kind == "kink_minimum")
        lowest, uncertainty = lowest_change(w_star, z_star, x, y, slope, kinks=kinks, rng=rng, count=count)
        assert lowest >= 0, (lowest, uncertainty, found)
    if found.kind == "saddle":
        for share in (1.0, 0.5, 0.1, 0.01):
            moved = outputs(
                w_star + share * found.direction.hidden_weights.numpy(),
                z_star + share * found.direction.output_weights.numpy(),
                x,
                slope,
            )
            change = moved - (y - e)
            assert change @ (change - 2 * e) < 0


def test_planted_minima_are_certified():
    rng = np.random.default_rng(0)
    for _ in range(250):
        planted = drawn_minimum(rng)
        found = of(planted)
        assert (found.kind, found.zero_error) == ("differentiable_minimum", False), found
        assert found.mse == pytest.approx(linear_mse(planted), rel=1e-9)
        noise = torch.from_numpy(rng.standard_normal(planted.hidden_weights.shape))
        shift = 1e-9 * noise / noise.norm() * planted.hidden_weights.norm()
        moved = certify(
            planted.hidden_weights + shift,
            planted.output_weights,
            planted.inputs,
            planted.targets,
            planted.negative_slope,
        )
        assert moved.kind == "differentiable_minimum"
        assert moved.mse == pytest.approx(found.mse, rel=1e-9)


def test_with_labels_redrawn_a_certificate_is_of_the_new_linear_model():
    rng = np.random.default_rng(1)
    kinds = []
    for _ in range(100):
        planted = drawn_minimum(rng)
        targets = torch.from_numpy(rng.integers(0, 2, len(planted.targets)).astype(float))
        arrays = (planted.hidden_weights, planted.output_weights, planted.inputs, targets)
        limit = float(rng.choice([1e-3, 10.0]))
        found = certify(*arrays, planted.negative_slope, threshold=0.5, max_distance=limit)
        kinds.append(found.kind)
        if found.kind in MINIMA:
            assert found.distance > 0
            check(found, (*(t.numpy() for t in arrays), planted.negative_slope), rng, count=20)
            if found.kind == "differentiable_minimum":
                w = found.hidden_weights.numpy()
                features = np.where(planted.inputs.numpy() @ w[1] > 0, 1.0, planted.negative_slope)[:, None]
                features = features * planted.inputs.numpy()
                residual = targets.numpy() - features @ np.linalg.lstsq(features, targets.numpy(), rcond=None)[0]
                assert found.mse == pytest.approx(np.mean(residual**2), rel=1e-9)
    assert {"differentiable_minimum", "not_stationary"} <= set(kinds)


def test_planted_kink_minima_are_certified_and_violated_ones_are_not():
    rng = np.random.default_rng(2)
    for k in range(200):
        input_dim, width = int(rng.integers(3, 12)), int(rng.integers(1, 5))
        sizes = (int(rng.integers(3, 8)) * input_dim * width, input_dim, width, float(rng.choice(SLOPES)))
        kinks = int(rng.integers(1, min(4, input_dim)))
        planted = planted_kink_minimum(*sizes, kinks_per_unit=kinks, seed=k)
        found = of(planted)
        assert found.kind == "kink_minimum", found
        assert found.kinks == int(planted.kinks.sum())
        assert found.mce is None
        violated = planted_kink_minimum(*sizes, kinks_per_unit=kinks, seed=k, violated=True)
        assert of(violated).kind not in MINIMA


def test_planted_saddles_are_saddles():
    rng = np.random.default_rng(3)
    for k in range(200):
        input_dim, width = int(rng.integers(2, 20)), int(rng.integers(3, 10))
        num_samples = int(rng.integers(input_dim + 2, 100))
        planted = planted_saddle(num_samples, input_dim, width, float(rng.choice(SLOPES)), seed=k)
        found = of(planted)
        assert found.kind == "saddle", found
        arrays = (planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
        check(found, (*(t.numpy() for t in arrays), planted.negative_slope), rng)


def pool(rng, count):
    """Points trained to various degrees, planted, perturbed, with dead units, zero z, equal rows and samples, ties."""
    for _ in range(count):
        num_samples, input_dim, width = (int(rng.integers(*ends)) for ends in ((2, 40), (1, 6), (1, 6)))
        slope = float(rng.choice([0.0, 0.1, -1.0, 0.5, 2.0]))
        x = rng.standard_normal((num_samples, input_dim))
        match rng.integers(6):
            case 0 if num_samples > 3:
                x[1], x[2] = x[0], -x[0]
            case 1:
                x[rng.integers(num_samples)] = 0
            case 2:
                x = np.round(x)
        labels = [[0.0, 1.0], [-1.0, 1.0]][rng.integers(2)]
        y = rng.choice(labels, num_samples) if rng.random() < 0.9 else rng.standard_normal(num_samples)
        w, z = rng.standard_normal((width, input_dim)) * np.sqrt(2 / input_dim), rng.standard_normal(width)
        if rng.random() < 0.3:
            z[rng.integers(width)] = 0
        if rng.random() < 0.2:
            w[rng.integers(width)] = 0
        if rng.random() < 0.2:
            w[-1], z[-1] = w[0], -z[0]
        if rng.random() < 0.2:
            w = np.round(w)
        if rng.random() < 0.7:
            w, z = train(w, z, x, y, slope, steps=int(rng.choice([10, 100, 1000])))
        yield w, z, x, y, slope


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_certificate_is_false(seed):
    rng = np.random.default_rng(seed)
    certified = 0
    for w, z, x, y, slope in pool(rng, 90):
        tensors = [torch.from_numpy(v) for v in (w, z, x, y)]
        for found in (
            certify(*tensors, slope, threshold=0.5),
            certify(*tensors, slope, threshold=0.5, max_distance=10.0),
            polish(*tensors, slope, threshold=0.5, max_steps=100).certificate,  # minima are found within 66
        ):
            certified += found.kind in MINIMA
            check(found, (w, z, x, y, slope), rng, count=300)
    assert certified > 50


def test_planted_points_resist_every_probe():
    rng = np.random.default_rng(4)
    for k in range(12):
        for planted in (planted_minimum(30, 4, 3, 0.1, seed=k), planted_kink_minimum(60, 5, 2, 0.0, seed=k)):
            arrays = (planted.hidden_weights, planted.output_weights, planted.inputs, planted.targets)
            check(of(planted), (*(t.numpy() for t in arrays), planted.negative_slope), rng)


def test_a_point_on_a_kink_that_holds_nothing_is_freed():
    """Two units of one pattern with opposite z: kinks that only one of them sits on are no obstacle."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.3]], dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    w = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # the second is on the kink of sample 1
    z = torch.tensor([3.0, -3.0], dtype=torch.float64)
    found = certify(w, z, x, y, max_distance=1.0)
    assert found.kind in MINIMA
    check(found, (*(t.numpy() for t in (w, z, x, y)), 0.0), np.random.default_rng(0))


def test_zero_error_on_a_kink_is_a_minimum():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    w, z = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = certify(w, z, x, torch.tensor([1.0, 0.0]))
    assert (found.kind, found.zero_error, found.kinks, found.mse) == ("kink_minimum", True, 1, 0.0)


def test_dead_units_and_unactivated_samples():
    x = torch.tensor([[1.0, 0.5], [2.0, -1.0], [-1.0, 0.1]], dtype=torch.float64)
    w = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    found = certify(w, torch.ones(1).double(), x, y, threshold=0.5, max_distance=10.0)
    assert (found.kind, found.zero_error) == ("differentiable_minimum", False)
    assert found.mse == pytest.approx(1 / 3)  # the third sample is out of reach
    assert (found.mce, found.rank, found.rank_cap) == (pytest.approx(1 / 3), 2, 2)
    asleep = torch.cat([w, torch.tensor([[-1.0, -1.0]], dtype=torch.float64)])  # on neither of the first two
    both = certify(asleep, torch.ones(2).double(), x[:2], y[:2], threshold=0.5, max_distance=10.0)
    assert (both.kind, both.zero_error) == ("differentiable_minimum", True)
    assert torch.equal(both.hidden_weights[1], asleep[1])


def test_thresholds_and_targets():
    planted = planted_minimum(40, 4, 3, seed=0, labels=(-1.0, 1.0))
    x, w = planted.inputs.numpy(), planted.hidden_weights.numpy()
    y = planted.targets.numpy()
    predicted = outputs(w, planted.output_weights.numpy(), x, 0.0)
    assert of(planted).mce == pytest.approx(np.mean(predicted * y <= 1e-12))
    real = planted_minimum(40, 4, 3, seed=0, targets=torch.linspace(0, 3, 40).double())
    assert of(real).mce is None


def test_biases_become_an_input_of_ones_and_a_free_column():
    rng, minima = np.random.default_rng(5), 0
    for _ in range(20):
        n, d0, d1 = 30, 3, 4
        x, y = torch.from_numpy(rng.standard_normal((n, d0))), torch.from_numpy(rng.integers(0, 2, n).astype(float))
        w, z = torch.from_numpy(rng.standard_normal((d1, d0))), torch.from_numpy(rng.standard_normal(d1))
        b, c = torch.from_numpy(rng.standard_normal(d1)), torch.tensor(0.3, dtype=torch.float64)
        polished = polish(w, z, x, y, 0.1, hidden_bias=b, output_bias=c)
        found = polished.certificate
        assert found.hidden_bias.shape == (d1,)
        if found.kind not in MINIMA:  # of a hundred such paths some three end where too many kinks meet
            continue
        minima += 1
        wide = torch.cat([x, torch.ones(n, 1).double()], 1).numpy()
        rows = torch.cat([found.hidden_weights, found.hidden_bias[:, None]], 1).numpy()
        e = y.numpy() - outputs(rows, found.output_weights.numpy(), wide, 0.1) - float(found.output_bias)
        assert found.mse == pytest.approx(np.mean(e**2), abs=1e-14)
        assert abs(e.sum()) < 1e-9 * n
        again = certify(
            found.hidden_weights, found.output_weights, x, y, 0.1,
            hidden_bias=found.hidden_bias, output_bias=found.output_bias,
        )  # fmt: skip
        assert again.kind == found.kind
        kinks = np.abs(wide @ rows.T) <= 1e-13 * np.linalg.norm(wide, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
        lowest, _ = lowest_change(
            rows,
            found.output_weights.numpy(),
            wide,
            y.numpy() - float(found.output_bias),
            0.1,
            kinks=kinks,
            rng=rng,
            count=200,
        )
        assert lowest >= 0
    assert minima >= 16


def test_replicas_are_certified_one_by_one():
    planted = [planted_minimum(30, 4, 3, 0.1, seed=k) for k in range(3)]
    w, z, x, y = (
        torch.stack([getattr(p, name) for p in planted])
        for name in ("hidden_weights", "output_weights", "inputs", "targets")
    )
    together = certify(w, z, x, y, 0.1)
    for found, one in zip(together, planted, strict=True):
        alone = of(one)
        assert (found.kind, found.mse) == (alone.kind, pytest.approx(alone.mse, rel=1e-9))
        assert found.distance == pytest.approx(alone.distance, rel=1e-6, abs=1e-12)
    shared = certify(w, z, x[0], y[0], 0.1)
    assert shared[0].kind == "differentiable_minimum"
    assert shared[1].kind == "not_stationary"


@given(st.integers(0, 2**32 - 1), st.floats(-6, -1))
def test_distance_decides(seed, exponent):
    planted = planted_minimum(25, 3, 3, 0.1, seed=seed % 1000)
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.standard_normal(planted.hidden_weights.shape))
    moved = planted.hidden_weights * (1 + 10**exponent * noise)
    found = certify(moved, planted.output_weights, planted.inputs, planted.targets, 0.1, max_distance=1e-4)
    far = certify(moved, planted.output_weights, planted.inputs, planted.targets, 0.1, max_distance=10.0)
    if found.kind == "not_stationary":
        assert torch.equal(found.hidden_weights, moved)
        assert far.kind == "not_stationary" or far.distance > 1e-4
    else:
        assert found.distance <= 1e-4
        assert (far.kind, far.distance) == (found.kind, found.distance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_slope": 1.0}, "negative_slope must be a real number other than 1, got 1.0"),
        ({"max_distance": -1.0}, "max_distance must be at least 0, got -1.0"),
        ({"targets": torch.zeros(4)}, r"targets must be \(5,\) for these inputs, got \(4,\)"),
        ({"inputs": torch.zeros(5, 3)}, r"inputs must be \(N, 2\) for these hidden_weights, got \(5, 3\)"),
        ({"output_weights": torch.zeros(4)}, r"output_weights \(d1,\).*got \(3, 2\) and \(4,\)"),
        ({"inputs": torch.full((5, 2), torch.nan)}, "inputs must be finite"),
        ({"targets": torch.ones(5)}, "give threshold=0.5 or threshold=0"),
        ({"inputs": torch.ones(0, 2), "targets": torch.ones(0)}, "inputs must have at least one sample"),
        ({"hidden_bias": torch.ones(4)}, r"hidden_bias must have the shape \(3,\) for these weights, got \(4,\)"),
        ({"output_bias": torch.tensor(torch.nan)}, "output_bias must be finite"),
        (
            {"hidden_weights": torch.ones(0, 2), "output_weights": torch.ones(0)},
            "must have at least one unit and one input",
        ),
        (
            {"hidden_weights": torch.ones(2, 3, 2), "output_weights": torch.ones(2, 3), "inputs": torch.ones(4, 5, 2)},
            "inputs are for 4 replicas and hidden_weights for 2",
        ),
    ],
)
def test_bad_arguments(options, message):
    arguments = {
        "hidden_weights": torch.ones(3, 2),
        "output_weights": torch.ones(3),
        "inputs": torch.ones(5, 2),
        "targets": torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]),
        "negative_slope": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        certify(**arguments | options)


@pytest.mark.parametrize("search", [certify, polish])
def test_labels_that_fit_two_thresholds_are_found_before_the_work(search, monkeypatch):
    monkeypatch.setattr(certificate, "search", None)
    monkeypatch.setattr(polishing, "search", None)
    with pytest.raises(ValueError, match="all targets are 1"):
        search(torch.ones(3, 2), torch.ones(3), torch.ones(5, 2), torch.ones(5))


def test_what_floats_cannot_decide_is_said():
    planted = planted_minimum(30, 3, 3, 0.1, seed=0)
    huge = 1e12
    w = planted.hidden_weights.clone()
    z = planted.output_weights * huge
    w[0] = w[1] + (w[0] - w[1]) / huge  # the same predictions, by differences of numbers 10^12 times as large
    found = certify(w, z, planted.inputs, planted.targets, 0.1)
    assert found.kind == "not_stationary"
    assert found.reason


def test_zero_rows_put_all_their_samples_on_kinks():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    w, z = torch.zeros(1, 2).double(), torch.ones(1).double()
    down = certify(w, z, x, torch.tensor([-1.0, -1.0, -1.0]), threshold=0.0)  # no output above 0 helps
    assert (down.kind, down.mse, down.kinks) == ("kink_minimum", 1.0, 3)
    up = certify(w, z, x, torch.tensor([1.0, 1.0, -1.0]), threshold=0.0)
    assert up.kind not in MINIMA
    assert certify(w, 0 * z, x, torch.tensor([1.0, 1.0, -1.0]), threshold=0.0).kind == "saddle"


def test_weights_so_large_that_rounding_hides_everything_have_no_zero_error():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.standard_normal((30, 2))), torch.from_numpy(rng.integers(0, 2, 30).astype(float))
    w = torch.from_numpy(rng.standard_normal(2)).repeat(2, 1)
    for size in (1e5, 1e7, 1e8, 1e9, 1e12):
        found = certify(size * w, size * torch.tensor([1.0, -1.0]).double(), x, y)
        assert (found.kind, found.zero_error) == ("not_stationary", False)


def test_samples_that_are_off_their_kinks_are_not_held_to_be_on_them():
    for gap in (1e-10, 1e-11, 1e-12):
        x = torch.tensor([[1.0, 0.0], [1.0, gap], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
        y = torch.tensor([-0.4, -1.0, 1.25, 0.75], dtype=torch.float64)
        found = certify(torch.tensor([[-1e-7, 1.0]]).double(), torch.ones(1).double(), x, y)
        if found.kind in MINIMA:  # then no move along the first input, one side or the other, lowers the loss
            w = found.hidden_weights.numpy()
            for step in (1e-9, -1e-9, 1e-5, -1e-5):
                moved = w + np.array([[step, 0.0]])
                losses = [np.sum((y.numpy() - outputs(v, np.ones(1), x.numpy(), 0.0)) ** 2) for v in (w, moved)]
                assert losses[1] >= losses[0] - 1e-14


def test_a_unit_that_would_move_makes_no_saddle_of_another():
    x = torch.tensor([[1, 0, 0], [1, 1, 0], [-1, 1, 0], [0, -1, 1], [0, -1, 2]], dtype=torch.float64)
    y = torch.tensor([-1.0, 3.5, -1.5, 1.0, -0.5], dtype=torch.float64)
    w = torch.tensor([[0.0, 1.0, 0.0], [0.125, 1.0, 2.0]], dtype=torch.float64)
    assert certify(w, torch.tensor([1.0, 0.0]).double(), x, y).kind == "not_stationary"


def test_the_force_on_a_resting_unit_counts_in_its_stationarity():
    assert of(planted_saddle(20, 3, 4)).stationarity > 1e-3


def test_activate_is_f():
    assert activate(np.array([-2.0, 3.0]), 0.5).tolist() == [-1.0, 3.0]


def enumerated_minima(inputs, targets, output, slope):
    """All differentiable minima over W with z fixed: the least-squares solutions that lie in their own regions."""
    draws = torch.randn(4000, inputs.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cells = torch.unique(draws @ inputs.mT > 0, dim=0)  # patterns of one unit; few enough to be all met
    for pattern in itertools.product(range(len(cells)), repeat=len(output)):
        active = cells[list(pattern)].mT  # (N, d1)
        slopes = torch.where(active, 1.0, slope).double()
        features = (slopes[:, :, None] * output[:, None] * inputs[:, None, :]).flatten(1)
        hidden = torch.linalg.lstsq(features, targets, driver="gelsd").solution.view(len(output), -1)
        u = inputs @ hidden.mT
        if bool(((u > 0) == active).all()) and float(u.abs().min()) > 1e-6:
            yield hidden


def mse_of(hidden, output, inputs, targets):
    return float(np.mean((outputs(*(t.numpy() for t in (hidden, output, inputs)), 0.1) - targets.numpy()) ** 2))


def test_with_fixed_output_weights_the_minima_are_the_same():
    """Of the loss over W alone: theory's condition on z follows from those on W where no z_i is zero."""
    found = 0
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        inputs = torch.randn(7, 2, generator=random, dtype=torch.float64)
        targets = torch.randn(7, generator=random, dtype=torch.float64)
        output = torch.tensor([1.3, -0.4], dtype=torch.float64)
        for hidden in enumerated_minima(inputs, targets, output, 0.1):
            proof = certify(hidden, output, inputs, targets, 0.1)
            assert proof.kind == "differentiable_minimum"
            assert torch.equal(proof.output_weights, output)
            assert proof.mse == pytest.approx(mse_of(hidden, output, inputs, targets), rel=1e-9)
            assert proof.mse == pytest.approx(mse_of(proof.hidden_weights, output, inputs, targets), rel=1e-9)
            found += 1
    assert found >= 3
