"""The callbacks on a device: training is left untouched, and what they find is what they find on the CPU."""

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

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
    ConeSettings,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
    SecondOrderSettings,
)
from lightning_mnn.data import GaussianData
from tests.children import PATIENCE
from tests.foreign_models import foreign_model


class CNN(pl.LightningModule):
    """Batch normalisation, max-pooling and dropout."""

    def __init__(self, lr=0.05, noise=0.0):
        super().__init__()
        self.lr, self.noise = lr, noise
        self.features = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(12, 6)
        )
        self.dropout, self.output = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x):
        return self.output(self.dropout(F.relu(self.features(x))))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        noise = self.noise * torch.randn(inputs.shape, device=self.device) if self.noise else 0
        return F.cross_entropy(self(inputs + noise), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Regression(pl.LightningModule):
    """A network with one hidden layer, which has certificates, as others write it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).double()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.layers(batch[0])[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def seeded(make, *inputs_and_targets, batch_size=10):
    torch.manual_seed(0)
    module, tensors = make(), [make_tensor() for make_tensor in inputs_and_targets]
    return module, DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def images(make):
    return seeded(make, lambda: torch.randn(20, 1, 8, 8), lambda: torch.arange(20) % 3)


def mnn():
    model = MNN(6, (5,), optimizer={"name": "adam", "lr": 1e-2}, default_callbacks=False)
    return model, GaussianData(20, 6, batch_size=10, dtype="float64")


MODELS = {
    "MNN": mnn,
    "CNN": lambda: images(CNN),
    "CNN with noise of the device": lambda: images(lambda: CNN(noise=0.1)),
    "transformer": lambda: foreign_model("transformer", shuffle=True),
    "manual optimisation": lambda: foreign_model("manual"),
}


def three(**options):
    second_order = SecondOrderSettings(gradient_tolerance=1e9, max_products=12)
    detector = {"schedule": Schedule(every=1), "stop_training": False, "second_order": second_order}
    return [
        LocalMinimumDetector(**detector | options),
        ActivationPatternRecorder(Schedule(every=1)),
        AngularVolumeMonitor(
            local_volume=LocalVolumeSettings(num_draws=4), cones=ConeSettings(target_standard_error=0.1)
        ),
    ]


@pytest.fixture
def fit(make_trainer):
    def fit(device, model, callbacks, ckpt_path=None, **options):
        torch.manual_seed(5)
        torch.cuda.manual_seed_all(5)
        module, data = model() if callable(model) else model
        accelerator = "gpu" if device == "cuda" else "cpu"
        defaults = {"accelerator": accelerator, "callbacks": callbacks, "log_every_n_steps": 1000, "max_epochs": 3}
        trainer = make_trainer(**defaults | options)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module, trainer

    return fit


@pytest.mark.parametrize("name", MODELS)
def test_training_is_left_untouched(name, fit):
    ends = []
    for callbacks in (three(), []):
        module, _ = fit("cuda", MODELS[name], callbacks)
        generators = torch.get_rng_state(), torch.cuda.get_rng_state()
        ends.append([*(value.cpu() for value in module.state_dict().values()), *generators])
    assert all(map(torch.equal, *ends))


def findings(fit, device, model, **options):
    detector, recorder, monitor = callbacks = three(**options.pop("detector", {}))
    fit(device, model, callbacks, **options)
    return detector, recorder, monitor


@pytest.mark.parametrize("name", ["MNN", "a network in a module"])
def test_certificates_and_patterns_are_those_of_the_cpu(name, fit):
    def regression():
        return seeded(Regression, lambda: torch.randn(20, 5).double(), lambda: torch.randn(20).double(), batch_size=20)

    options = {"max_epochs": 150, "detector": {"schedule": Schedule(every=50), "polish": True, "max_distance": 1e9}}
    model = MODELS.get(name, regression)
    on_cpu, on_device = (findings(fit, device, model, **options) for device in ("cpu", "cuda"))
    expected, found = on_cpu[0].summary(), on_device[0].summary()
    assert expected["evidence"] == found["evidence"] == "certificate"
    assert expected["kind"] == found["kind"]
    assert expected["mse"] == pytest.approx(found["mse"], rel=1e-6)
    assert on_cpu[0].certificates[0].mse == pytest.approx(on_device[0].certificates[0].mse, abs=1e-9)
    assert_same_patterns(on_cpu[1], on_device[1])
    assert on_cpu[2].reasons == on_device[2].reasons  # why there is no volume on a kink


def test_volumes_are_those_of_the_cpu(fit):
    monitors = [AngularVolumeMonitor(cones=ConeSettings(target_standard_error=0.05)) for _ in range(2)]
    for device, monitor in zip(("cpu", "cuda"), monitors, strict=True):
        fit(device, mnn, [monitor])
    (expected,), (found,) = (monitor.volumes for monitor in monitors)
    assert found.value == pytest.approx(expected.value, abs=5 * math.hypot(found.standard_error, 0.05))
    assert float(monitors[1].log_lower_bound) == pytest.approx(float(monitors[0].log_lower_bound), rel=1e-6)


@pytest.mark.parametrize("name", ["CNN", "transformer"])
def test_other_evidence_and_patterns_are_those_of_the_cpu(name, fit):
    """At weights that stay, as dropout is another one on each device."""

    def still():
        module, data = MODELS[name]()
        module.lr = 0.0
        return module, data

    on_cpu, on_device = (findings(fit, device, still, max_epochs=1) for device in ("cpu", "cuda"))
    expected, found = on_cpu[0].summary(), on_device[0].summary()
    assert expected["evidence"] == found["evidence"] == "second_order"
    assert expected["kind"] == found["kind"]
    for key in ("loss", "gradient_norm", "smallest_eigenvalue", "largest_eigenvalue"):
        assert expected[key] == pytest.approx(found[key], rel=1e-3), key
    assert_same_patterns(on_cpu[1], on_device[1])
    local = [monitor.summary()["local_volume"] for _, _, monitor in (on_cpu, on_device)]
    assert local[0].keys() == local[1].keys()


@pytest.mark.skipif("not hasattr(torch.cuda, '_is_simulated')", reason="how a real GPU rounds depends on which it is")
def test_evidence_is_found_in_all_digits_where_training_has_few(fit):
    """As with cuDNN's TF32, on by default, which rounds the factors of a convolution to 10 bits."""

    def still():
        module, data = images(lambda: CNN(lr=0.0))
        module.features[1].momentum = 0.0  # or what training rounds would be in its statistics
        return module, data

    on_cpu = findings(fit, "cpu", still, max_epochs=1)
    assert torch.backends.cudnn.allow_tf32
    with import_module("simcuda").tf32():
        module = still()[0].eval().cuda()
        with torch.no_grad():
            rounded, exact = module(still()[1].dataset.tensors[0].cuda()), module.cpu()(still()[1].dataset.tensors[0])
        assert not torch.allclose(rounded.cpu(), exact, rtol=1e-5)
        on_device = findings(fit, "cuda", still, max_epochs=1)
    expected, found = on_cpu[0].summary(), on_device[0].summary()
    for key in ("loss", "gradient_norm", "min_preactivation"):
        assert expected[key] == pytest.approx(found[key], rel=1e-5), key
    assert_same_patterns(on_cpu[1], on_device[1])


def assert_same_patterns(one, other):
    states = [recorder.state_dict()["last"] for recorder in (one, other)]
    assert states[0].keys() == states[1].keys() != set()
    for name, layer in states[0].items():
        assert torch.equal(layer["bits"], states[1][name]["bits"]), name


@pytest.mark.parametrize("name", ["MNN", "CNN"])
def test_a_checkpoint_goes_from_the_device_to_the_cpu_and_back(name, fit, tmp_path):
    path, steps = None, []
    for epochs, device in ((2, "cuda"), (4, "cpu"), (6, "cuda")):
        callbacks = three()
        _, trainer = fit(device, MODELS[name], callbacks, path, max_epochs=epochs, enable_checkpointing=True)
        path = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
        steps.append(trainer.global_step)
        held = torch.load(path, weights_only=True)["callbacks"]
        assert {part.device.type for state in held.values() for part in tensors_of(state)} == {"cpu"}
        assert callbacks[0].summary()["kind"]
    assert steps == [4, 8, 12]


def tensors_of(state):
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


APP = """
import json, os, time
from pathlib import Path
import hydra, torch

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    numbers = torch.ones(3, device="cuda")
    found = [os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count(), str((2 * numbers).device)]
    Path(f"found_{cfg.job}.json").write_text(json.dumps(found))
    while not all(Path(f"found_{job}.json").exists() for job in range(2)):
        time.sleep(0.05)

if __name__ == "__main__":
    main()
"""


def test_jobs_of_a_sweep_have_a_device_each(tmp_path):
    """Both run at once: each waits for the other."""
    (tmp_path / "app.py").write_text(APP)
    simulator = Path(import_module("simcuda").__file__).parents[1]
    path = os.pathsep.join([str(simulator / "site"), os.environ["PYTHONPATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    sweep = ["-m", "hydra/launcher=device_pool", "+trainer={accelerator: gpu, devices: 1}", "+job=0,1"]
    done = subprocess.run(
        [sys.executable, "app.py", *sweep],
        env=environment | {"SIMCUDA": "2", "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"found_{job}.json").read_text()) for job in range(2)]
    assert sorted(found) == [["0", 1, "cuda:0"], ["1", 1, "cuda:0"]]
