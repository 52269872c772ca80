import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lightning_mnn.landscape import ActivationPattern, Region
from lightning_mnn.landscape.regions import existence as module
from lightning_mnn.landscape.regions import gordan
from lightning_mnn.landscape.regions.existence import check_proof, find_minimum

# The slow, obvious answer: a linear program for each of the 3^d1 sign vectors.


def some_cone_is_empty(x, active):
    some = (x != 0).any(1)
    x, active = x[some], active[some]
    for side in np.where(active, 1, -1).T:
        rows = side[:, None] * x / np.linalg.norm(x, axis=1)[:, None]
        result = linprog(
            [0] * x.shape[1] + [-1],
            np.column_stack([-rows, np.ones(len(x))]),
            np.zeros(len(x)),
            bounds=[(-1, 1)] * x.shape[1] + [(None, 1)],
        )
        if -result.fun < 1e-6:
            return True
    return False


def largest_margin(x, active, slope, y, signs):
    """t* of one sign vector, −∞ where no flat weights have its zeros."""
    (n, d0), d1 = x.shape, active.shape[1]
    g = np.array([[(1 if active[k, i] else slope) * x[k] for i in range(d1)] for k in range(n)]).reshape(n, -1).T
    rows = []
    for k, i in itertools.product(range(n), range(d1)):
        if signs[i] and x[k].any():
            row = np.zeros(d0 * d1 + 1)
            row[i * d0 : (i + 1) * d0] = -signs[i] * (1 if active[k, i] else -1) * x[k] / np.linalg.norm(x[k])
            row[-1] = 1
            rows.append(row)
    result = linprog(
        [0] * (d0 * d1) + [-1],
        np.array(rows) if rows else None,
        np.zeros(len(rows)) if rows else None,
        np.column_stack([g @ g.T, np.zeros(d0 * d1)]),
        g @ y,
        bounds=[(None, None) if signs[i] else (0, 0) for i in range(d1) for _ in range(d0)] + [(None, 1)],
        options={"primal_feasibility_tolerance": 1e-9},
    )
    return -result.fun if result.success else -math.inf


def brute_force(x, active, slope, y, choices=(1, -1, 0)):
    return any(
        largest_margin(x, active, slope, y, signs) > 1e-6
        for signs in itertools.product(choices, repeat=active.shape[1])
    )


def loss(x, y, slope, hidden, output):
    u = x @ hidden.T
    return np.mean((y - np.where(u > 0, u, slope * u) @ output) ** 2)


def check(region, y, found):
    """What is found is what it is said to be: no step lowers the loss at the point, or the proof holds."""
    if not found.exists:
        assert found.exists is False, found.reason
        assert found.hidden_weights is None
        assert check_proof(region, y, found)
        return
    x, targets, slope = region.inputs.numpy(), y.double().numpy(), region.negative_slope
    hidden, output = found.hidden_weights.numpy(), found.output_weights.numpy()
    u, some = x @ hidden.T, (x != 0).any(1)
    np.testing.assert_array_equal(u[some] > 0, region.pattern.active.numpy()[some])
    np.testing.assert_allclose(loss(x, targets, slope, hidden, output), found.mse, rtol=1e-7, atol=1e-14)
    flat = hidden * output[:, None]
    live = np.abs(flat[output != 0] @ (x[some] / np.linalg.norm(x[some], axis=1)[:, None]).T)
    assert found.margin == pytest.approx(live.min(initial=np.linalg.norm(flat) or 1) / (np.linalg.norm(flat) or 1))
    radius = (np.abs(u[some]) / np.linalg.norm(x[some], axis=1)[:, None]).min(initial=1)
    rng, best = np.random.default_rng(0), loss(x, targets, slope, hidden, output)
    for scale in (1e-4, 1e-2, 0.9):
        for _ in range(5):
            step, change = rng.standard_normal(hidden.shape), rng.standard_normal(output.shape)
            moved = hidden + scale * radius * step / np.linalg.norm(step)
            assert loss(x, targets, slope, moved, output + scale * change) >= best - 1e-9 * np.mean(targets**2)


# All regions at d0 = 2, by the angles where the samples change sides.


