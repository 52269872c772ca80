import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import ActivationPattern, PackedPattern
from lightning_mnn.landscape.pattern import _pack_by_numpy, _pack_by_torch


@st.composite
def patterns(draw, count=1):
    """Patterns of one shape, with and without a replica axis."""
    shape = (*draw(st.sampled_from([(), (1,), (3,)])), draw(st.integers(1, 6)), draw(st.integers(1, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [ActivationPattern(torch.from_numpy(rng.random(shape) < 0.5)) for _ in range(count)]


@given(patterns())
def test_packing_is_undone(drawn):
    (pattern,) = drawn
    packed = pattern.pack()
    assert packed.bits.shape[-1] == -(-pattern.active.shape[-1] // 8)
    assert torch.equal(packed.unpack().active, pattern.active)
    assert torch.equal(_pack_by_numpy(pattern.active), _pack_by_torch(pattern.active))


@given(patterns(count=2))
def test_flips_and_digests_agree_with_loops(drawn):
    a, b = drawn
    flips = a.flips(b)
    for index in np.ndindex(*a.active.shape[:-2]):
        assert int(flips[index]) == sum(
            bool(p) != bool(q) for p, q in zip(a.active[index].flatten(), b.active[index].flatten(), strict=True)
        )
    digests_a, digests_b = a.digest(), b.digest()
    if isinstance(digests_a, str):
        assert (digests_a == digests_b) == bool(flips == 0)
    else:
        assert [p == q for p, q in zip(digests_a, digests_b, strict=True)] == (flips == 0).tolist()
        assert digests_a[0] == ActivationPattern(a.active[0]).digest()


def test_digest_tells_shapes_apart():
    assert ActivationPattern(torch.zeros(2, 8, dtype=torch.bool)).digest() != (
        ActivationPattern(torch.zeros(1, 16, dtype=torch.bool)).digest()
    )
    assert ActivationPattern(torch.zeros(1, 5, dtype=torch.bool)).digest() != (
        ActivationPattern(torch.zeros(1, 6, dtype=torch.bool)).digest()
    )


def test_slopes():
    pattern = ActivationPattern(torch.tensor([[True, False]]))
    assert pattern.slopes(-1.0).tolist() == [[1.0, -1.0]]
    assert pattern.slopes(0.1).tolist() == [[1.0, 0.1]]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="NaN"):
        ActivationPattern.from_preactivations(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="different shape"):
        ActivationPattern(torch.ones(1, 2, dtype=torch.bool)).flips(
            ActivationPattern(torch.ones(2, 2, dtype=torch.bool))
        )
    with pytest.raises(ValueError, match="bits must be uint8 with 2 bytes"):
        PackedPattern(torch.zeros(3, 1, dtype=torch.uint8), width=9)
