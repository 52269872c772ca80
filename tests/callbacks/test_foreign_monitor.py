"""AngularVolumeMonitor in other people's modules, in real fits."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import AngularVolumeMonitor, ConeSettings, LocalVolumeSettings, Schedule
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import ActivationPattern, Region, region_log_volume
from lightning_mnn.landscape.kinks.layers import NoKinksError
from lightning_mnn.landscape.volumes.random_moves import ALL_LAYERS, SIGMAS
from lightning_mnn.utilities.seeding import generator
from tests.children import side_by_side
from tests.foreign_models import OTHERS, ZOO, foreign_model, foreign_trainer

FEW = LocalVolumeSettings(sigmas=(1e-6, 1e-2, 1.0), num_draws=4)


class Sequences(pl.LightningModule):
    """Linear and ReLU on each step of a sequence; all but the first Linear may be frozen, or the first one."""

    def __init__(self, frozen=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
        for part in () if frozen is None else self.net[frozen]:
            part.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Checkpointed(Sequences):
    """A block of which torch keeps no gradients in the forward pass."""

    def __init__(self):
        super().__init__()
        parts = nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()
        self.first, self.block, self.net = nn.Linear(3, 4), nn.Sequential(*parts), nn.Linear(4, 1)

    def forward(self, x):
        return self.net(checkpoint(self.block, self.first(x), use_reentrant=True))


def sequences(num_samples=9):
    inputs = torch.randn(num_samples, 4, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, torch.zeros(num_samples)), batch_size=4)


class Stream(IterableDataset):
    """The samples of another data set, one after the other."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[i] for i in range(len(self.dataset)))


def fit(module, loader, monitor, namespace="pytorch_lightning", **options):
    trainer = foreign_trainer(namespace, callbacks=[monitor], **options)
    torch.manual_seed(0)  # of dropout
    trainer.fit(module, loader)
    return trainer


def fit_unchanged(module, loader, monitor, **options):
    """Take one step that leaves the weights as they are."""
    module.lr = 0.0
    return fit(module, loader, monitor, max_epochs=1, limit_train_batches=1, **options)


