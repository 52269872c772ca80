import dataclasses
import json
import os
import re
import resource

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.data.loaders.whitening import (
    InputMap,
    Moments,
    input_map,
    moments,
    moments_of_group,
    whitening_matrix,
)
from lightning_mnn.utilities.distributed import DistributedGroup
from tests.children import side_by_side


def correlated(seed, count, dim):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim))


def parts_of(x, cuts):
    return list(torch.tensor_split(x, sorted(cut % (len(x) + 1) for cut in cuts)))


cuts = st.lists(st.integers(0, 1000), max_size=5)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 60), dim=st.integers(1, 6), cuts=cuts)
def test_moments_are_numpys_however_the_samples_are_cut(seed, count, dim, cuts):
    x = correlated(seed, count, dim)
    found = moments(parts_of(x, cuts), dim)
    assert found.count == count
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x.T, bias=True).reshape(dim, dim), rtol=1e-11, atol=1e-12)
    plain = moments(parts_of(x, cuts), dim, products=False)
    np.testing.assert_allclose(plain.covariance, found.covariance.diagonal(), rtol=1e-11, atol=1e-13)


@given(seed=st.integers(0, 2**31), cuts=cuts)
def test_a_large_mean_costs_no_digits_of_a_tiny_variance(seed, cuts):
    deviations = torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, (40, 3)) / 1024)  # exact beside 10⁸
    exact = np.cov(deviations.T, bias=True)
    found = moments(parts_of(deviations + 1e8, cuts), 3)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-6, atol=1e-6 * exact.max())
    uncentred = (deviations + 1e8).T @ (deviations + 1e8) / 40 - 1e16
    assert (uncentred - torch.from_numpy(exact)).abs().max() > 0.1  # what the obvious sums would give


def test_blocks_may_be_bytes_and_are_left_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (30, 5), dtype=np.uint8)
    for dtype in (torch.uint8, torch.float32, torch.float64):
        block = torch.from_numpy(images.copy()).to(dtype)
        found = moments([block[:7], block[7:7], block[7:]], 5)
        np.testing.assert_allclose(found.covariance, np.cov(images.T, bias=True), rtol=1e-12)
        assert (block.numpy() == images).all()


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0.001, 2))
def test_the_whitening_is_the_inverse_root_of_the_floored_covariance(seed, dim, floor):
    covariance = np.cov(correlated(seed, 50, dim).T, bias=True).reshape(dim, dim)
    values, vectors = np.linalg.eigh(covariance + floor * covariance.trace() / dim * np.eye(dim))
    expected = vectors @ np.diag(values**-0.5) @ vectors.T
    np.testing.assert_allclose(
        whitening_matrix(torch.from_numpy(covariance), floor), expected, rtol=1e-8, atol=1e-10 * expected.max()
    )


@given(seed=st.integers(0, 2**31), dim=st.integers(1, 6), floor=st.none() | st.sampled_from([0.0, 0.1]))
def test_mapped_samples_have_mean_0_and_mean_variance_1(seed, dim, floor):
    x = correlated(seed, 600, dim)
    mapped = input_map(moments([x], dim), floor).apply(x, torch.empty_like(x))
    covariance = np.cov(mapped.T, bias=True).reshape(dim, dim)
    assert mapped.mean(0).abs().max() < 1e-6
    assert covariance.trace() / dim == pytest.approx(1, rel=1e-6)
    if floor == 0:
        np.testing.assert_allclose(covariance, np.eye(dim), atol=1e-5)


def test_the_floor_keeps_small_directions_small():
    x = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3], [1.0, -1e-3], [-1.0, -1e-3]], dtype=torch.float64)
    expected = [(1 + 0.1 * (1 + 1e-6) / 2) ** -0.5, (1e-6 + 0.1 * (1 + 1e-6) / 2) ** -0.5]
    assert whitening_matrix(moments([x], 2).covariance, 0.1).diagonal().tolist() == pytest.approx(expected)


