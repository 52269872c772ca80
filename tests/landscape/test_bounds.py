import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import bounds

sizes = {"n": st.integers(2, 10**6), "d0": st.integers(2, 20000), "d1": st.integers(1, 5000)}


@given(**sizes, epsilon=st.floats(0, 1), slope=st.sampled_from([0.0, 0.1, -1.0]))
def test_theorems_agree_with_plain_arithmetic(n, d0, d1, epsilon, slope):
    base = epsilon if slope == 0 else max(d0 / n, epsilon)
    gamma = 0.23 * math.exp(0.75 * math.log(base)) if base else 0.0
    volume = -gamma * math.sqrt(math.sqrt(n**3)) * math.sqrt(math.sqrt(d0 * d1))
    assert float(bounds.decay_rate(n, d0, d1, epsilon, slope)) == pytest.approx(gamma, rel=1e-9)
    assert float(bounds.suboptimal_log_volume(n, d0, d1, epsilon, slope)) == pytest.approx(volume, rel=1e-9)
    assert float(bounds.log_volume_ratio(n, d0, d1, epsilon, slope)) == pytest.approx(volume, rel=1e-9)
    assert int(bounds.sufficient_width(n, d0)) == 4 * -(-n // (2 * d0 - 2))
    assert float(bounds.global_log_volume(n, d0, d1)) == pytest.approx(-2 * n * math.log(n), rel=1e-9)
    assert float(bounds.global_log_volume(n, d0, d1, 7)) == pytest.approx(-7 * d0 * math.log(n), rel=1e-9)
    delta = math.sqrt(8 / (math.pi * d0)) + 2 * math.sqrt(d0 * math.log(d0)) / n
    assert float(bounds.global_failure_probability(n, d0)) == pytest.approx(delta, rel=1e-9)


@given(n=st.integers(1, 300), d0=st.integers(1, 60))
def test_cells_are_counted_in_whole_numbers(n, d0):
    exact = 2 * sum(math.comb(n - 1, k) for k in range(d0))
    assert float(bounds.log_num_cells(n, d0)) == pytest.approx(math.log(exact), rel=1e-12)


def test_arguments_broadcast():
    assert bounds.log_num_cells(np.array([[8], [12]]), np.array([3, 4, 400])).shape == (2, 3)
    assert bounds.suboptimal_log_volume(np.array([[100], [200]]), np.array([10, 20, 30]), 5).shape == (2, 3)
    assert bounds.sufficient_width([320, 640], 40).tolist() == [20, 36]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.decay_rate(0, 1, 1), "num_samples must be at least 1"),
        (lambda: bounds.decay_rate(10, 1, -1), "width must be at least 1"),
        (lambda: bounds.decay_rate(10, 1, 1, epsilon=1.5), "epsilon must lie between 0 and 1"),
        (lambda: bounds.decay_rate(10, 1, 1, negative_slope=1), "negative_slope must not be 1"),
        (lambda: bounds.log_num_cells(0, 3), "num_samples must be at least 1"),
        (lambda: bounds.sufficient_width(10, 1), "input_dim must be at least 2"),
        (lambda: bounds.global_log_volume(float("nan"), 1, 1), "num_samples must be at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