def planar_cells(x):
    """Angular volume and activity (N,) of each of the 2N cells of directions in the plane."""
    edges = np.sort(np.concatenate([np.arctan2(-x[:, 0], x[:, 1]), np.arctan2(x[:, 0], -x[:, 1])]))
    arcs = np.diff(np.append(edges, edges[0] + 2 * np.pi))
    middles = edges + arcs / 2
    return arcs / (2 * np.pi), (x @ np.array([np.cos(middles), np.sin(middles)])).T > 0


def planar_regions(x, width):
    """Volume and pattern of each region of a net, up to permutations of its units."""
    volumes, cells = planar_cells(x)
    for chosen in itertools.combinations_with_replacement(range(len(cells)), width):
        counts = math.prod(math.factorial(chosen.count(cell)) for cell in set(chosen))
        yield math.factorial(width) // counts * volumes[list(chosen)].prod(), cells[list(chosen)].T


def sweep(num_samples, width, slope, low, every=1):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, num_samples)).T, rng.integers(0, 2, num_samples) * (1.0 - low) + low
    total, answers = 0.0, []
    for index, (volume, active) in enumerate(planar_regions(x, width)):
        total += volume
        if index % every == 0:
            region, targets = Region(torch.from_numpy(x), ActivationPattern(torch.from_numpy(active)), slope), y
            found = find_minimum(region, torch.from_numpy(targets), threshold=(1 + low) / 2)
            assert found.exists is brute_force(x, active, slope, y), (index, found.reason)
            check(region, torch.from_numpy(y), found)
            answers.append(found.exists)
    assert total == pytest.approx(1)
    return answers


@pytest.mark.parametrize("low", [0, -1])
@pytest.mark.parametrize("slope", [0, 0.1])
@pytest.mark.parametrize(("num_samples", "width", "every"), [(1, 2, 1), (3, 2, 1), (4, 2, 2), (6, 1, 1), (6, 3, 37)])
def test_agrees_with_brute_force_on_planar_regions(num_samples, width, every, slope, low):
    sweep(num_samples, width, slope, low, every)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("low", [0, -1])
@pytest.mark.parametrize("slope", [0, 0.1])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_agrees_with_brute_force_on_every_planar_region(width, slope, low):
    most = {1: 8, 2: 6, 3: 4}[width]  # up to 8 at each width they agree as well, and take minutes
    answers = [answer for num_samples in range(1, most + 1) for answer in sweep(num_samples, width, slope, low)]
    assert {True, False} == set(answers)


def test_volumes_of_the_plane_are_those_of_exact_enumeration():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 4)).T, torch.from_numpy(rng.integers(0, 2, 4))
    volumes = dict.fromkeys(("global", "any", "global without zeros", "any without zeros"), 0.0)
    for volume, active in planar_regions(x, 2):
        region = Region(torch.from_numpy(x), ActivationPattern(torch.from_numpy(active)))
        free = find_minimum(region, y)
        some = any(find_minimum(region, y, signs).exists for signs in itertools.product((1, -1), repeat=2))
        assert free.zero_error == (np.abs(region.residual(y).numpy()).max() < 1e-9)
        volumes["any"] += volume * free.exists
        volumes["global"] += volume * (free.exists and free.zero_error)
        volumes["any without zeros"] += volume * some
        volumes["global without zeros"] += volume * (some and free.zero_error)
    assert round(volumes["global"], 4) == 0.1818
    assert round(volumes["global without zeros"], 4) == 0.0091
    assert round(volumes["any"], 3) == 0.466
    assert round(volumes["any without zeros"], 3) == 0.195


@st.composite
def problems(draw):
    """Small regions with every degeneracy: repeated and zero samples, equal and dead units, empty cones, exact ties."""
    n, d0, d1 = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.integers(-1, 2, (n, d0)).astype(float) if draw(st.booleans()) else rng.standard_normal((n, d0))
    if n > 1 and draw(st.booleans()):
        x[1] = x[0] * draw(st.sampled_from([0, 1, 3]))
    active = x @ rng.standard_normal((d0, d1)) > 0 if draw(st.integers(0, 3)) else rng.random((n, d1)) < 0.5
    if draw(st.booleans()):
        active[:, -1] = draw(st.sampled_from([False, True]))
    if d1 > 1 and draw(st.booleans()):
        active[:, 1] = active[:, 0]
    y = draw(st.sampled_from([rng.integers(0, 2, n), rng.choice([-1, 1], n), np.zeros(n), rng.standard_normal(n)]))
    return x, active, draw(st.sampled_from([0, 0.1, 0.5, -1, -0.3])), y.astype(float)


