import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import ActivationPattern, Region
from lightning_mnn.landscape.regions.region import gram_rank, khatri_rao


@st.composite
def regions(draw):
    """Random regions, some with repeated samples or units that make them rank-deficient."""
    n, d0, d1 = draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    count = draw(st.sampled_from([None, 2]))
    lead = () if count is None else (count,)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs = rng.standard_normal((*lead, n, d0))
    active = rng.random((*lead, n, d1)) < 0.5
    if n > 1 and draw(st.booleans()):
        inputs[..., 1, :], active[..., 1, :] = 2 * inputs[..., 0, :], active[..., 0, :]
    if d1 > 1 and draw(st.booleans()):
        active[..., 1] = active[..., 0]
    return Region(
        torch.from_numpy(inputs), ActivationPattern(torch.from_numpy(active)), draw(st.sampled_from([0, 0.1, -1]))
    )


def dense(region, r=None):
    """The matrix of Gᵀ, (N, d1·d0), by loops over samples and units."""
    inputs = region.inputs if r is None else region.inputs[r]
    active = region.pattern.active if r is None else region.pattern.active[r]
    rows = []
    for x, bits in zip(inputs.numpy(), active.numpy(), strict=True):
        rows.append(np.concatenate([(1.0 if bit else region.negative_slope) * x for bit in bits]))
    return np.array(rows)


def cases(region):
    return [None] if region.inputs.ndim == 2 else range(region.inputs.shape[0])


@given(regions(), st.integers(0, 2**32 - 1))
def test_products_agree_with_the_dense_matrix(region, seed):
    rng = np.random.default_rng(seed)
    d1, d0 = region.pattern.active.shape[-1], region.inputs.shape[-1]
    flat = torch.from_numpy(rng.standard_normal((*region.inputs.shape[:-2], d1, d0)))
    residual = torch.from_numpy(rng.standard_normal(region.inputs.shape[:-1]))
    for r in cases(region):
        matrix = dense(region, r)
        pick = (lambda value: value) if r is None else (lambda value, r=r: value[r])
        np.testing.assert_allclose(pick(region.predict(flat)), matrix @ pick(flat).numpy().ravel(), atol=1e-12)
        np.testing.assert_allclose(
            pick(region.correlate(residual)).ravel(), matrix.T @ pick(residual).numpy(), atol=1e-12
        )
        np.testing.assert_allclose(pick(region.gram()), matrix @ matrix.T, atol=1e-12)
        np.testing.assert_allclose(pick(khatri_rao(region.slopes, region.inputs)), matrix, atol=0)


@given(regions(), st.integers(0, 2**32 - 1))
def test_rank_and_residual_agree_with_numpy(region, seed):
    targets = torch.from_numpy(np.random.default_rng(seed).standard_normal(region.inputs.shape[:-1]))
    ranks, residuals = region.rank(), region.residual(targets)
    for r in cases(region):
        matrix, y = dense(region, r), targets.numpy() if r is None else targets[r].numpy()
        assert (ranks if r is None else ranks[r]) == np.linalg.matrix_rank(matrix)
        fit = np.linalg.lstsq(matrix, y, rcond=None)[0]
        np.testing.assert_allclose(residuals if r is None else residuals[r], y - matrix @ fit, atol=1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_gram_rank_agrees_with_numpy(rows, columns, zeros, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-6, 7, columns)  # badly scaled columns
    matrix[:, : min(zeros, columns)] = 0
    normalised = matrix / np.where((norms := np.linalg.norm(matrix, axis=0)) > 0, norms, 1)
    assert int(gram_rank(torch.from_numpy(matrix.T @ matrix))) == np.linalg.matrix_rank(normalised, tol=1e-7)


def test_bad_input_is_named():
    pattern = ActivationPattern(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="negative_slope must not be 1"):
        Region(torch.ones(3, 2), pattern, 1.0)
    with pytest.raises(ValueError, match="inputs have 4 samples and the pattern 3"):
        Region(torch.ones(4, 2), pattern)
