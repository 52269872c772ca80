import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape import ActivationPattern, PackedPattern
from lightning_mnn.landscape.pattern import PiecePattern, _pack_by_numpy, _pack_by_torch, distinct_patterns


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


@st.composite
def piece_patterns(draw, count=1):
    """Patterns of one shape and number of pieces, with few different rows."""
    shape = (*draw(st.sampled_from([(), (2,)])), draw(st.integers(1, 6)), draw(st.integers(1, 20)))
    num_pieces = draw(st.sampled_from([2, 3, 4, 9, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = rng.choice(num_pieces, size=min(2, num_pieces), replace=False)
    return [PiecePattern(torch.from_numpy(rng.choice(used, size=shape)), num_pieces) for _ in range(count)]


@given(piece_patterns(count=2))
def test_pieces_are_packed_by_digits(drawn):
    a, b = drawn
    packed, other = a.pack(), b.pack()
    assert torch.equal(packed.unpack_pieces().pieces, a.pieces)
    digits = 1
    while 2**digits < a.num_pieces:
        digits += 1
    lead, (samples, width) = a.pieces.shape[:-2], a.pieces.shape[-2:]
    assert packed.bits.shape == (*lead, *([digits] if digits > 1 else []), samples, -(-width // 8))
    assert torch.equal(packed.flips(other), (a.pieces != b.pieces).sum((-2, -1)))
    same = (a.pieces == b.pieces).all((-2, -1))
    found, others = ([p.digest()] if isinstance(p.digest(), str) else p.digest() for p in (packed, other))
    assert [x == y for x, y in zip(found, others, strict=True)] == same.reshape(-1).tolist()


@given(piece_patterns(), st.data())
def test_activity_agrees_with_loops(drawn, data):
    (pattern,) = drawn
    top = pattern.num_pieces - 1
    active_pieces = data.draw(st.sampled_from([(1,), (0,), (top,), (0, top)]))
    found = pattern.pack().activity(active_pieces)
    for index in np.ndindex(*pattern.pieces.shape[:-2]):
        units, samples = pattern.pieces[index].T.tolist(), pattern.pieces[index].tolist()
        assert int(found.never_active[index]) == sum(not set(unit) & set(active_pieces) for unit in units)
        assert int(found.always_active[index]) == sum(
            len(set(unit)) == 1 and unit[0] in active_pieces for unit in units
        )
        assert found.unactivated[index].tolist() == [not set(sample) & set(active_pieces) for sample in samples]


@given(piece_patterns(), st.data())
def test_distinct_patterns_agree_with_a_set_of_rows(drawn, data):
    (pattern,) = drawn
    width = pattern.pieces.shape[-1]
    split = data.draw(st.integers(0, width - 1))
    parts = [pattern.pieces[..., :split], pattern.pieces[..., split:]][split == 0 :]
    found = distinct_patterns([PiecePattern(part, pattern.num_pieces).pack() for part in parts])
    for index in np.ndindex(*pattern.pieces.shape[:-2]):
        assert int(found[index]) == len({tuple(row) for row in pattern.pieces[index].tolist()})


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
    pieces = PiecePattern(torch.zeros(3, 9, dtype=torch.int64), num_pieces=3).pack()
    with pytest.raises(ValueError, match="3 pieces has more states than active"):
        pieces.unpack()
    with pytest.raises(ValueError, match="bits must have 4 digits before the samples for num_pieces=9"):
        PackedPattern(pieces.bits, width=9, num_pieces=9)
