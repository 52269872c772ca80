import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_mnn.data import GaussianData, ResidentLoader, TensorData, exact_shard
from lightning_mnn.data.loaders.shards import flat_batch, num_samples


def loader(n, batch, world=1, rank=0, replicas=None, seed=0):
    lead = () if replicas is None else (replicas,)
    numbers = torch.arange(n).expand(*lead, n)
    seeds = [seed + r for r in range(replicas or 1)]
    return ResidentLoader(numbers[..., None].float(), numbers, batch, seeds=seeds, rank=rank, world_size=world)


shapes = {"n": st.integers(1, 40), "batch": st.none() | st.integers(1, 45), "world": st.integers(1, 5)}


@given(**shapes, epoch=st.integers(0, 3))
def test_each_sample_is_seen_once_whatever_the_number_of_processes(n, batch, world, epoch):
    alone = loader(n, batch)
    parts = [loader(n, batch, world, rank) for rank in range(world)]
    for each in (alone, *parts):
        each.sampler.set_epoch(epoch)
    assert {len(each) for each in parts} == {len(alone)}
    seen = []
    for whole, *shards in zip(alone, *parts, strict=True):
        joined = torch.cat([targets for _, targets in shards])
        assert torch.equal(joined, whole[1])  # the same samples in the same order
        assert torch.equal(torch.cat([inputs for inputs, _ in shards])[:, 0].long(), joined)
        seen += joined.tolist()
    assert sorted(seen) == list(range(n))


@given(**shapes, replicas=st.integers(2, 3))
def test_replicas_see_what_single_runs_see(n, batch, world, replicas):
    for rank in range(world):
        together = loader(n, batch, world, rank, replicas)
        singles = [loader(n, batch, world, rank, seed=r) for r in range(replicas)]
        for (inputs, targets), *others in zip(together, *singles, strict=True):
            for r, (x, y) in enumerate(others):
                assert torch.equal(targets[r], y)
                assert torch.equal(inputs[r], x)


def test_a_state_from_the_end_of_a_limited_epoch_begins_the_next_at_its_beginning():
    one, two, within = loader(10, 3), loader(10, 3), loader(10, 3)
    passing = iter(one)
    next(passing), next(passing)  # and no more: Trainer(limit_train_batches=2)
    for other, epoch in ((two, 1), (within, 0)):
        other.load_state_dict(one.state_dict())
        other.sampler.set_epoch(epoch)
    assert [len(list(other)) for other in (two, within)] == [4, 2]
    assert [len(list(other)) for other in (two, within)] == [4, 4]


def test_shared_inputs_with_several_seeds():
    shared = ResidentLoader(torch.arange(6.0)[:, None], torch.arange(6), 3, seeds=[0, 1])
    inputs, targets = next(iter(shared))
    assert inputs.shape == (2, 3, 1)
    assert torch.equal(inputs[..., 0].long(), targets)
    assert not torch.equal(targets[0], targets[1])


def test_orders_change_with_the_epoch_and_come_back():
    one = loader(50, 10)
    first = [y.tolist() for _, y in one]
    one.sampler.set_epoch(1)
    assert [y.tolist() for _, y in one] != first
    one.sampler.set_epoch(0)
    assert [y.tolist() for _, y in one] == first


@given(**shapes, stop=st.integers(1, 50))
def test_a_loader_goes_on_where_another_was(n, batch, world, stop):
    whole = [y.tolist() for _, y in loader(n, batch, world, world - 1)]
    cut, resumed = loader(n, batch, world, world - 1), loader(n, batch, world, world - 1)
    for index, _ in enumerate(cut):
        if index + 1 == min(stop, len(cut)):
            break
    resumed.load_state_dict(cut.state_dict())
    rest = [y.tolist() for _, y in resumed]
    assert rest == (whole[stop:] if stop < len(whole) else whole)
    assert [y.tolist() for _, y in resumed] == whole  # the next pass is a whole one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidentLoader(torch.ones(3, 2), torch.ones(4)), r"got \(3, 2\) and \(4,\)"),
        (lambda: ResidentLoader(torch.ones(0, 2), torch.ones(0)), "empty"),
        (lambda: ResidentLoader(torch.ones(3, 2), torch.ones(3), 0), "batch_size must be at least 1"),
        (lambda: ResidentLoader(torch.ones(2, 3, 2), torch.ones(3)), "inputs have 2 replicas, but there are 1 seeds"),
        (lambda: TensorData(torch.ones(3, 2), torch.ones(3), dtype="int8"), "dtype must be one of"),
        (lambda: TensorData(torch.ones(3, 2), torch.ones(3), replicas=0), "replicas must be at least 1"),
        (lambda: TensorData(torch.ones(3, 2), torch.ones(3), batch_size=-1), "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(n=st.integers(1, 30), world=st.integers(1, 5))
def test_exact_shards_hold_each_sample_once_in_order(n, world):
    dataset = TensorDataset(torch.arange(n)[:, None].float(), torch.arange(n))
    for source in (DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True), loader(n, 4)):
        assert num_samples(source) == n
        seen = [int(y) for rank in range(world) for _, targets in exact_shard(source, rank, world) for y in targets]
        assert seen == list(range(n))
        chosen = torch.arange(0, n, 2)
        seen = [y for rank in range(world) for _, t in exact_shard(source, rank, world, chosen) for y in t.tolist()]
        assert seen == chosen.tolist()