def logged_steps(logger, name):
    lines = [line.split(",") for line in Path(logger.experiment.metrics_file_path).read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    return [int(row["step"]) for row in rows if row.get(name)]


def naive_pattern(module, x):
    """The pieces of the units of every kink module, by hooks."""
    found = {}

    def hook(name, part):
        def look(_part, args):
            if isinstance(part, nn.MaxPool2d):
                found[name] = nn.functional.max_pool2d(*args, part.kernel_size, return_indices=True)[1]
            else:
                found[name] = args[0] > 0

        return look

    parts = [(n, p) for n, p in module.named_modules() if isinstance(p, nn.ReLU | nn.MaxPool2d)]
    handles = [part.register_forward_pre_hook(hook(name, part)) for name, part in parts]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", [*(name for name in ZOO if name != "resnet18"), *OTHERS])
def test_it_logs_in_every_model(name):
    module, loader = foreign_model(name)
    monitor = AngularVolumeMonitor(local_volume=FEW)
    metrics = fit(module, loader, monitor).callback_metrics
    found = monitor.summary()
    json.dumps(found)
    curves = found["local_volume"]
    assert curves.keys() > {ALL_LAYERS}
    for layer, curve in curves.items():
        assert curve["sigma"] == list(FEW.sigmas)
        assert all(
            0 <= a <= p <= b <= 1 for a, p, b in zip(curve["low"], curve["probability"], curve["high"], strict=True)
        )
        assert curve["probability"][0] >= curves[ALL_LAYERS]["probability"][0]
        assert metrics.get(f"volume/{layer}/half_sigma") == (curve["half_sigma"] if layer != ALL_LAYERS else None)
    total = curves[ALL_LAYERS]
    assert metrics.get("volume/half_sigma") == total["half_sigma"]
    assert [float(metrics[f"volume/keep/1e{e}"]) for e in ("-06", "-02", "+00")] == total["probability"]
    assert total["probability"][0] > 0 == total["probability"][-1]
    assert found["log_volume"] is found["log_volume_lower_bound"] is None
    assert "not a network with one hidden layer" in found["log_volume_reason"]
    cones = found["first_layer"]
    assert (cones["log_volume"] is None) != (cones["log_volume_reason"] is None)
    assert (cones["log_volume"] is not None) == (name in ("mlp", "functional", *OTHERS))


@pytest.mark.slow
def test_it_logs_in_a_resnet():
    module, loader = foreign_model("resnet18", num_samples=8)
    monitor = AngularVolumeMonitor(local_volume=LocalVolumeSettings(sigmas=[1e-6, 1e-1], num_draws=1, probe=2))
    metrics = fit(module, loader, monitor, max_epochs=1).callback_metrics
    layers = [name for name in monitor.summary()["local_volume"] if name != ALL_LAYERS]
    assert len(layers) == 18
    assert {"model.relu", "model.maxpool", "model.layer4.1.relu.call_2"} < set(layers)
    assert float(metrics["volume/keep/1e-01"]) == 0
    assert "BatchNorm2d" in monitor.summary()["first_layer"]["log_volume_reason"]


@pytest.mark.parametrize(("name", "sigmas"), [("mlp", [0.001, 0.005, 0.02]), ("lenet", [1e-5, 1e-4, 1e-3])])
def test_keep_probabilities_agree_with_a_naive_simulation(name, sigmas):
    module, loader = foreign_model(name, num_samples=8)
    monitor = AngularVolumeMonitor(seed=2, local_volume=LocalVolumeSettings(sigmas=sigmas, num_draws=150))
    fit(module, loader, monitor)
    x = loader.dataset.tensors[0]
    still = copy.deepcopy(module).eval()
    moved = copy.deepcopy(still)
    reference = naive_pattern(still, x)
    torch.manual_seed(0)
    for k, sigma in enumerate(sigmas):
        hits = dict.fromkeys(reference, 0)
        for _ in range(150):
            with torch.no_grad():
                for a, b in zip(moved.parameters(), still.parameters(), strict=True):
                    a.copy_(b + sigma * b.norm() / math.sqrt(b.numel()) * torch.randn_like(b))
            now = naive_pattern(moved, x)
            for layer in hits:
                hits[layer] += torch.equal(now[layer], reference[layer])
        for layer, count in hits.items():
            here = monitor.summary()["local_volume"][layer]["probability"][k]
            p = (here + count / 150) / 2
            assert abs(here - count / 150) <= 4 * math.sqrt(2 * p * (1 - p) / 150), (layer, sigma)


def test_the_first_layer_has_exact_cones():
    module, loader = foreign_model("mlp")
    monitor = AngularVolumeMonitor(seed=4, local_volume=replace(FEW, probe=10))
    metrics = fit(module, loader, monitor).callback_metrics
    chosen = torch.randperm(24, generator=generator(4, "probe"))[:10].sort().values
    x = torch.cat([loader.dataset.tensors[0][chosen], torch.ones(10, 1)], dim=1).double()
    linear = module.layers[0]
    rows = torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach().double()
    expected = region_log_volume(
        Region(x, ActivationPattern(x @ rows.T > 0)),
        rows,
        target_standard_error=0.5,
        seed=generator(4, "volume", 6).initial_seed(),
    )
    found = monitor.summary()["first_layer"]
    assert found["layer"] == "layers.1"
    assert (found["log_volume"], found["log_volume_standard_error"]) == (expected.value, expected.standard_error)
    assert metrics["volume/layers.1/log_volume"] == expected.value
    assert metrics["volume/layers.1/log_volume_standard_error"] == expected.standard_error
    over = AngularVolumeMonitor(cones=ConeSettings(budget=10.0), local_volume=FEW)
    fit(module, loader, over)
    assert "above the budget" in over.summary()["first_layer"]["log_volume_reason"]


@pytest.mark.parametrize(("frozen", "layers"), [(None, ["net.1", "net.3"]), (slice(0, 1), ["net.3"])])
def test_each_step_of_a_sequence_is_a_half_space(frozen, layers):
    torch.manual_seed(0)
    module, loader = Sequences(frozen), sequences()
    monitor = AngularVolumeMonitor(local_volume=FEW)
    fit(module, loader, monitor)
    first = 0 if frozen is None else 2
    with torch.no_grad():
        x = module.net[:first](loader.dataset.tensors[0]).double().flatten(0, -2)
    x = torch.cat([x, torch.ones(36, 1)], dim=1)
    rows = torch.cat([module.net[first].weight, module.net[first].bias[:, None]], dim=1).detach().double()
    region = Region(x, ActivationPattern(x @ rows.T > 0))
    seed = generator(0, "volume", 6).initial_seed()
    expected = region_log_volume(region, rows, target_standard_error=0.5, seed=seed)
    found = monitor.summary()
    assert found["first_layer"]["layer"] == layers[0]
    assert found["first_layer"]["log_volume"] == pytest.approx(expected.value, abs=3 * expected.standard_error)
    assert [name for name in found["local_volume"] if name != ALL_LAYERS] == layers


def test_checkpointed_blocks_count():
    torch.manual_seed(0)
    monitor = AngularVolumeMonitor(local_volume=FEW)
    fit(Checkpointed(), sequences(), monitor)
    found = monitor.summary()
    assert list(found["local_volume"]) == [ALL_LAYERS, "block.2", "block.4"]
    assert found["first_layer"]["log_volume_reason"] == "the inputs of its Linear depend on parameters themselves"


def test_frozen_parameters_do_not_move():
    torch.manual_seed(0)
    monitor = AngularVolumeMonitor(local_volume=FEW)
    fit(Sequences(slice(0, 4)), sequences(), monitor)
    found = monitor.summary()
    assert found["local_volume"] is found["first_layer"]["log_volume"] is None
    assert found["local_volume_reason"] == "no kink depends on a parameter that requires a gradient"


@pytest.mark.parametrize("name", ["functional", "lenet", "no_forward"])
def test_training_is_not_touched(name):
    left = []
    options = {"local_volume": FEW, "measure": ("start", "end"), "measure_every": 1}
    for callbacks in ([AngularVolumeMonitor(Schedule(every=1, unit="step"), **options)], []):
        module, loader = foreign_model(name, shuffle=True)
        torch.manual_seed(3)
        trainer = foreign_trainer(callbacks=callbacks)
        trainer.fit(module, loader)
        names = {n for n in trainer.callback_metrics if not n.startswith("volume/")}
        numbers = [float(trainer.callback_metrics[n]) for n in sorted(names)]
        modes = [part.training for part in module.modules()]
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
        tensors = [*module.parameters(), *module.buffers(), torch.rand(3)]
        left.append((tensors, numbers, modes, hooks, names))
    for a, b in zip(left[0][0], left[1][0], strict=True):
        assert torch.equal(a, b)
    assert left[0][1:] == left[1][1:]


def test_modules_narrow_the_layers():
    module, loader = foreign_model("lenet")
    monitor = AngularVolumeMonitor(local_volume=replace(FEW, modules="features.*"))
    fit(module, loader, monitor)
    assert list(monitor.summary()["local_volume"]) == [ALL_LAYERS, "features.1", "features.2", "features.4"]
    with pytest.raises(NoKinksError, match=r"modules='encoder' matches none of .* LeNet.*features\.1"):
        fit(*foreign_model("lenet"), AngularVolumeMonitor(local_volume=LocalVolumeSettings(modules="encoder")))


def test_what_cannot_work_is_said_before_training():
    module, loader = foreign_model("mlp")
    module.layers = nn.Linear(8, 3)
    trainer = foreign_trainer(callbacks=[AngularVolumeMonitor(strict=True)])
    with pytest.raises(NoKinksError, match="MLP has no kink in its forward pass"):
        trainer.fit(module, loader)
    assert trainer.global_step == 0
    module, loader = foreign_model("mlp")
    stream = DataLoader(Stream(loader.dataset), batch_size=8)
    with pytest.raises(TypeError, match=r"IterableDataset cannot be enumerated.*; or give .* probe=batch"):
        fit(module, stream, AngularVolumeMonitor(strict=True))
    module, loader = foreign_model("manual")
    type(module).forward, kept = pl.LightningModule.forward, type(module).forward
    try:
        with pytest.raises(TypeError, match=r"optimises manually.*forward_fn\(module, batch\)"):
            fit(module, loader, AngularVolumeMonitor(strict=True))
    finally:
        type(module).forward = kept


@pytest.mark.parametrize("name", ["mlp", "dict_batches"])
def test_a_batch_may_be_the_probe(name):
    module, loader = foreign_model(name)
    monitor = AngularVolumeMonitor(local_volume=replace(FEW, probe=next(iter(loader))))
    fit_unchanged(module, DataLoader(Stream(loader.dataset), batch_size=8), monitor)
    same, _ = foreign_model(name)
    chosen = AngularVolumeMonitor(local_volume=replace(FEW, probe=8))
    fit_unchanged(same, DataLoader(torch.utils.data.Subset(loader.dataset, range(8)), batch_size=8), chosen)
    assert monitor.summary()["local_volume"] is not None
    assert monitor.summary()["local_volume"] == chosen.summary()["local_volume"]


def test_a_forward_of_ones_own():
    module, loader = foreign_model("manual")

    def forward(module, batch):
        return module.discriminator(module.generator(batch[0][:, :4]))

    monitor = AngularVolumeMonitor(local_volume=replace(FEW, forward_fn=forward))
    fit(module, loader, monitor)
    assert list(monitor.summary()["local_volume"]) == [ALL_LAYERS, "generator.1", "discriminator.1"]
    assert monitor.summary()["first_layer"]["layer"] == "generator.1"


def test_two_hidden_layers_have_local_volumes(make_trainer):
    monitor, model = AngularVolumeMonitor(local_volume=FEW), MNN(5, (4, 3), 0.1)
    trainer = make_trainer(max_epochs=2, callbacks=[monitor])
    trainer.fit(model, GaussianData(20, 5))
    found = monitor.summary()
    assert list(found["local_volume"]) == [ALL_LAYERS, "activation", "activation.call_2"]
    x, _ = GaussianData(20, 5).tensors()
    rows = model.hidden_weights[0].detach()
    region, seed = Region(x, ActivationPattern(x @ rows.T > 0)), generator(0, "volume", 2).initial_seed()
    expected = region_log_volume(region, rows, target_standard_error=0.5, seed=seed)
    assert found["first_layer"]["log_volume"] == pytest.approx(expected.value, rel=1e-12)
    second = AngularVolumeMonitor(local_volume=replace(FEW, modules="activation.call_2"))
    make_trainer(max_epochs=1, callbacks=[second]).fit(model, GaussianData(20, 5))
    assert list(second.summary()["local_volume"]) == [ALL_LAYERS, "activation.call_2"]
    assert "no module's output" in second.summary()["first_layer"]["log_volume_reason"]
    replicas = AngularVolumeMonitor(measure=("end",), local_volume=FEW)
    make_trainer(max_epochs=1, callbacks=[replicas]).fit(MNN(5, (4, 3), replicas=2), GaussianData(20, 5, replicas=2))
    assert replicas.summary()["local_volume"] is None
    assert "train them one by one" in replicas.summary()["local_volume_reason"]


def test_it_measures_when_it_is_told_to_and_goes_on_where_it_was(tmp_path):
    def run(name, **options):
        module, loader = foreign_model("mlp")
        logger = CSVLogger(tmp_path / name)
        monitor = AngularVolumeMonitor(Schedule(every=1), measure=("start", "end"), measure_every=2, local_volume=FEW)
        trainer = foreign_trainer(callbacks=[monitor], logger=logger, max_epochs=5, **options)
        return module, loader, trainer, monitor, logger

    module, loader, trainer, whole, logger = run("whole")
    trainer.fit(module, loader)
    assert logged_steps(logger, "volume/keep/1e-02") == [0, 6, 12, 15]
    module, loader, trainer, _, logger = run("first", max_time=None)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert logged_steps(logger, "volume/keep/1e-02") == [0, 6, 9]
    module, loader, trainer, resumed, logger = run("resumed")
    trainer.fit(module, loader, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert logged_steps(logger, "volume/keep/1e-02") == [12, 15]
    assert resumed.summary() == whole.summary()


def test_mixed_precision_is_judged_in_the_weights_own():
    found = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
        monitor = AngularVolumeMonitor(local_volume=LocalVolumeSettings(num_draws=4))
        fit_unchanged(*foreign_model("mlp"), monitor, precision=precision)
        found[precision] = monitor.summary()
    assert found["bf16-mixed"] == found["32-true"]
    assert found["32-true"]["local_volume_reason"] is None
    coarse = found["bf16-true"]
    assert coarse["local_volume"][ALL_LAYERS]["sigma"] == list(SIGMAS[-3:])
    assert coarse["local_volume_reason"] == "σ below 6.2e-02 would be lost in the rounding of the weights"
    kept = AngularVolumeMonitor(local_volume=LocalVolumeSettings(sigmas=[1e-3]))
    fit_unchanged(*foreign_model("mlp"), kept, precision="bf16-true")
    assert kept.summary()["local_volume"] is None


def test_weights_that_are_not_numbers_do_not_end_the_training():
    module, loader = foreign_model("mlp")
    module.lr = 1e30
    monitor = AngularVolumeMonitor(local_volume=FEW)
    fit(module, loader, monitor)
    assert monitor.summary()["local_volume"] is None
    assert monitor.summary()["local_volume_reason"] == "the input of layers.1 contains NaN"


def test_fast_dev_run():
    monitor = AngularVolumeMonitor(local_volume=FEW)
    fit(*foreign_model("mlp"), monitor, fast_dev_run=True)
    assert monitor.summary()["local_volume"][ALL_LAYERS]["probability"][0] > 0


def test_tensorboard_shows_the_curves(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(*foreign_model("mlp"), AngularVolumeMonitor(local_volume=FEW), logger=[logger, CSVLogger(tmp_path)])
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    (picture,) = events.Images("volume/local")
    assert picture.step == 6
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert {"volume/keep/1e-02", "volume/layers.1/log_volume"} < set(events.Tags()["scalars"])


@pytest.mark.slow
def test_wandb_shows_the_curves(tmp_path):
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(*foreign_model("mlp"), AngularVolumeMonitor(local_volume=FEW), logger=logger)
    wandb.finish()
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/volume/*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_share_the_draws_of_one(tmp_path):
    for devices, name in ((1, "one"), (2, "two")):  # each process with one thread
        side_by_side(tmp_path / name, devices, main, devices, tmp_path / f"{name}.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert 0 < one["local_volume"][ALL_LAYERS]["probability"][1] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": 0}, "probe must be at least 1"),
        ({"sigmas": [1.0, 0.1]}, "sigmas must be positive, finite and ascending"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LocalVolumeSettings(**options)


class TwoLayers(pl.LightningModule):
    """Linear, ReLU, Linear in an nn.Sequential, on what ``seen`` makes of the inputs; a training step of any kind."""

    def __init__(self, seen=lambda net, x: net(x), step=lambda module, batch: module(batch[0]).mean()):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.seen, self.step = seen, step

    def forward(self, x):
        return self.seen(self.net, x)

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Moved(TwoLayers):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]


class Hooked(TwoLayers):
    def __init__(self):
        super().__init__()
        self.net[0].register_forward_hook(lambda _layer, _inputs, output: output + 5)


class Noisy(Dataset):
    """Draws from torch's generator, and from one of its own."""

    def __init__(self, noise):
        self.noise = noise
        self.own = torch.Generator().manual_seed(0)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 30).reshape(10, 3)[index]
        return x + self.noise * (torch.randn(3) + torch.randn(3, generator=self.own)), x.sum()


def inputs_and_targets(*shape):
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, torch.zeros(shape[0]))


def loop(net, x):
    for layer in net:
        x = layer(x)
    return x


def measured(module, data, *, strict=False, measure=None, **options):
    monitor = AngularVolumeMonitor(local_volume=replace(FEW, **options), measure=measure, strict=strict)
    fit(module, DataLoader(data, batch_size=4), monitor)
    return monitor.summary()


@pytest.mark.parametrize("seen", [lambda net, x: net(x), loop, lambda net, x: net(x).tanh() - 1])
def test_a_sequential_on_the_inputs_as_they_are_has_a_region(seen):
    data = inputs_and_targets(10, 3)
    module = TwoLayers(seen)
    found = measured(module, data, measure=["end"])  # as a measurement has the seed of its step
    x = torch.cat([data.tensors[0], torch.ones(10, 1)], dim=1).double()
    rows = torch.cat([module.net[0].weight, module.net[0].bias[:, None]], dim=1).detach().double()
    region, seed = Region(x, ActivationPattern(x @ rows.T > 0)), generator(0, "volume", 6).initial_seed()
    expected = region_log_volume(region, rows, target_standard_error=0.5, seed=seed)
    assert found["log_volume"] == pytest.approx(expected.value, rel=1e-9)
    assert "local_volume" not in found


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: TwoLayers(lambda net, x: net(x - 5)), "its forward calls its nn.Sequential on something other than"),
        (lambda: TwoLayers(lambda net, x: net(x) - net(-x)), "calls the first Linear of its nn.Sequential 2 times"),
        (lambda: TwoLayers(lambda net, x: net[2](net[0](x).relu())), "does not run the layers of its nn.Sequential"),
        (
            lambda: TwoLayers(step=lambda m, batch: m(batch[0].sin()).mean()),
            "its training_step calls its nn.Sequential on something other than the inputs of a batch",
        ),
        (Moved, "its forward calls its nn.Sequential on something other than the inputs of a batch"),
        (Hooked, "forward hooks"),
    ],
)
def test_other_uses_of_a_sequential_have_local_volumes(module, reason, caplog):
    with caplog.at_level("INFO"):
        found = measured(module(), inputs_and_targets(10, 3))
    assert reason in found["log_volume_reason"]
    assert f"not that of the region: {found['log_volume_reason']}" in caplog.text
    assert found["log_volume"] is found["log_volume_lower_bound"] is None
    assert found["local_volume"].keys() >= {ALL_LAYERS, "F.relu" if "does not run" in reason else "net.1"}


class Rows(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.form(torch.linspace(-1, 1, 24).reshape(8, 3)[index])


@pytest.mark.parametrize(
    ("form", "step"),
    [
        (lambda x: {"x": x, "y": x.sum()}, lambda m, batch: m(batch["x"]).mean()),
        (lambda x: (x,), lambda m, batch: m(batch[0]).mean()),
        (lambda x: (x, -x), lambda m, batch: (m(batch[0]) - m(batch[1])).mean()),
        (lambda x: (torch.stack([x, 2 * x]), x.sum()), lambda m, batch: m(batch[0]).mean()),
    ],
    ids=["dicts", "inputs only", "pairs", "sequences"],
)
def test_batches_of_any_form(form, step):
    found = measured(TwoLayers(step=step), Rows(form))
    assert found["log_volume"] is None
    assert found["log_volume_reason"]
    assert found["local_volume"]["net.1"]["probability"][0] > 0


def test_arguments_for_passes_are_used_or_refused(make_trainer):
    data = inputs_and_targets(10, 3)
    batch = [data.tensors[0][:6], data.tensors[1][:6]]
    for options, name in (({"modules": "net"}, "modules"), ({"probe": batch}, "a batch as probe")):
        found = measured(TwoLayers(), data, **options)
        assert found["log_volume_reason"] == f"{name} are given, which are arguments of the local volume"
        assert list(found["local_volume"]) == [ALL_LAYERS, "net.1"]
        with pytest.raises(TypeError, match=f"{name} are for modules without a method network\\(\\); MNN has one"):
            make_trainer(
                max_epochs=1, callbacks=[AngularVolumeMonitor(local_volume=LocalVolumeSettings(**options))]
            ).fit(MNN(3, (4,)), GaussianData(8, 3))
    with pytest.raises(ZeroDivisionError):
        measured(TwoLayers(), data, forward_fn=lambda module, batch: 1 / 0, strict=True)
    stream = DataLoader(Stream(data), batch_size=4)
    with pytest.raises(TypeError, match=r"IterableDataset cannot be enumerated.*probe=batch"):
        fit(TwoLayers(), stream, AngularVolumeMonitor(strict=True))
    monitor = AngularVolumeMonitor(local_volume=replace(FEW, probe=batch))
    fit(TwoLayers(), stream, monitor)
    assert monitor.summary()["local_volume"]["net.1"]["probability"][0] > 0


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_data_that_draw_random_numbers_are_seen_by_training_as_without(noise):
    left = []
    for callbacks in ([AngularVolumeMonitor(Schedule(every=1), measure=("start", "end"), local_volume=FEW)], []):
        module = TwoLayers(step=lambda m, batch: (m(batch[0])[:, 0] - batch[1]).square().mean())
        torch.manual_seed(1)
        foreign_trainer(callbacks=callbacks).fit(module, DataLoader(data := Noisy(noise), batch_size=4, shuffle=True))
        left.append([*module.parameters(), torch.rand(2), data.own.get_state()])
        assert all((monitor.volumes[0] is None) == (noise > 0) for monitor in callbacks)
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))


class Deeper(Sequences):
    """Three Linears on single vectors."""

    def forward(self, x):
        return torch.stack([self.net(row) for row in x])


def pruned():
    module = Sequences()
    prune.l1_unstructured(module.net[0], "weight", 0.5)
    return module


def hooked():
    module = Sequences()
    module.net[0].register_forward_hook(lambda _layer, _inputs, output: output + 5)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Deeper, None), (pruned, "not parameters but computed"), (hooked, "forward hooks, which may change")],
)
def test_which_first_layers_have_cones(module, reason):
    found = measured(module(), inputs_and_targets(6, 3), probe=2)["first_layer"]
    assert found["layer"] == "net.1"
    assert (found["log_volume"] is None) == (reason is not None)
    assert (reason or "") in (found["log_volume_reason"] or "")


def test_the_layers_of_training_are_moved():
    module = TwoLayers(step=lambda m, batch: m.decoder(m(batch[0])).mean())
    module.decoder = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    found = measured(module, inputs_and_targets(10, 3))
    assert list(found["local_volume"]) == [ALL_LAYERS, "net.1", "decoder.1"]


def main(devices: int, out: Path) -> None:
    """Measure in a fit on several processes."""
    monitor = AngularVolumeMonitor(local_volume=LocalVolumeSettings(sigmas=[1e-4, 2e-3, 1.0], num_draws=15))
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    trainer = fit_unchanged(*foreign_model("functional"), monitor, **options)
    assert trainer.world_size == devices
    if trainer.is_global_zero:
        out.write_text(json.dumps(monitor.summary()))