@settings(max_examples=150)
@given(problems(), st.sampled_from([None, 1, -1, 0]))
def test_agrees_with_brute_force_on_degenerate_regions(problem, sign):
    x, active, slope, y = problem
    region = Region(torch.from_numpy(x), ActivationPattern(torch.from_numpy(active)), slope)
    targets = torch.from_numpy(y)
    signs = None if sign is None else np.array([sign, -1, 1])[: active.shape[1]]
    found = find_minimum(region, targets, signs, threshold=0.0)
    expected = not some_cone_is_empty(x, active) and (
        brute_force(x, active, slope, y) if sign is None else largest_margin(x, active, slope, y, signs) > 1e-6
    )
    assert found.exists is expected, found.reason
    check(region, targets, found)
    if found.exists and sign is not None:
        np.testing.assert_array_equal(np.sign(found.output_weights.numpy()), signs)
    assert found.mse == pytest.approx(float(region.residual(targets).square().mean()), abs=1e-12)


def random_region(seed, num_samples=12, dim=3, width=6, slope=0.0):
    rng = np.random.default_rng(seed)
    x, w = (
        torch.from_numpy(rng.standard_normal((num_samples, dim))),
        torch.from_numpy(rng.standard_normal((dim, width))),
    )
    y = torch.from_numpy(rng.choice([-1.0, 1.0], num_samples))
    return Region(x, ActivationPattern.from_preactivations(x @ w), slope), y


def test_larger_regions_have_a_point_or_a_proof():
    answers = []
    for seed in range(30):
        region, y = random_region(seed)
        found = find_minimum(region, y)
        check(region, y, found)
        assert found.exists is not None
        answers.append(found.exists)
    assert {True, False} == set(answers)


def hide(name, value):
    def replaced(*args, **options):
        if value is None:
            raise RuntimeError("no convergence")
        return np.full(args[0].shape[1], value), 0.0

    return lambda monkeypatch: monkeypatch.setattr(gordan, name, replaced)


@pytest.mark.parametrize("value", [None, 0.0, 1.0], ids=["no answer", "zero", "a wrong answer"])
def test_linear_programs_take_over_where_least_squares_fails(monkeypatch, value):
    cases = [random_region(seed, num_samples=7, dim=2, width=4) for seed in range(12)]
    expected = [find_minimum(region, y).exists for region, y in cases]
    assert {True, False} == set(expected)
    hide("nnls", value)(monkeypatch)
    for (region, y), exists in zip(cases, expected, strict=True):
        found = find_minimum(region, y)
        assert found.exists is exists, found.reason
        check(region, y, found)


def test_units_of_measure_do_not_matter():
    for seed in range(10):
        region, y = random_region(seed, num_samples=8, dim=2, width=3)
        one = find_minimum(region, y)
        for of_inputs, of_targets in ((1.0, 1e-200), (1e-200, 1.0), (1e250, 1e200), (1e-200, 1e-200)):
            scaled, targets = Region(region.inputs * of_inputs, region.pattern), y * of_targets
            other = find_minimum(scaled, targets, threshold=0.0)
            assert (other.exists, other.zero_error, other.mce) == (one.exists, one.zero_error, one.mce)
            assert other.exists or check_proof(scaled, targets, other)
    for seed in range(10):
        region, y = random_region(seed)
        scaled = Region(region.inputs * 1e6, region.pattern)
        one, other = find_minimum(region, y), find_minimum(scaled, 1e-5 * y)
        assert one.exists is other.exists
        check(scaled, 1e-5 * y, other)
        assert other.margin == (None if one.margin is None else pytest.approx(one.margin, rel=1e-5))


def absent():
    region, y = next((region, y) for region, y in map(random_region, range(99)) if not find_minimum(region, y).exists)
    return region, y, find_minimum(region, y)


def test_a_proof_of_absence_says_which_margins_it_speaks_of():
    _, _, found = absent()
    assert found.excluded_margin == 2e-9
    assert "a margin above 2e-09" in found.reason
    region, y = next((region, y) for region, y in map(random_region, range(99)) if find_minimum(region, y).exists)
    assert find_minimum(region, y).excluded_margin is None


