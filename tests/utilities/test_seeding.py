import pytest
import torch

from lightning_mnn.utilities.seeding import generator


def draw(*arguments):
    return torch.randn(2000, generator=generator(*arguments), dtype=torch.float64)


def test_streams_repeat_and_are_independent_of_each_other():
    streams = [draw(0, "inputs"), draw(0, "weights"), draw(1, "inputs"), draw(0, "shuffle", 0), draw(0, "shuffle", 1)]
    assert torch.equal(streams[0], draw(0, "inputs"))
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(5)
    assert correlations.abs().max() < 5 / 2000**0.5


def test_values_are_the_same_on_every_machine():
    assert torch.randint(0, 10**6, (3,), generator=generator(7, "labels")).tolist() == [885397, 139940, 533541]


def test_negative_seeds_are_named():
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        generator(-1, "inputs")
