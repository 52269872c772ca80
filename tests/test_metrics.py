import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn.landscape.labels import check_labels
from lightning_mnn.metrics import MeanClassificationError

floats = st.floats(-3, 3, allow_nan=False)


@given(st.lists(st.tuples(floats, st.booleans()), min_size=1, max_size=30), st.booleans(), st.integers(1, 5))
def test_agrees_with_a_loop_in_any_batches(samples, signed, batch):
    low, threshold = (-1.0, 0.0) if signed else (0.0, 0.5)
    preds = torch.tensor([p for p, _ in samples], dtype=torch.float64)
    target = torch.tensor([1.0 if one else low for _, one in samples], dtype=torch.float64)
    metric = MeanClassificationError(threshold)
    for p, y in zip(preds.split(batch), target.split(batch), strict=True):
        metric.update(p, y)
    mistakes = 0
    for p, y in zip(preds.tolist(), target.tolist(), strict=True):
        mistakes += (p - threshold) * (y - threshold) <= 1e-12
    assert float(metric.compute()) == pytest.approx(mistakes / len(samples), abs=1e-6)


def test_on_the_threshold_is_an_error():
    assert float(MeanClassificationError(0.5)(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))) == 1.0
    assert float(MeanClassificationError(0.0)(torch.tensor([0.0]), torch.tensor([-1.0]))) == 1.0


def test_undefined_predictions_are_errors():
    assert float(MeanClassificationError()(torch.tensor([float("nan")] * 2), torch.tensor([1.0, 0.0]))) == 1.0


def test_replicas_count_alike_and_reset_clears():
    metric = MeanClassificationError()
    metric.update(torch.tensor([[0.9, 0.1], [0.9, 0.9]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert float(metric.compute()) == 0.25
    metric.reset()
    assert int(metric.total) == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="must have the same shape"):
        MeanClassificationError()(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"labels are not binary: threshold=0\.5 expects 0 and 1, found 2"):
        MeanClassificationError()(torch.ones(2), torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match="expects -1 and 1"):
        check_labels(torch.tensor([0.0]), 0.0)
    with pytest.raises(ValueError, match="either side of 3"):
        check_labels(torch.tensor([3.0]), 3.0)
