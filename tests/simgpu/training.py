"""MNN trained on a device: weights as on the CPU, and runs that go on as if they had not been stopped."""

import shutil
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import LastCheckpoint
from lightning_mnn.data import ExactData, GaussianData, StreamedLoader, TensorData
from lightning_mnn.data.loaders.rows import RowArray
from lightning_mnn.data.loaders.whitening import InputMap

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}
ADAM = {"name": "adam", "lr": 1e-2}


def gaussian(**options):
    return GaussianData(**{"num_samples": 20, "input_dim": 6, "dtype": "float64"} | options)


def loader():
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(20, 6, generator=g), torch.randint(0, 2, (20,), generator=g).float())
    return DataLoader(data, batch_size=8, shuffle=True, generator=g, pin_memory=True)


class StreamedData(ExactData):
    """Bytes that are read as they are needed, and mapped on the device."""

    @property
    def input_dim(self):
        return 6

    def loader(self, device, **options):
        pixels = (torch.arange(120).reshape(20, 6) * 37 % 251).to(torch.uint8).numpy()
        mapping = InputMap(torch.full((6,), 100.0), torch.eye(6) / 64, 1.0).to(device, torch.float64)
        labels = torch.arange(20) % 2
        return StreamedLoader(
            RowArray(pixels), labels.float(), mapping=mapping, device=device, buffer_bytes=4 * 6 * 8, **options
        )


class Looks(pl.Callback):
    """Looks at batches, so that there are no bundles of them."""

    def on_train_batch_end(self, trainer, *_):
        pass


def hook_of(model):
    model.activation.register_forward_hook(lambda *_: None)  # that autograd is needed for
    return model


# What is trained: options of MNN, the data, and options of the Trainer.
RUNS = {
    "Adam on all samples": ({"optimizer": ADAM}, gaussian, {}),
    "Adam, fused": ({"optimizer": ADAM | {"fused": True}}, gaussian, {}),
    "SGD with momentum in batches": (
        {"optimizer": {"name": "sgd", "lr": 1e-2, "momentum": 0.9, "nesterov": True}},
        lambda: gaussian(batch_size=8),
        {},
    ),
    "L-BFGS": ({"optimizer": {"name": "lbfgs", "lr": 0.5}}, gaussian, {"max_epochs": 3}),
    "L-BFGS with a line search": (
        {"optimizer": {"name": "lbfgs", "line_search_fn": "strong_wolfe"}},
        gaussian,
        {"max_epochs": 3},
    ),
    "replicas": ({"optimizer": ADAM, "replicas": 3}, lambda: gaussian(replicas=3, batch_size=7), {}),
    "a warm-up and a cycle": ({"optimizer": ADAM, "schedule": {"name": "one_cycle"}}, gaussian, {}),
    "an exponential tail": ({"optimizer": ADAM, "schedule": {"name": "exponential_tail"}}, gaussian, {}),
    "two leaky layers": ({"optimizer": ADAM, "hidden_dims": (5, 4), "negative_slope": 0.1}, gaussian, {}),
    "single batches": ({"optimizer": ADAM}, lambda: gaussian(batch_size=8), {"callbacks": [Looks()]}),
    "gradients by autograd": ({"optimizer": ADAM, "seed": 1}, gaussian, {"hooks": True}),
    "float32": ({"optimizer": ADAM, "dtype": "float32"}, lambda: gaussian(dtype="float32"), {}),
    "clipped gradients": ({"optimizer": ADAM}, gaussian, {"gradient_clip_val": 0.1}),
    "a user's loader": ({"optimizer": ADAM}, loader, {}),
    "streamed data": ({"optimizer": ADAM}, lambda: StreamedData(batch_size=6, seed=2), {}),
}


@pytest.fixture
def fit(make_trainer):
    def fit(device, module, data, ckpt_path=None, **options):
        defaults = {"accelerator": ACCELERATORS[device], "max_epochs": 12, "log_every_n_steps": 1}
        trainer = make_trainer(**defaults | options)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        assert trainer.strategy.root_device.type == device
        return [weights.detach().cpu().clone() for weights in module.parameters()], trainer

    return fit


def assert_close(one, other, tolerance):
    for weights, beside in zip(one, other, strict=True):
        assert float((weights - beside).norm()) <= tolerance * float(weights.norm())


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_the_cpu(name, fit):
    options, data, run = RUNS[name]

    def train(device):
        model = MNN(6, default_callbacks=False, **{"hidden_dims": (5,)} | options)
        own = dict(run)
        return fit(device, hook_of(model) if own.pop("hooks", False) else model, data(), **own)

    (expected, on_cpu), (found, on_device) = train("cpu"), train("cuda")
    assert_close(expected, found, 1e-5 if options.get("dtype") == "float32" else 1e-9)
    assert on_cpu.global_step == on_device.global_step
    assert float(on_cpu.callback_metrics["train/mse"]) == pytest.approx(
        float(on_device.callback_metrics["train/mse"]), rel=1e-4
    )


def test_inputs_on_the_device_stay_there(fit):
    inputs, targets = torch.linspace(-1, 1, 120).sin().reshape(20, 6).cuda(), (torch.arange(20.0) % 2).cuda()
    weights = [fit(d, MNN(6, (5,), default_callbacks=False), TensorData(inputs, targets))[0] for d in ACCELERATORS]
    assert_close(*weights, 1e-9)


class Copies(LastCheckpoint):
    """Keeps each checkpoint, by its step."""

    def _save_if_due(self, trainer, completed_epochs=None):
        super()._save_if_due(trainer, completed_epochs)
        shutil.copy(self.path, self.path.with_name(f"{trainer.global_step}.ckpt"))


class Noisy(pl.LightningModule):
    """Draws from the device's generator: dropout and noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.layers(inputs + 0.1 * torch.randn_like(inputs))[:, 0] - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def noisy():
    torch.manual_seed(0)
    return Noisy()


MODULES = {
    "MNN": lambda: MNN(6, (5,), default_callbacks=False, optimizer=ADAM, schedule={"name": "one_cycle"}),
    "draws on the device": noisy,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(name, fit, tmp_path):
    options = {"enable_checkpointing": True, "max_epochs": 4, "gradient_clip_val": 1e9}  # with which none is bundled

    def train(device="cuda", ckpt_path=None):
        saver = Copies(tmp_path / device / ("more" if ckpt_path else "whole"), timedelta(0))
        module = MODULES[name]()
        if ckpt_path:
            torch.cuda.manual_seed_all(100)
        data = gaussian(batch_size=8, dtype="float32")
        return fit(device, module, data, ckpt_path, callbacks=[saver], **options)[0], saver.path.parent

    whole, folder = train()
    for step in (5, 6):  # within an epoch, and at its end
        again, _ = train(ckpt_path=folder / f"{step}.ckpt")
        assert all(map(torch.equal, whole, again)), step
    if name == "MNN":  # elsewhere the draws are others
        there, _ = train("cpu", folder / "6.ckpt")
        assert_close(whole, there, 1e-9)
        back, _ = train("cuda", tmp_path / "cpu" / "more" / "9.ckpt")
        assert_close(whole, back, 1e-9)


def test_a_checkpoint_of_the_device_loads_on_the_cpu(fit, tmp_path):
    model = MNN(6, (5,), default_callbacks=False)
    _, trainer = fit("cuda", model, gaussian(), enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "device.ckpt")
    loaded = MNN.load_from_checkpoint(tmp_path / "device.ckpt", map_location="cpu", weights_only=True)
    assert {weights.device.type for weights in loaded.parameters()} == {"cpu"}
    pairs = zip(model.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs)