@given(seed=st.integers(0, 2**31), picked=st.lists(st.integers(0, 599), min_size=1, max_size=300), white=st.booleans())
def test_a_row_has_one_image_whatever_stands_beside_it(seed, picked, white):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (600, 20), generator=draw, dtype=torch.uint8)
    matrix = torch.randn(20, 20, generator=draw) if white else None
    mapping = InputMap(torch.rand(20, generator=draw) * 255, matrix, 0.7)
    whole = mapping.apply(rows, torch.empty(600, 20))
    assert torch.equal(mapping.apply(rows[picked], torch.empty(len(picked), 20)), whole[picked])


def test_bad_input_is_named():
    flat = torch.tensor([[1.0, 0.1], [-1.0, 0.1]])
    for floor in (-1.0, float("inf"), float("nan"), True, "much"):
        with pytest.raises(ValueError, match=r"whiten must be a finite number .* got"):
            input_map(moments([flat], 2), floor)
    with pytest.raises(ValueError, match="all 7 samples are the same"):
        input_map(moments([torch.full((3, 2), 0.1), torch.full((4, 2), 0.1)], 2, products=False), None)


@given(seed=st.integers(0, 2**31), dim=st.integers(3, 12), floor=st.sampled_from([0.0, 1e-17]))
def test_the_floor_that_is_asked_for_will_do_and_half_of_it_will_not(seed, dim, floor):
    found = moments([correlated(seed, dim - 1, dim)], dim).covariance
    with pytest.raises(ValueError, match=f"whiten must be at least .* got {floor}: the inputs have no variance") as e:
        whitening_matrix(found, floor)
    least = float(re.search(r"at least (\S+),", str(e.value))[1])
    assert whitening_matrix(found, least).isfinite().all()
    with pytest.raises(ValueError, match="no variance"):
        whitening_matrix(found, least / 2)


def test_the_covariance_is_left_as_it_is():
    covariance = moments([correlated(0, 9, 3)], 3).covariance
    before = covariance.clone()
    whitening_matrix(covariance, 0.1)
    assert torch.equal(covariance, before)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_memory():
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
    before = peak()
    found = Moments(10, torch.ones(1536, dtype=torch.float64), torch.rand(1536, 1536, dtype=torch.float64))
    input_map(found, 0.3)
    print((peak() - before) / found.scatter.nbytes)


def test_whitening_takes_the_memory_of_four_matrices(tmp_path):
    side_by_side(tmp_path, 1, print_memory)
    assert 2 < float((tmp_path / "rank_0" / "out.txt").read_text()) < 4


def print_moments(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    own = [x[:20], x[20:]][rank]
    found = [moments_of_group(moments([own], 4, products=p), DistributedGroup(len(own))) for p in (True, False)]
    print(json.dumps([[f.count, f.mean.tolist(), f.scatter.tolist()] for f in found]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    side_by_side(tmp_path, 2, print_moments, tmp_path)
    answers = [(tmp_path / f"rank_{rank}" / "out.txt").read_text() for rank in range(2)]
    assert len(set(answers)) == 1  # to the last bit
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    for products, (count, mean, scatter) in zip((True, False), json.loads(answers[0]), strict=True):
        alone = moments([x], 4, products=products)
        assert count == 50
        np.testing.assert_allclose(mean, alone.mean, rtol=1e-13)
        np.testing.assert_allclose(scatter, alone.scatter, rtol=1e-11, atol=1e-11)


@given(st.integers(1, 600), st.sampled_from([None, 0.0, 0.3]), st.integers(0, 9))
def test_equal_norms_are_those_of_the_mapped_rows(count, floor, seed):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(max(count, 8), 5, generator=draw, dtype=torch.float64) * 3 + 1
    mapping = input_map(moments([rows], 5), floor)
    rows = rows[:count]
    plain = mapping.apply(rows, torch.empty_like(rows))
    equal = dataclasses.replace(mapping, equal_norms=True).apply(rows, torch.empty_like(rows))
    torch.testing.assert_close(equal, plain * (5**0.5 / plain.norm(dim=1, keepdim=True)), rtol=1e-12, atol=1e-12)


def test_a_row_that_is_the_mean_has_no_norm_to_bring_it_to():
    mapping = InputMap(torch.ones(3), None, 2.0, equal_norms=True)
    found = mapping.apply(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 3.0]]), torch.empty(2, 3))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0**0.5]]))
