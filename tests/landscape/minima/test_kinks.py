import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lightning_mnn.landscape.minima.kink_multipliers import check_multipliers


def largest_gain(x, e, g, z, slope):
    """max over |v| ≤ 1 of z (g·v + Σ e_n f(x_n·v)), by one linear program a cell of the arrangement."""
    best = 0.0
    for signs in itertools.product((1.0, -1.0), repeat=len(x)):
        s = np.array(signs)
        linear = z * (g + (e * np.where(s > 0, 1.0, slope)) @ x)
        found = linprog(-linear, A_ub=-s[:, None] * x, b_ub=np.zeros(len(x)), bounds=[(-1, 1)] * x.shape[1])
        best = max(best, -found.fun)
    return best


def gain(x, e, g, z, slope, v):
    return z * (g @ v + sum(en * (t if t > 0 else slope * t) for en, t in zip(e, x @ v, strict=True)))


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_agrees_with_all_cells_of_the_arrangement(seed):
    rng = np.random.default_rng(seed)
    d0, count = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    slope, z = float(rng.choice([0.0, 0.1, -1.0, 2.0])), float(rng.choice([-1.5, 0.7]))
    x = rng.standard_normal((count, d0))
    if count > 2 and rng.random() < 0.3:
        x[1] = -2 * x[0]
    e = rng.standard_normal(count)
    if rng.random() < 0.6:  # mostly kinks that bend downwards, so that minima are met
        e = -np.sign(z * (1 - slope)) * np.abs(e)
    multipliers = z * e * (slope + (1 - slope) * rng.uniform(0.05, 0.95, count))
    g = -multipliers @ x / z + (rng.standard_normal(d0) if rng.random() < 0.4 else 0)
    verdict = check_multipliers(x, e, g, z, slope, 1e-13)
    best = largest_gain(x, e, g, z, slope)
    if verdict.holds is None:
        return
    assert verdict.holds == (best <= 1e-7)
    if verdict.step is not None:
        assert gain(x, e, g, z, slope, verdict.step) > 0


def test_three_kinks_that_a_linear_program_alone_gets_wrong():
    angles = np.deg2rad([0, 120, 240])
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    e = np.array([0.1, -1.0, -1.0])
    verdict = check_multipliers(x, e, np.array([-0.5, 0.0]), 1.0, 0.0, 1e-13)
    assert verdict.holds == (largest_gain(x, e, np.array([-0.5, 0.0]), 1.0, 0.0) <= 1e-9)
    assert verdict.holds is not None


@pytest.mark.parametrize("shift", [0.0, 1e-15])
def test_a_multiplier_at_its_end_is_not_decided(shift):
    verdict = check_multipliers(np.eye(2)[:1], np.array([-1.0]), np.array([1.0 + shift, 0.0]), 1.0, 0.0, 1e-13)
    assert verdict.holds is None
    assert verdict.ends == ((0, 1),)


def test_many_kinks_that_bend_upwards_are_left_undecided():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 2))
    e = np.full(30, 1e-3)
    verdict = check_multipliers(x, np.where(np.arange(30) < 12, e, -1.0), np.array([0.0, 0.0]), 1.0, 0.9, 1e-13)
    assert verdict.holds is not True