def tampered_branches(branch):
    row = next(i for i, sign in enumerate(branch.signs) if sign in (1, -1) and branch.multipliers[:, i].any())
    signs = list(branch.signs)
    yield dataclasses.replace(branch, signs=(*signs[:row], -signs[row], *signs[row + 1 :]))
    yield dataclasses.replace(branch, signs=(*signs[:row], None, *signs[row + 1 :]))
    yield dataclasses.replace(branch, multipliers=-branch.multipliers)
    yield dataclasses.replace(branch, multipliers=0 * branch.multipliers)
    yield dataclasses.replace(branch, multipliers=branch.multipliers + 1e-6)
    yield dataclasses.replace(branch, multipliers=branch.multipliers * torch.nan)
    yield dataclasses.replace(branch, multipliers=branch.multipliers[1:])
    yield dataclasses.replace(branch, functional=-branch.functional)
    yield dataclasses.replace(branch, functional=branch.functional + 1e-6)
    yield dataclasses.replace(branch, signs=branch.signs[1:])
    yield dataclasses.replace(branch, signs=(None,) * len(branch.signs))


def test_a_tampered_proof_fails():
    region, y, found = absent()
    assert check_proof(region, y, found)
    first, *others = found.proof
    for forged in tampered_branches(first):
        assert not check_proof(region, y, dataclasses.replace(found, proof=(forged, *others)))
    for missing in found.proof:
        rest = tuple(branch for branch in found.proof if branch is not missing)
        needed = 0 not in missing.signs  # zeros may be covered by other branches too
        assert not (needed and check_proof(region, y, dataclasses.replace(found, proof=rest)))
    assert not check_proof(region, torch.roll(y, 1), found)
    assert not check_proof(region, y, dataclasses.replace(found, exists=None))
    signs = first.signs
    asked = dataclasses.replace(
        found, output_signs=tuple(1 if sign is None else sign for sign in signs), proof=(first,)
    )
    assert check_proof(region, y, asked)
    assert not check_proof(region, y, dataclasses.replace(asked, output_signs=tuple(-s for s in asked.output_signs)))


def test_a_proof_of_the_empty_region_fails_where_it_is_not_empty():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    empty = Region(x, ActivationPattern(torch.tensor([[True, True], [True, False], [True, True]])))
    y = torch.tensor([1.0, 0.0, 1.0])
    found = find_minimum(empty, y)
    assert (found.exists, found.reason) == (False, "the region is empty: no weights of unit 1 have its pattern")
    assert check_proof(empty, y, found)
    filled = Region(x, ActivationPattern(torch.ones(3, 2, dtype=torch.bool)))
    assert not check_proof(filled, y, found)


def test_one_unit_with_all_samples_is_a_linear_model():
    x, everywhere = torch.tensor([[1.0, 0.1], [1.0, -0.2], [2.0, 0.0]]), torch.ones(3, 1, dtype=torch.bool)
    region = Region(x, ActivationPattern(everywhere))
    y = torch.tensor([1.0, 0.0, 1.0])
    fit = np.linalg.lstsq(x.numpy(), y.numpy())[0]
    assert len(set(np.sign(x.numpy() @ fit))) == 2
    found = find_minimum(region, y)
    assert found.exists is False
    assert found.mse == pytest.approx(np.mean((y.numpy() - x.numpy() @ fit) ** 2))
    positive = find_minimum(region, y + 1)
    assert positive.exists
    np.testing.assert_allclose(
        (positive.output_weights @ positive.hidden_weights).numpy(), fit + np.linalg.lstsq(x.numpy(), np.ones(3))[0]
    )


def test_a_dead_unit_changes_nothing():
    region, y, _ = absent()
    active = torch.cat([region.pattern.active, torch.zeros(len(y), 1, dtype=torch.bool)], 1)
    x = torch.cat([region.inputs.abs(), region.inputs[:, :2] * 0], 1)
    x[:, :3] = region.inputs
    x[:, 3] = 3 * region.inputs.norm(dim=1)  # gives the dead unit a cone
    lifted = Region(x, ActivationPattern(active))
    found = find_minimum(lifted, y)
    assert found.exists is find_minimum(Region(x, region.pattern), y).exists
    check(lifted, y, found)
    found = find_minimum(Region(x, ActivationPattern(torch.zeros(len(y), 2, dtype=torch.bool))), y, [1, -1])
    assert (found.exists, found.mse, found.mce) == (True, 1.0, 1.0)
    assert found.output_weights.sign().tolist() == [1, -1]


