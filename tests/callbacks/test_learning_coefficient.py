"""LearningCoefficient in other people's modules: its numbers, and training as without it."""

import json
import math

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mnn import MNN
from lightning_mnn.callbacks import LearningCoefficient, Schedule, learning_coefficient
from lightning_mnn.callbacks.volumes.chains import loss_at_points
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape.curvature import langevin
from lightning_mnn.utilities.validation import ArgumentError, MisfitError
from tests.children import side_by_side
from tests.documented import undocumented_names
from tests.foreign_models import NAMESPACES, foreign_model, foreign_trainer

LOCAL = {"inverse_temperature": 1e8, "localisation": 1e3, "strict": True}


class Line(pl.LightningModule):
    """Least squares on lines in float32: two independent inputs of three, λ = 1; with weight decay 3/2."""

    decay = 0.0

    def __init__(self, width=3):
        super().__init__()
        self.line = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def training_step(self, batch, batch_idx):
        return (self.line(batch[0])[:, 0] - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=self.decay)


class Counting(Line):
    """A step that vmap refuses, as it reads a number."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() >= 0 else -loss


def lines(num_samples=12, batch_size=5):
    inputs = torch.randn(num_samples, 2, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([inputs, inputs[:, :1]], 1)
    return DataLoader(TensorDataset(inputs, torch.zeros(num_samples)), batch_size=batch_size)


@pytest.fixture
def short(monkeypatch):
    """Chains that are as short as possible, without the curvature at their start."""
    monkeypatch.setattr(learning_coefficient, "_MIN_MOVES", 2)
    monkeypatch.setattr(langevin, "_MAX_DENSE", 8)


def fit(module, loader, callback=None, namespace="pytorch_lightning", **options):
    trainer = foreign_trainer(namespace, callbacks=[callback] if callback else [], **options)
    torch.manual_seed(0)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize(("decay", "truth"), [(0.0, 1.0), (1e-2, 1.5)])
def test_least_squares(decay, truth, tmp_path):
    module = Line()
    module.decay = decay
    callback = LearningCoefficient(**LOCAL, budget=20_000)
    trainer = fit(module, lines(), callback, logger=CSVLogger(tmp_path))
    found = callback.found
    assert found.is_reliable, found.reason
    assert abs(found.value - truth) < 3.5 * found.standard_error + 0.02
    assert callback.is_batched
    assert found.traces.dtype == torch.float64
    assert found.gradient_evaluations <= 20_000
    assert callback.summary()["sampled_learning_coefficient"] == found.value
    names = {name for name in trainer.callback_metrics if name.startswith("volume/")}
    assert "volume/learning_coefficient" in names
    assert undocumented_names(names) == []


def test_a_step_that_vmap_refuses_has_the_same_numbers_one_by_one():
    callbacks = [LearningCoefficient(**LOCAL, chains=4, budget=1200) for _ in range(2)]
    for module, callback in zip((Line(), Counting()), callbacks, strict=True):
        fit(module, lines(), callback, max_epochs=1)
    together, apart = callbacks
    assert (together.is_batched, apart.is_batched) == (True, False)
    torch.testing.assert_close(
        together.found.traces, apart.found.traces, rtol=1e-3, atol=1e-3
    )  # chains amplify rounding


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", ["mlp", "lenet", "gru", "small_resnet", "dict_batches", "no_forward"])
def test_training_is_bit_for_bit_as_without_it(name, namespace, short):
    ended = []
    for callback in (None, LearningCoefficient(Schedule(every=1), strict=True, chains=2, budget=40)):
        module, loader = foreign_model(name, namespace)
        trainer = fit(module, loader, callback, namespace)
        ours = {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("volume/")}
        ended.append((module.state_dict(), torch.get_rng_state(), vars(module).keys(), ours))
    (before, state, names, metrics), (after, drawn, others, logged) = ended
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(state, drawn)
    assert names == others
    assert {key: float(value) for key, value in metrics.items()} == {key: float(value) for key, value in logged.items()}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_fast_dev_run_without_a_logger(namespace, short):
    callback = LearningCoefficient(strict=True, chains=2, budget=40)
    fit(*foreign_model("mlp", namespace), callback, namespace, fast_dev_run=True)
    assert callback.found.traces.shape[0] == 2


class Pictures(CSVLogger):
    """A logger that can show pictures, as W&B's can."""

    def __init__(self, folder):
        super().__init__(folder)
        self.shown = []

    def log_image(self, key, images, step):
        self.shown.append((key, step, imread(images[0]).shape))


