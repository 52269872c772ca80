import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.regions import rank as module
from lightning_mnn.landscape.regions.rank import khatri_rao_rank

DEFECTS = (
    "repeated samples", "nearly repeated samples", "repeated units", "dead units", "unactivated samples",
    "low-rank inputs", "scaled samples", "scaled inputs",
)  # fmt: skip


def dense(inputs, slopes):
    return (slopes[:, :, None] * inputs[:, None, :]).reshape(len(inputs), -1)


def rank(inputs, slopes):
    return khatri_rao_rank(torch.from_numpy(inputs), torch.from_numpy(slopes))


def agrees_with_numpy(inputs, slopes):
    """False where a singular value is so close to the threshold that rounding may decide."""
    matrix = dense(inputs, slopes)
    values = np.linalg.svd(matrix, compute_uv=False)
    threshold = values.max() * max(matrix.shape) * np.finfo(float).eps
    if ((values > threshold / 10) & (values < threshold * 10)).any():
        return False
    assert rank(inputs, slopes) == np.linalg.matrix_rank(matrix)
    return True


def random_region(rng, num_samples, input_dim, width, defects, negative_slope):
    inputs = rng.standard_normal((num_samples, input_dim))
    if "low-rank inputs" in defects:
        low = rng.integers(0, input_dim + 1)
        inputs = rng.standard_normal((num_samples, low)) @ rng.standard_normal((low, input_dim))
    if rng.random() < 0.5:
        active = inputs @ rng.standard_normal((input_dim, width)) > 0
    else:
        active = rng.random((num_samples, width)) < 0.5
    source, target = rng.integers(0, num_samples, (2, 1 + num_samples // 3))
    if "repeated samples" in defects:
        inputs[target], active[target] = inputs[source] * rng.choice([1, 3], (len(source), 1)), active[source]
    if "nearly repeated samples" in defects:
        distance = rng.choice([1e-5, 1e-7, 1e-9, 1e-11], (len(source), 1))
        inputs[target] = inputs[source] + distance * rng.standard_normal((len(source), input_dim))
        active[target] = active[source]
    if "repeated units" in defects:
        active[:, rng.integers(0, width, 3)] = active[:, rng.integers(0, width, 3)]
    if "dead units" in defects:
        active[:, rng.integers(0, width, 2)] = False
    if "unactivated samples" in defects:
        active[rng.integers(0, num_samples, 5)] = False
    if "scaled samples" in defects:
        inputs *= 10.0 ** rng.uniform(-3, 3, (num_samples, 1))
    if "scaled inputs" in defects:
        inputs *= 10.0 ** rng.uniform(-6, 6, input_dim)
    return inputs, np.where(active, 1.0, negative_slope)


def test_random_regions_agree_with_numpy():
    rng, clear = np.random.default_rng(0), 0
    for _ in range(1000):
        shape = rng.integers(1, 61), rng.integers(1, 9), rng.integers(1, 9)
        defects = rng.choice(DEFECTS, rng.integers(0, 4), replace=False)
        clear += agrees_with_numpy(*random_region(rng, *shape, defects, rng.choice([0.0, 0.1, -1.0])))
    assert clear > 900


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6)),
    st.sets(st.sampled_from(DEFECTS)),
    st.sampled_from([0.0, 0.1, -1.0]),
    st.integers(0, 2**32 - 1),
)
def test_any_defects_agree_with_numpy(shape, defects, negative_slope, seed):
    rng = np.random.default_rng(seed)
    agrees_with_numpy(*random_region(rng, *shape, defects, negative_slope))


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize(
    ("num_samples", "input_dim", "width"), [(300, 30, 20), (400, 12, 10), (60, 80, 1), (200, 30, 2)]
)
def test_graded_spectra_agree_with_numpy(num_samples, input_dim, width, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_COLUMNS", chunk)
    rng, clear = np.random.default_rng(0), 0
    for smallest in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-16):
        count = min(num_samples, input_dim)
        left = np.linalg.qr(rng.standard_normal((num_samples, count)))[0]
        right = np.linalg.qr(rng.standard_normal((input_dim, count)))[0]
        inputs = left * np.where(np.arange(count) < count // 2, 1, smallest) @ right.T
        for slopes in (np.ones((num_samples, width)), (rng.random((num_samples, width)) < 0.5) * 1.0):
            clear += agrees_with_numpy(inputs, slopes)
            clear += agrees_with_numpy(inputs * 10.0 ** rng.uniform(-4, 0, (num_samples, 1)), slopes)
    assert clear >= 16


@pytest.mark.parametrize("smallest", [1e-5, 1e-7, 1e-9, 1e-11])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_planted_small_singular_values_count(smallest, shape):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((size, 40)))[0] for size in shape)
    values = np.repeat([1.0, smallest, 0.0], [20, 12, 8])
    assert rank(left * values @ right.T, np.ones((shape[0], 1))) == 32


