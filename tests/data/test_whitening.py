import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.data.whitening import whitening_matrix


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_whitened_inputs_have_identity_covariance(seed, dim):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(20 * dim, dim, generator=rng, dtype=torch.float64) @ torch.randn(
        dim, dim, generator=rng, dtype=torch.float64
    )
    white = x @ whitening_matrix(x, 1e-12)
    values = torch.linalg.eigvalsh(white.T @ white / len(x))
    assert float(values.max()) <= 1 + 1e-6
    if float(torch.linalg.cond(x)) < 1e4:
        torch.testing.assert_close(white.T @ white / len(x), torch.eye(dim, dtype=torch.float64), atol=1e-3, rtol=0)


def test_floor_keeps_small_directions_small_and_blocks_do_not_matter(monkeypatch):
    x = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3], [1.0, -1e-3], [-1.0, -1e-3]])
    expected = [(1 + 0.1 * (1 + 1e-6) / 2) ** -0.5, (1e-6 + 0.1 * (1 + 1e-6) / 2) ** -0.5]
    found = whitening_matrix(x, 0.1)
    assert found.diagonal().tolist() == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("lightning_mnn.data.whitening._BLOCK", 3)
    torch.testing.assert_close(whitening_matrix(x, 0.1), found)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="floor must not be negative"):
        whitening_matrix(torch.ones(2, 2), -1.0)
    with pytest.raises(ValueError, match="whiten with a floor > 0"):
        whitening_matrix(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.0)
