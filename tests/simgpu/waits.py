"""How often the host waits for a device: never within a loop over steps, samples, particles or layers.

Each count is taken at two lengths of a loop, and what is between them is what an iteration adds.
"""

from importlib import import_module

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 (as everybody calls it)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
)
from lightning_mnn.data import GaussianData, StreamedLoader
from lightning_mnn.data.loaders.rows import RowArray
from lightning_mnn.landscape import (
    KinkTrace,
    LossSurface,
    Network,
    certify,
    extreme_eigenvalues,
    kink_distance,
    local_volume,
    log_cone_measure,
    network_statistics,
    planted_kink_minimum,
    planted_minimum,
    polish,
    rare_event,
)


@pytest.fixture(autouse=True)
def _waits_are_seen():
    if not hasattr(torch.cuda, "_is_simulated"):
        pytest.skip("waits of a real GPU are not seen")


def waits_of(call, *arguments):
    """How often the host waited in a call.

    Of copies from pinned memory an event tells that they are over, two batches later; and batches that others hand over
    in pageable memory are copied by the strategy, as in any training.
    """
    simcuda = import_module("simcuda")
    with simcuda.waits() as seen:
        call(*arguments)
    print(simcuda.told(seen))  # for who reads a failure
    assert seen.launches
    return sum(n for (_, kind, line), n in seen.items() if _is_waited_for(kind, line))


def _is_waited_for(kind, line):
    return "not awaited" not in kind and kind != "event" and not (kind == "to device" and _is_of_a_batch(line))


def _is_of_a_batch(line):
    return "batch_to_device" in line or "apply_func.py" in line


def each(call, few, many):
    """The waits that each further iteration of a loop adds."""
    return (waits_of(call, many) - waits_of(call, few)) / (many - few)


# Training


class Looks(pl.Callback):
    """Looks at batches, so that there are no bundles of them."""

    def on_train_batch_end(self, trainer, *_):
        pass


@pytest.fixture
def train(make_trainer):
    def train(epochs, callbacks=(), model=None, data=None, batch_size=None, log=10_000, **options):
        adam = {"optimizer": {"name": "adam", "lr": 1e-2}, "default_callbacks": False}
        trainer = make_trainer(accelerator="gpu", max_epochs=epochs, callbacks=[*callbacks], log_every_n_steps=log)
        data = data or GaussianData(20, 6, batch_size=batch_size, replicas=options.get("replicas", 1))
        trainer.fit(model or MNN(6, (5,), **adam | options), data)

    return train