def test_errors_are_those_of_the_fit():
    region, y = random_region(3, width=2)
    residual = region.residual(y).numpy()
    found = find_minimum(region, y)
    assert found.mse == pytest.approx((residual**2).mean())
    assert found.mce == ((y.numpy() - residual) * y.numpy() <= 1e-12).mean()
    assert find_minimum(region, y, threshold=2.0).mce == ((y.numpy() - residual - 2) * (y.numpy() - 2) <= 1e-12).mean()
    assert find_minimum(region, y * 3).mce is None


def test_one_verdict_a_replica():
    regions, targets = zip(*(random_region(seed) for seed in range(4)), strict=True)
    inputs = torch.stack([region.inputs for region in regions])
    active = torch.stack([region.pattern.active for region in regions])
    alone = [find_minimum(*pair) for pair in zip(regions, targets, strict=True)]
    together = find_minimum(Region(inputs, ActivationPattern(active)), torch.stack(targets))
    for found, one in zip(together, alone, strict=True):
        assert found.exists is one.exists
        assert found.mse == pytest.approx(one.mse, rel=1e-9, abs=1e-15)
        assert found.margin == (None if one.margin is None else pytest.approx(one.margin, rel=1e-6))
    shared = find_minimum(
        Region(inputs[0], ActivationPattern(active[:1].expand(2, -1, -1))), targets[0], torch.ones(2, 6)
    )
    assert [found.output_signs for found in shared] == [(1,) * 6] * 2


def test_what_cannot_be_decided_is_said():
    region, y, _ = absent()
    found = find_minimum(region, y, max_nodes=2)
    assert (found.exists, found.reason) == (None, "undecided: more than 2 branches")
    assert not check_proof(region, y, found)
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-12]], dtype=torch.float64)
    found = find_minimum(Region(x, ActivationPattern(torch.ones(2, 1, dtype=torch.bool))), torch.tensor([1.0, -1.0]))
    assert found.exists is None
    assert "rank is in doubt" in found.reason


def test_regions_too_large_for_dense_matrices_still_have_their_errors(monkeypatch):
    region, y = random_region(0)
    monkeypatch.setattr(module, "_MAX_INEQUALITY_ENTRIES", 100)
    found = find_minimum(region, y)
    assert found.exists is None
    assert "too large, N·d0·d1² = 1296 is above 100" in found.reason
    assert found.mse == pytest.approx(float(region.residual(y).square().mean()))


def test_inputs_whose_part_rounding_would_lose_are_left_undecided():
    x = torch.tensor([[1.0, 0.0], [1e-17, 1e-17]], dtype=torch.float64)
    found = find_minimum(Region(x, ActivationPattern(torch.ones(2, 1, dtype=torch.bool))), torch.tensor([1.0, -1.0]))
    assert (found.exists, "an input is 1.4e-17 times as long as the longest" in found.reason) == (None, True)


def test_labels_that_fit_two_thresholds_are_found_before_the_work(monkeypatch):
    region, y = random_region(0)
    monkeypatch.setattr(module, "_Model", None)
    with pytest.raises(ValueError, match="all targets are 1"):
        find_minimum(region, y.abs())


def test_bad_input_is_named():
    region, y = random_region(0)
    with pytest.raises(ValueError, match=r"targets must have shape \(\.\.\., 12\), got \(11,\)"):
        find_minimum(region, y[1:])
    with pytest.raises(ValueError, match="targets must be finite, got nan"):
        find_minimum(region, y * torch.nan)
    with pytest.raises(ValueError, match=r"output_signs must have shape \(\.\.\., 6\), got \(2,\)"):
        find_minimum(region, y, [1, -1])
    with pytest.raises(ValueError, match="output_signs must be finite, got nan"):
        find_minimum(region, y, [1, -1, 0, 0, 0, math.nan])
    with pytest.raises(ValueError, match="inputs must be finite, got inf"):
        find_minimum(Region(region.inputs / 0, region.pattern), y)
    with pytest.raises(ValueError, match="all targets are 1"):
        find_minimum(region, y.abs())