def test_blocks_of_resident_data_are_bounded(monkeypatch):
    monkeypatch.setattr("lightning_mnn.data.loaders.shards._BLOCK_ELEMENTS", 12)
    blocks = [x.shape for x, _ in exact_shard(ResidentLoader(torch.ones(2, 7, 3), torch.ones(2, 7), seeds=[0, 1]))]
    assert blocks == [(2, 2, 3)] * 3 + [(2, 1, 3)]


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.ones(2), torch.ones(())


def test_what_cannot_be_enumerated_is_refused():
    dataset = TensorDataset(torch.ones(4, 2), torch.ones(4))
    for source, message in (
        (DataLoader(Stream()), "IterableDataset cannot be enumerated"),
        (
            DataLoader(dataset, sampler=WeightedRandomSampler([0.5] * 4, 4)),
            r"which samples a WeightedRandomSampler chooses .*: wrap the chosen samples in a torch.utils.data.Subset",
        ),
        (DataLoader(dataset, batch_sampler=[[0, 2], [1]]), "which samples a list chooses"),
        (DataLoader(dataset, batch_size=None), "batch_size=None"),
        ([DataLoader(dataset), DataLoader(dataset)], "samples of a list cannot be enumerated"),
    ):
        with pytest.raises(TypeError, match=message):
            list(exact_shard(source))
    chosen = DataLoader(dataset, batch_sampler=BatchSampler(SubsetRandomSampler([2, 0]), 3, drop_last=False))
    assert [len(x) for x, _ in exact_shard(chosen)] == [2]
    assert num_samples(chosen) == 2
    with pytest.raises(TypeError, match="samples of a dict cannot be enumerated"):
        num_samples({"a": DataLoader(dataset)})


def test_flat_batches():
    inputs, targets = flat_batch([torch.ones(5, 1, 4, 4), torch.ones(5, 1)])
    assert (inputs.shape, targets.shape) == ((5, 16), (5,))
    inputs, targets = flat_batch((torch.ones(3, 5, 4), torch.ones(3, 5)), replicated=True)
    assert inputs.shape == (3, 5, 4)
    with pytest.raises(TypeError, match="pair of tensors"):
        flat_batch(torch.ones(3))


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_lightning_gives_each_epoch_its_order():
    class Watcher(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.seen.append((self.current_epoch, batch[0].flatten().tolist()))
            return self.weight * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = TensorData(torch.arange(10.0)[:, None], torch.zeros(10), batch_size=5)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    module = Watcher()
    pl.Trainer(max_epochs=2, enable_model_summary=False, log_every_n_steps=1, **options).fit(module, data)
    epochs = [[x for e, xs in module.seen if e == epoch for x in xs] for epoch in (0, 1)]
    expected = data.train_dataloader()
    for epoch, seen in enumerate(epochs):
        expected.sampler.set_epoch(epoch)
        assert seen == [x for inputs, _ in expected for x in inputs.flatten().tolist()]
    assert epochs[0] != epochs[1]


def test_a_restored_place_holds_for_one_loader_only():
    data = TensorData(torch.arange(10.0)[:, None], torch.zeros(10), batch_size=4)
    data.load_state_dict({"next_batch": 2})
    assert [len(targets) for _, targets in data.train_dataloader()] == [2]
    assert [len(targets) for _, targets in data.train_dataloader()] == [4, 4, 2]


def test_gaussian_data_of_a_replica_is_that_of_its_seed():
    for labels in ("plus_minus", "zero_one", "teacher"):
        inputs, targets = GaussianData(20, 3, labels=labels, replicas=3, seed=5).tensors()
        x, y = GaussianData(20, 3, labels=labels, seed=7).tensors()
        assert torch.equal(inputs[2], x)
        assert torch.equal(targets[2], y)


def test_gaussian_data_are_standard_and_balanced():
    x, y = GaussianData(20000, 5).tensors()
    assert x.mean(0).abs().max() < 0.04
    assert (x.T @ x / len(x) - torch.eye(5)).abs().max() < 0.05
    assert abs(y.mean()) < 0.03
    assert set(y.tolist()) == {-1.0, 1.0}
    assert abs(float(torch.corrcoef(torch.stack([x[:, 0], y]))[0, 1])) < 0.03  # labels do not know the inputs


def test_teacher_targets_have_a_zero_error_point():
    from lightning_mnn.landscape import Network, network_statistics
    from lightning_mnn.utilities.seeding import generator

    data = GaussianData(30, 4, labels="teacher", teacher_width=3, seed=2)
    x, y = data.tensors()
    draw = generator(2, "teacher")
    w = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    z = torch.randn(3, generator=draw, dtype=torch.float64) * (2 / 12) ** 0.5
    assert bool(network_statistics(Network((w,), z, 0.0), x, y).zero_error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1 and a whole number, got 0"),
        ({"num_samples": 1e3}, "num_samples must be at least 1 and a whole number, got 1000.0"),
        ({"labels": "spam"}, "labels must be one of"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_gaussian_data_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianData(**options).tensors()