RUNS = {
    "bundles": {},
    "bundles of batches": {"batch_size": 7},
    "single steps": {"callbacks": [Looks()], "batch_size": 7},
    "a schedule": {"schedule": {"name": "one_cycle"}},
    "replicas": {"replicas": 3, "batch_size": 7},
    "momentum": {"optimizer": {"name": "sgd", "lr": 1e-2, "momentum": 0.9}},
    "fused": {"optimizer": {"name": "adam", "lr": 1e-2, "fused": True}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_training_waits_for_nothing(name, train):
    assert each(lambda epochs: train(epochs, **RUNS[name]), 10, 30) == 0


@pytest.mark.parametrize("name", ["bundles", "single steps"])
def test_a_logged_step_waits_once(name, train):
    options = RUNS[name] | {"batch_size": None}
    assert each(lambda epochs: train(epochs, log=1, **options), 10, 30) == 1


def test_a_streamed_batch_waits_for_nothing():
    def read(batches):
        rows = (torch.arange(batches * 80) % 251).to(torch.uint8).reshape(-1, 8).numpy()
        loader = StreamedLoader(RowArray(rows), torch.zeros(len(rows)), 10, device="cuda", buffer_bytes=4 * 8 * 40)
        for inputs, targets in loader.batches(0, loader.num_steps, reuse=True):
            inputs.sum() + targets.sum()

    assert each(read, 10, 30) == 0


# Landscape


def deep_net(layers=2):
    torch.manual_seed(0)
    blocks = [part for _ in range(layers) for part in (nn.ReLU(), nn.Linear(6, 6))]
    return nn.Sequential(nn.Linear(5, 6), *blocks, nn.Linear(6, 1)).double().cuda()


def batches_of(count):
    return list(torch.linspace(-1, 1, count * 50, dtype=torch.float64).cuda().sin().reshape(count, 10, 5))


def test_a_product_with_the_hessian_waits_for_nothing():
    net = deep_net()
    vector = torch.ones(sum(p.numel() for p in net.parameters()), dtype=torch.float64, device="cuda")

    def multiply(products, batches=2):
        data = batches_of(batches)
        losses = [lambda x=x: net(x).square().mean() for x in data]
        surface = LossSurface(list(net.parameters()), lambda: [(1 / batches, loss) for loss in losses])
        for _ in range(products):
            surface.product(vector)

    assert each(multiply, 2, 12) == 0
    assert each(lambda batches: multiply(2, batches), 2, 12) == 0


def test_a_product_of_lanczos_waits_once_for_what_ends_it():
    diagonal = torch.linspace(-1, 3, 400, dtype=torch.float64).cuda()

    def find(products):
        extreme_eigenvalues(lambda v: diagonal * v, 400, device="cuda", max_products=products, tolerance=1e-15)

    assert each(find, 10, 30) == 1


def test_the_nearest_kink_is_read_once_a_batch():
    def measure(batches, net):
        def run(consume, x):
            with KinkTrace(net, consume):
                net(x)

        passes = [lambda consume, x=x: run(consume, x) for x in batches_of(batches)]
        kink_distance(passes, list(net.parameters()))

    shallow, deep = deep_net(2), deep_net(8)
    assert each(lambda batches: measure(batches, shallow), 2, 12) == 1
    assert waits_of(measure, 3, deep) == waits_of(measure, 3, shallow)


def test_draws_of_a_local_volume_wait_for_nothing():
    def measure(draws, net):
        def active():
            hidden, found = x, {}
            for name, layer in net.named_children():
                hidden = layer(hidden)
                found |= {name: hidden > 0} if isinstance(layer, nn.ReLU) else {}
            return found

        (x,) = batches_of(1)
        local_volume(list(net.parameters()), [active], num_draws=draws)

    shallow, deep = deep_net(2), deep_net(8)
    assert each(lambda draws: measure(draws, shallow), 4, 14) == 0
    assert waits_of(measure, 4, deep) == waits_of(measure, 4, shallow)


def test_samples_of_a_cone_wait_for_nothing():
    normals = torch.linspace(0, 20, 100, dtype=torch.float64).sin().reshape(20, 5).cuda()
    normals = normals * torch.sign(normals @ normals[0])[:, None]

    def measure(most):
        log_cone_measure(normals, normals[0], target_standard_error=1e-9, max_samples=most)

    few, many = (waits_of(measure, most) for most in (2**14, 2**18))
    assert many - few <= 4 * 2  # rounds, each several times as long as the one before


def test_particles_wait_once_for_all_of_their_scores():
    inputs = torch.linspace(-1, 1, 24, dtype=torch.float64).sin().reshape(8, 3).cuda()
    calls = []

    def count(particles):
        def scored(weights):
            calls.append(len(weights))
            return (weights.cuda() @ inputs.T).amax((1, 2))

        calls.clear()
        waited = waits_of(lambda: rare_event(scored, (5, 3), level=3.0, particles=particles, runs=2, steps=2))
        return waited / len(calls)

    assert count(20) == count(200) <= 2  # the weights go there, the scores come back


def data_of(samples, width=6):
    g = torch.Generator().manual_seed(0)
    weights, output, inputs = (
        torch.randn(*shape, generator=g, dtype=torch.float64).cuda() for shape in ((width, 5), (width,), (samples, 5))
    )
    return weights, output, inputs, (inputs[:, 0] > 0).double()


def test_a_survey_waits_as_often_for_any_number_of_samples():
    def statistics(samples):
        weights, output, inputs, targets = data_of(samples)
        network_statistics(Network((weights,), output, 0.1), inputs, targets, 0.5)

    assert waits_of(statistics, 1000) == waits_of(statistics, 10) <= 4


@pytest.mark.parametrize(("planted", "most"), [(planted_minimum, 90), (planted_kink_minimum, 120)])
def test_a_certificate_waits_as_often_for_any_number_of_samples(planted, most):
    def judge(samples):
        point = planted(samples, 5, 4).to("cuda")
        found = certify(point.hidden_weights, point.output_weights, point.inputs, point.targets)
        assert found.is_minimum

    few, many = waits_of(judge, 60), waits_of(judge, 300)
    assert abs(many - few) <= 5  # of numerical ranks, which may take other ways
    assert many <= most


def test_a_step_of_polish_waits_as_often_for_any_number_of_samples_and_units():
    def go(steps, samples, width):
        weights, output, inputs, _ = data_of(samples, width)
        found = polish(weights, output, inputs, (inputs @ inputs[0]).sin(), max_steps=steps)
        assert found.steps == steps, "there is a longer way to go"

    for samples, width in ((60, 6), (240, 6), (240, 12)):
        assert each(lambda steps, n=samples, d=width: go(steps, n, d), 5, 15) <= 26


# Callbacks


class CNN(pl.LightningModule):
    """Three layers with kinks, in training on images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
            nn.Linear(12, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def images(samples=40):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(samples, 1, 8, 8), torch.arange(samples) % 3)
    return DataLoader(data, batch_size=10)


# A look at the weights: the callback, whether at those of a CNN, and how often it may wait.
LOOKS = {
    "a check of MNN": (
        lambda: LocalMinimumDetector(Schedule(every=1), stop_training=False, follow_descent=False),
        False,
        4,
    ),
    "a bound of the volume of MNN": (lambda: AngularVolumeMonitor(Schedule(every=1), measure=()), False, 5),
    "a snapshot of MNN, with vital signs": (lambda: ActivationPatternRecorder(Schedule(every=1)), False, 9),
    "a snapshot of a CNN, with vital signs": (lambda: ActivationPatternRecorder(Schedule(every=1)), True, 18),
    "a check of a CNN": (lambda: LocalMinimumDetector(Schedule(every=1), stop_training=False), True, 22),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_the_weights_waits_a_few_times(name, train):
    callback, of_cnn, most = LOOKS[name]

    def run(epochs):
        train(epochs, [callback()], **({"model": CNN(), "data": images()} if of_cnn else {}))

    assert each(run, 3, 7) <= most


def test_a_snapshot_waits_as_often_for_any_number_of_samples(train):
    def run(samples):
        train(1, [ActivationPatternRecorder(Schedule(every=1))], CNN(), images(samples))

    assert waits_of(run, 120) == waits_of(run, 40)


def test_draws_of_a_monitor_wait_for_nothing(train):
    assert (
        each(
            lambda draws: train(
                1, [AngularVolumeMonitor(local_volume=LocalVolumeSettings(num_draws=draws))], CNN(), images()
            ),
            4,
            14,
        )
        == 0
    )
