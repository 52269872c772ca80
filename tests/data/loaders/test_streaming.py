import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mnn import MNN
from lightning_mnn.data import ExactData, ResidentLoader, StreamedLoader, TensorData, exact_shard
from lightning_mnn.data.loaders import rows as row_files
from lightning_mnn.data.loaders.rows import RowArray, RowFile, rows_of, written_rows
from lightning_mnn.data.loaders.streaming import BufferedShuffle, _Pass
from lightning_mnn.data.loaders.whitening import InputMap
from tests.children import PATIENCE, processes, side_by_side

DIM = 3


def images(n):
    """Rows of bytes that tell which row they are."""
    return np.stack([np.arange(n) % 251, np.arange(n) // 251, np.full(n, 7)], axis=1).astype(np.uint8)


def loader(n, batch, world=1, rank=0, *, buffer=20, chosen=None, **options):
    count = n if chosen is None else len(chosen)
    options = {"shuffle": True} | options
    return StreamedLoader(
        RowArray(images(n)),
        torch.arange(count),
        batch,
        chosen=chosen,
        buffer_bytes=4 * buffer * DIM,
        rank=rank,
        world_size=world,
        **options,
    )


sizes = {
    "n": st.integers(1, 60),
    "batch": st.none() | st.integers(1, 65),
    "world": st.integers(1, 4),
    "buffer": st.integers(1, 30),
}


@given(**sizes, epoch=st.integers(0, 3), shuffle=st.booleans())
def test_each_sample_is_seen_once_whatever_the_number_of_processes(n, batch, world, buffer, epoch, shuffle):
    alone = loader(n, batch, buffer=buffer, shuffle=shuffle)
    parts = [loader(n, batch, world, rank, buffer=buffer, shuffle=shuffle) for rank in range(world)]
    for each in (alone, *parts):
        each.sampler.set_epoch(epoch)
    assert {len(each) for each in parts} == {len(alone)}
    seen = []
    for whole, *shards in zip(alone, *parts, strict=True):
        joined = torch.cat([targets for _, targets in shards])
        assert torch.equal(joined, whole[1])  # the same samples in the same order
        assert torch.equal(torch.cat([inputs for inputs, _ in shards]), torch.from_numpy(images(n))[joined])
        seen += joined.tolist()
    assert sorted(seen) == list(range(n))
    if not shuffle:
        assert seen == list(range(n))
    elif alone.num_steps > 1:
        assert seen == alone.sampler.permutation().tolist()


@given(**sizes, reuse=st.booleans(), shuffle=st.booleans())
def test_batches_are_as_large_as_those_of_resident_data(n, batch, world, buffer, reuse, shuffle):
    streamed = loader(n, batch, world, world - 1, buffer=buffer, shuffle=shuffle)
    resident = ResidentLoader(
        torch.from_numpy(images(n)), torch.arange(n), batch, rank=world - 1, world_size=world, shuffle=shuffle
    )
    assert streamed.num_steps == resident.num_steps
    batches = streamed.batches(0, streamed.num_steps, reuse=reuse)
    for (inputs, targets), (x, y) in zip(batches, resident, strict=True):
        assert (inputs.shape, targets.shape) == (x.shape, y.shape)
        if not shuffle:
            assert torch.equal(inputs, x)
            assert torch.equal(targets, y)


@given(**sizes, stop=st.integers(1, 66))
def test_a_loader_goes_on_where_another_was(n, batch, world, buffer, stop):
    whole = [y.tolist() for _, y in loader(n, batch, world, world - 1, buffer=buffer)]
    cut, resumed = (loader(n, batch, world, world - 1, buffer=buffer) for _ in range(2))
    for index, _ in enumerate(cut):
        if index + 1 == min(stop, len(cut)):
            break
    resumed.load_state_dict(cut.state_dict())
    rest = list(resumed)
    assert [y.tolist() for _, y in rest] == (whole[stop:] if stop < len(whole) else whole)
    assert all(torch.equal(x, torch.from_numpy(images(n))[y]) for x, y in rest)
    assert [y.tolist() for _, y in resumed] == whole  # the next pass is a whole one
    assert [y.tolist() for _, y in cut] == whole  # and so is one after a pass that was left


@given(**sizes, bundle=st.integers(2, 7))
def test_bundles_hold_the_same_batches(n, batch, world, buffer, bundle):
    one, bundled = (loader(n, batch, world, 0, buffer=buffer) for _ in range(2))
    bundled.steps_per_batch = bundle
    assert [y.tolist() for part in bundled for _, y in part] == [y.tolist() for _, y in one]


@given(n=st.integers(1, 60), world=st.integers(1, 4), picked=st.lists(st.integers(0, 59), max_size=9))
def test_exact_shards_hold_each_sample_once_in_order(n, world, picked):
    source = loader(n, 4)
    running = iter(source)
    next(running)  # a pass in the middle of an epoch
    seen = [int(y) for rank in range(world) for _, targets in exact_shard(source, rank, world) for y in targets]
    assert seen == list(range(n))
    chosen = torch.tensor([p % n for p in picked], dtype=torch.int64)
    inputs, targets = source.samples(chosen)
    assert torch.equal(targets, chosen)
    assert torch.equal(inputs, torch.from_numpy(images(n))[chosen])
    rest = [y.tolist() for _, y in running]
    assert rest == [y.tolist() for _, y in loader(n, 4)][1:]


@given(n=st.integers(2, 60), batch=st.integers(1, 9), data=st.data())
def test_chosen_rows_alone_are_read(n, batch, data):
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    for inputs, targets in loader(n, batch, chosen=chosen):
        assert torch.equal(inputs, torch.from_numpy(images(n)[chosen])[targets])


def test_orders_change_with_the_epoch_and_come_back():
    one = loader(200, 10)
    first = [y.tolist() for _, y in one]
    one.sampler.set_epoch(1)
    assert [y.tolist() for _, y in one] != first
    one.sampler.set_epoch(0)
    assert [y.tolist() for _, y in one] == first
    assert [y.tolist() for _, y in loader(200, 10, seeds=[1])] != first


def test_a_buffer_mixes_chunks_from_everywhere():
    order = BufferedShuffle(100_000, [0], chunk=100, buffer=5000).permutation()
    first = order[:5000]
    assert len((first // 100).unique()) == 50
    assert first.float().std() > 20_000
    assert float(torch.corrcoef(torch.stack([first[1:], first[:-1]]).float())[0, 1]) < 0.1


def test_several_orders_are_refused_and_one_is_shared():
    with pytest.raises(ValueError, match=r"3 replicas would each have their own: set shuffle=False"):
        loader(10, 4, seeds=[0, 1, 2])
    assert len(list(loader(10, 4, seeds=[0, 1, 2], shuffle=False))) == 3
    assert len(list(loader(10, None, seeds=[0, 1, 2]))) == 1
    with pytest.raises(ValueError, match=r"10 rows of inputs, but targets of shape \(9,\)"):
        StreamedLoader(RowArray(images(10)), torch.ones(9), 2)
    with pytest.raises(ValueError, match="buffer_bytes must be at least 1"):
        loader(10, 2, buffer=0)


def test_maps_of_files_are_read_without_the_map(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, (50, 8), dtype=np.uint8)
    (tmp_path / "rows").write_bytes(b"head!" + content.tobytes())
    mapped = np.memmap(tmp_path / "rows", np.uint8, "r", offset=5, shape=(50, 8))
    for array, expected in ((mapped, content), (mapped[10:], content[10:]), (mapped[::2], content[::2])):
        rows, numbers = rows_of(array), np.array([0, 1, 2, 5, 7, 7, 9, 10])
        assert isinstance(rows, RowFile) == (array.strides == (8, 1))
        out = torch.empty(8, 8, dtype=torch.uint8)
        rows.read(numbers, out)
        assert (out.numpy() == expected[numbers]).all()
    assert isinstance(rows_of(content), RowArray)
    with (tmp_path / "rows").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(OSError, match=r"rows ends before its 50 rows of 8 bytes"):
        list(StreamedLoader(rows_of(mapped), torch.ones(50), 10))


def test_half_precision_rows_come_back(tmp_path):
    wanted = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows = written_rows(tmp_path / "x.rows", (40, 6), torch.bfloat16, lambda low, high: wanted[low:high])
    for inputs, targets in StreamedLoader(rows, torch.arange(40), 7):
        assert inputs.dtype == torch.bfloat16
        assert torch.equal(inputs, wanted[targets])


class StreamedData(ExactData):
    """A training set that is streamed as it is."""

    def __init__(self, rows, targets, mapping, **options):
        super().__init__(**options)
        self.source = rows, targets, mapping

    @property
    def input_dim(self):
        return self.source[0].shape[1]

    def loader(self, device, **options):
        rows, targets, mapping = self.source
        return StreamedLoader(rows, targets, mapping=mapping, device=device, buffer_bytes=600, **options)


@pytest.mark.parametrize("bundled", [True, False])
def test_training_on_a_stream_is_training_on_resident_data(make_trainer, tmp_path, bundled):
    draw = torch.Generator().manual_seed(0)
    content = torch.randint(0, 256, (90, 12), generator=draw, dtype=torch.uint8)
    (tmp_path / "rows").write_bytes(content.numpy().tobytes())
    rows = rows_of(np.memmap(tmp_path / "rows", np.uint8, "r", shape=(90, 12)))
    mapping = InputMap(torch.rand(12, generator=draw) * 255, torch.randn(12, 12, generator=draw), 0.01)
    targets = torch.randint(0, 2, (90,), generator=draw).float()
    inputs = mapping.apply(content, torch.empty(90, 12))
    weights = []
    for data in (
        StreamedData(rows, targets, mapping, batch_size=20, shuffle=False),
        TensorData(inputs, targets, batch_size=20, shuffle=False),
    ):
        model = MNN(12, (7,), dtype="float32")
        trainer = make_trainer(max_epochs=6, gradient_clip_val=None if bundled else 1e9)
        trainer.fit(model, data)
        assert model.automatic_optimization != bundled
        weights.append([w.detach() for w in model.parameters()])
    for streamed, resident in zip(*weights, strict=True):
        assert torch.equal(streamed, resident)


def blocks(low, high):
    return (torch.arange(low, high)[:, None] * 256 + torch.arange(256)).to(torch.float32)


def write_and_be_killed(path):
    row_files._BLOCK_BYTES = 1 << 18

    def some_blocks(low, high):
        if low >= 1024:
            os.kill(os.getpid(), signal.SIGKILL)
        return blocks(low, high)

    written_rows(path, (2000, 256), torch.float32, some_blocks)


@pytest.mark.slow
def test_written_rows_go_on_after_a_kill(tmp_path, monkeypatch):
    """A program that writes rows is killed with -9 in the middle; the next one does the rest, to the same bytes."""
    monkeypatch.setattr("lightning_mnn.data.loaders.rows._BLOCK_BYTES", 1 << 18)
    shape = (2000, 256)
    written_rows(tmp_path / "whole", shape, torch.float32, blocks)
    path = tmp_path / "killed"
    process = processes.Process(target=write_and_be_killed, args=(path,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -9
    assert not path.exists()
    with (tmp_path / "killed.part").open("r+b") as file:
        file.seek(600 * 1024)
        file.write(b"wrong")  # as after a power cut
    asked = []

    def watched(low, high):
        asked.append(low)
        return blocks(low, high)

    rows = written_rows(path, shape, torch.float32, watched)
    assert asked[0] == 512  # the blocks before the wrong one are kept
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert written_rows(path, shape, torch.float32, pytest.fail).path == rows.path


def test_a_file_is_written_by_one_at_a_time(tmp_path):
    started, go_on, asked = threading.Event(), threading.Event(), []

    def slow(low, high):
        started.set()
        assert go_on.wait(PATIENCE)
        return blocks(low, high)

    def watched(low, high):
        asked.append(low)
        return blocks(low, high)

    def write(block_of):
        return written_rows(tmp_path / "x.rows", (300, 256), torch.float32, block_of).path.read_bytes()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(write, slow)
        assert started.wait(PATIENCE)
        second = threads.submit(write, watched)
        time.sleep(0.2)  # in which it would ask, if it did not wait
        waited = not second.done() and not asked
        go_on.set()
        assert first.result(PATIENCE) == second.result(PATIENCE)
    assert waited
    assert asked == []


def test_a_closed_pass_reads_no_more():
    started, read = threading.Event(), []

    def slow(samples, out):
        started.set()
        time.sleep(0.2)
        read.append(len(samples))
        return torch.arange(len(samples))

    sampler = BufferedShuffle(10, [0], chunk=2, buffer=5)
    current = _Pass(sampler, np.arange(10), [0, 5, 10], slow, [torch.empty(5, DIM) for _ in range(2)])
    assert started.wait(PATIENCE)
    current.close()
    assert read == [5]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_the_order_does_not_depend_on_what_rows_are_stored_in(dtype):
    streamed = StreamedLoader(RowArray(images(60).astype(dtype)), torch.arange(60), 7, buffer_bytes=20 * DIM * 4)
    assert [y.tolist() for _, y in streamed] == [y.tolist() for _, y in loader(60, 7)]


def test_damaged_rows_and_full_disks_are_named(tmp_path, monkeypatch):
    rows = written_rows(tmp_path / "x.rows", (300, 256), torch.float32, blocks)
    with rows.path.open("r+b") as file:
        file.write(b"wrong")
    with pytest.raises(OSError, match=r"x\.rows is damaged: its size or a checksum is wrong. Delete it"):
        written_rows(rows.path, (300, 256), torch.float32, blocks)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"needs 0\.0 GB for the mapped inputs and has 0\.0 GB left: choose a cache"):
        written_rows(tmp_path / "y.rows", (300, 256), torch.float32, blocks)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def stream_and_print_memory(path):
    sparse = rows_of(np.memmap(path, np.uint8, "r", shape=(1 << 18, 1 << 12)))
    mapping = InputMap(torch.zeros(1 << 12), None, 1.0)
    streamed = StreamedLoader(sparse, torch.zeros(1 << 18), 256, mapping=mapping, buffer_bytes=1 << 26)
    next(iter(streamed))
    before = peak()
    assert sum(len(targets) for _, targets in streamed) == 1 << 18
    print(before, peak())


@pytest.mark.slow
def test_memory_is_bounded_by_the_buffers(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    side_by_side(tmp_path, 1, stream_and_print_memory, tmp_path / "sparse")
    before, after = map(int, (tmp_path / "rank_0" / "out.txt").read_text().split())
    assert after - before < 2 * 16 + 50  # MiB: two buffers, and some batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu():
    mapping = InputMap(torch.rand(DIM) * 255, None, 0.01)
    here = StreamedLoader(RowArray(images(5000)), torch.arange(5000), 64, mapping=mapping, buffer_bytes=2100)
    there = StreamedLoader(
        RowArray(images(5000)),
        torch.arange(5000),
        64,
        mapping=mapping.to("cuda", torch.float32),
        device="cuda",
        buffer_bytes=2100,
    )
    for (x, y), (u, v) in zip(here, there, strict=True):
        assert u.device.type == v.device.type == "cuda"
        assert torch.equal(u.cpu(), x)
        assert torch.equal(v.cpu(), y)
    index = torch.tensor([7, 3, 4999], device="cuda")
    assert torch.equal(there.samples(index)[0].cpu(), here.samples(index.cpu())[0])