@pytest.mark.parametrize("name", ["lenet", "gru", "small_resnet"])
def test_the_traces_of_the_chains_are_shown_in_one_picture_per_estimate(name, tmp_path, short, drawn):
    logger = Pictures(tmp_path)
    callback = LearningCoefficient(Schedule(every=1), strict=True, chains=2, budget=40)
    fit(*foreign_model(name), callback, logger=logger)
    assert [(key, step) for key, step, _ in logger.shown] == [
        ("volume/learning_coefficient_chains", 3),
        ("volume/learning_coefficient_chains", 6),
    ]
    assert undocumented_names({key for key, _, _ in logger.shown}) == []
    (ax,) = drawn[-1].axes
    heights = torch.stack([torch.as_tensor(line.get_ydata()) for line in ax.lines[:4]])
    drawn_traces = callback.found.burn_in_traces, callback.found.traces
    torch.testing.assert_close(heights, torch.cat(drawn_traces).double())
    assert "R-hat" in ax.get_title()
    assert "no estimate" in ax.get_title()


def test_a_resumed_run_ends_with_the_same_estimate(tmp_path):
    options = LOCAL | {"chains": 4, "budget": 2000}
    whole = LearningCoefficient(**options)
    fit(Line(), lines(), whole, max_epochs=4)
    trainer = fit(Line(), lines(), LearningCoefficient(**options))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = LearningCoefficient(**options)
    trainer = foreign_trainer(callbacks=[resumed], max_epochs=4)
    trainer.fit(Line(), lines(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(resumed.found.traces, whole.found.traces)
    assert resumed.summary() == whole.summary()


def estimate_in_processes(devices, folder):
    """Estimate the coefficient on one or two processes, and write it."""
    callback = LearningCoefficient(**LOCAL, chains=4, budget=1500)
    trainer = foreign_trainer(callbacks=[callback], devices=devices, strategy="ddp" if devices > 1 else "auto")
    trainer.fit(Line(), lines(12, 3))
    found = {"world": trainer.world_size, "summary": callback.summary()}
    found |= {"traces": callback.found.traces.tolist(), "burn_in": callback.found.burn_in_traces.tolist()}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_agree_with_one_and_with_each_other(tmp_path):
    for devices in (1, 2):
        side_by_side(tmp_path / str(devices), devices, estimate_in_processes, devices, tmp_path / str(devices))
    one, two, other = (json.loads((tmp_path / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json"))
    assert (one["world"], two["world"]) == (1, 2)
    assert two["traces"] == other["traces"]
    assert two["summary"] == other["summary"]
    first, second = (torch.tensor(found["burn_in"])[:, :10] for found in (one, two))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)  # later, chains amplify rounding
    means = [torch.tensor(found["traces"]).mean(1) for found in (one, two)]
    spread = torch.stack(means).std() / 2  # of a mean over 4 chains
    assert abs(means[0].mean() - means[1].mean()) < 6 * spread


def test_it_acts_at_the_end_only_unless_there_is_a_schedule():
    steps = []

    class Noting(LearningCoefficient):
        def act(self, trainer, pl_module):
            steps.append(trainer.global_step)

    fit(Line(), lines(), Noting())
    fit(Line(), lines(), Noting(Schedule(every=1)))
    assert steps == [6, 3, 6]


def test_losses_at_points_are_those_of_the_module_in_float64():
    module, loader = Line(), lines()
    trainer = fit(module, loader, max_epochs=1)
    x, y = loader.dataset.tensors
    with loss_at_points(trainer, module) as (_, loss):
        points = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        values = loss(points)
        (gradients,) = torch.autograd.grad(values.sum(), points)
    exact = (points @ x.double().T - y.double()).square().mean(1)
    torch.testing.assert_close(values, exact)
    torch.testing.assert_close(gradients, torch.autograd.grad(exact.sum(), points)[0])


def test_a_time_limit_leaves_fewer_moves_and_long_work_is_announced(caplog):
    callback = LearningCoefficient()
    with caplog.at_level("INFO"):
        assert callback._moves_within(1e-4, 1000) == 312  # of a budget of 50,000 gradients
        assert not caplog.records
        assert callback._moves_within(0.5, 1000) == 119
    assert (
        "LearningCoefficient: 119 moves of 16 chains after as many of burn-in, about 10 min for 19,104 gradients of "
        "1,000 parameters"
    ) in caplog.text


def test_too_short_a_time_limit_gives_no_value_but_a_reason():
    callback = LearningCoefficient(**LOCAL | {"strict": False}, max_seconds=1e-6)
    fit(Line(), lines(), callback, max_epochs=1)
    assert callback.found is None
    assert callback.summary()["sampled_learning_coefficient"] is None
    assert callback.summary()["sampled_learning_coefficient_reason_code"] == "time_limit"
    assert "are more than max_seconds=1e-06" in callback.summary()["sampled_learning_coefficient_reason"]


def test_replicas_are_refused():
    module = MNN(4, (3,), replicas=2, default_callbacks=False)
    data = GaussianData(num_samples=12, input_dim=4, replicas=2)
    trainer = foreign_trainer(callbacks=[LearningCoefficient()], max_epochs=1)
    with pytest.raises(MisfitError, match="is of one network"):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize(
    "options", [{"chains": 0}, {"budget": 0.5}, {"inverse_temperature": -1.0}, {"max_seconds": math.inf}]
)
def test_arguments_are_checked(options):
    with pytest.raises(ArgumentError):
        LearningCoefficient(**options)