def test_eigenvectors_may_take_the_place_of_rows(monkeypatch):
    monkeypatch.setattr(tolerances, "MAX_PIVOT_PER_EIGENVALUE", 0)
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = rng.integers(1, 61), rng.integers(1, 9), rng.integers(1, 9)
        agrees_with_numpy(*random_region(rng, *shape, rng.choice(DEFECTS, 2, replace=False), 0.0))


@pytest.mark.parametrize("cosine", [0.15, 0.2])
def test_pivots_that_hide_a_small_singular_value(cosine):
    """Kahan's matrix: the last pivot is far larger than the last singular value, which is zero in double precision."""
    size = 300
    scale = np.sqrt(1 - cosine**2) ** np.arange(size) * (1 - 5e-12 * np.arange(size))  # keeps the pivots' order
    inputs = (scale[:, None] * (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))).T.copy()
    assert np.linalg.matrix_rank(inputs) == size - 1
    assert rank(inputs, np.ones((size, 1))) == size - 1


def test_degenerate_regions():
    assert rank(np.zeros((5, 3)), np.ones((5, 2))) == 0
    assert rank(np.ones((5, 3)), np.zeros((5, 2))) == 0
    assert rank(np.ones((1, 1)), np.ones((1, 1))) == 1
    assert rank(np.ones((1, 4)), np.ones((1, 3))) == 1
    assert rank(np.ones((7, 1)), np.ones((7, 3))) == 1
    assert rank(np.array([[1.0], [2.0], [0.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])) == 2


def test_neither_scale_nor_gradients_matter():
    rng = np.random.default_rng(0)
    inputs, slopes = random_region(rng, 30, 4, 8, ["repeated samples"], 0.1)
    expected = rank(inputs, slopes)
    for scale in (1e-300, 1e-170, 1e170, 1e300):
        assert rank(inputs * scale, slopes) == expected
    assert khatri_rao_rank(torch.from_numpy(inputs).requires_grad_(), torch.from_numpy(slopes)) == expected


@pytest.mark.parametrize(("num_samples", "input_dim", "width"), [(10, 5, 9), (10, 17, 3), (50, 3, 4)])
def test_the_matrix_is_only_seen_in_chunks(num_samples, input_dim, width, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_COLUMNS", 8)
    rng = np.random.default_rng(0)
    inputs, slopes = rng.standard_normal((num_samples, input_dim)), rng.standard_normal((num_samples, width))
    chunks = [chunk.numpy() for chunk in module._chunks(torch.from_numpy(inputs), torch.from_numpy(slopes))]
    assert max(chunk.shape[1] for chunk in chunks) <= 8
    matrix, found = dense(inputs, slopes), np.concatenate(chunks, 1)
    matrix = matrix if num_samples <= input_dim * width else matrix.T
    np.testing.assert_allclose(found @ found.T, matrix @ matrix.T, atol=1e-12)
    assert found.shape == matrix.shape


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match=r"inputs must be finite, got (inf|nan)"):
        rank(np.array([[1.0], [bad]]), np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"slopes must be finite, got (inf|nan)"):
        rank(np.ones((2, 1)), np.array([[bad], [1.0]]))
