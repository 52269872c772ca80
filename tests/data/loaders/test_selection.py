"""Labels that are changed for training: how many, which, and never those of the test set."""

import pytest
import torch

from lightning_mnn.data import GaussianData
from lightning_mnn.utilities.validation import ArgumentError


def ready(**options):
    data = GaussianData(50, 3, num_test=40, **options)
    data.setup()
    return data


@pytest.mark.parametrize("labels", ["plus_minus", "zero_one"])
@pytest.mark.parametrize(("noise", "count"), [(0.0, 0), (0.1, 5), (0.33, 16), (1.0, 50)])
def test_exactly_this_fraction_of_the_training_labels_is_flipped(labels, noise, count):
    clean, noisy = ready(labels=labels), ready(labels=labels, label_noise=noise)
    assert int((clean.targets != noisy.targets).sum()) == count
    assert set(noisy.targets.tolist()) == set(clean.targets.tolist())
    assert torch.equal(clean.inputs, noisy.inputs)
    assert torch.equal(clean.test_targets, noisy.test_targets)


@pytest.mark.parametrize("change", [{"label_noise": 0.2}, {"random_labels": True}])
def test_each_replica_has_the_labels_of_its_seed(change):
    together = ready(replicas=3, seed=7, **change)
    for r in range(3):
        assert torch.equal(together.targets[r], ready(seed=7 + r, **change).targets)
    assert not torch.equal(ready(seed=7, **change).targets, ready(seed=7).targets)


def test_random_labels_do_not_depend_on_the_true_ones():
    agree = (ready(random_labels=True).targets == ready().targets).double().mean()
    assert 0.2 < float(agree) < 0.8


@pytest.mark.parametrize("change", [{"label_noise": 0.2}, {"random_labels": True}])
def test_real_targets_are_refused(change):
    (name,) = change
    with pytest.raises(ArgumentError, match=f"{name} needs targets with two labels, and they have 50 different values"):
        ready(labels="teacher", **change)


def test_the_test_set_follows_the_same_law_and_does_not_depend_on_the_training_set():
    few, many = (GaussianData(n, 3, labels="teacher", num_test=20, replicas=2) for n in (5, 500))
    assert torch.equal(few.test_tensors()[0], many.test_tensors()[0])
    assert torch.equal(few.test_tensors()[1], many.test_tensors()[1])
    same = GaussianData(5, 3, labels="teacher", replicas=2)
    inputs, targets = few.test_tensors()
    for r in range(2):  # the same teacher
        torch.testing.assert_close(targets[r], same._teacher_outputs(inputs[r], same.seeds[r]))
    assert not set(inputs[0, :, 0].tolist()) & set(many.tensors()[0][0, :, 0].tolist())
