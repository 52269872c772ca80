"""A plane of the loss at the end of any module's training, which does not notice it."""

import json

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_mnn.callbacks import LossSlice
from lightning_mnn.figures.report_page.model_page import read_model_run, write_model_page
from lightning_mnn.landscape import random_directions
from tests.foreign_models import NAMESPACES, cross_entropy_of, foreign_model, foreign_trainer
from tests.strange_projects import project

OTHERS = ("lenet", "small_resnet", "gru")


def fit(callback, name="mlp", namespace="pytorch_lightning", **options):
    module, loader = foreign_model(name, namespace)
    start = parameters_to_vector(module.parameters()).detach().clone()
    torch.manual_seed(3)  # of dropout
    trainer = foreign_trainer(namespace, callbacks=[callback] if callback else [], **options)
    trainer.fit(module, loader)
    return module, loader, start


def naive(module, loader, point):
    """The loss of the training set at a point, batch by batch."""
    own = parameters_to_vector(module.parameters()).detach().clone()
    vector_to_parameters(point, module.parameters())
    module.eval()
    with torch.no_grad():
        sums = [len(batch[1]) * float(cross_entropy_of(module, batch)) for batch in loader]
    vector_to_parameters(own, module.parameters())
    return sum(sums) / len(loader.dataset)


@pytest.mark.parametrize(
    ("name", "namespace"), [*(("mlp", namespace) for namespace in NAMESPACES), *((n, NAMESPACES[0]) for n in OTHERS)]
)
def test_its_losses_are_those_of_a_loop_and_training_is_as_without_it(name, namespace, tmp_path):
    callback = LossSlice(resolution=5, max_seconds=1e9, strict=True)
    logger = CSVLogger(tmp_path, "", "")
    module, loader, _ = fit(callback, name, namespace, logger=logger)
    plain, _, _ = fit(None, name, namespace)
    for before, after in zip(plain.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    moves = random_directions(module)
    saved = np.load(tmp_path / "slice.npz")
    center = parameters_to_vector(module.parameters()).detach()
    assert float(saved["center_loss"]) == pytest.approx(naive(module, loader, center), rel=1e-4)
    for i, j in ((0, 0), (2, 2), (1, 4), (3, 0)):
        point = center + float(saved["axis_1"][i]) * moves[0] + float(saved["axis_2"][j]) * moves[1]
        assert saved["losses"][i, j] == pytest.approx(naive(module, loader, point), rel=1e-3)
    assert (tmp_path / "slice.png").read_bytes().startswith(b"\x89PNG")


def test_a_plane_through_the_start_has_the_loss_of_the_start(tmp_path):
    callback = LossSlice("start", resolution=21, max_seconds=1e9, strict=True)
    module, loader, start = fit(callback, logger=CSVLogger(tmp_path, "", ""))
    plane = callback.plane
    i, j = int((plane.axes[0] - 1).abs().argmin()), int(plane.axes[1].abs().argmin())
    assert float(plane.losses[i, j]) == pytest.approx(naive(module, loader, start), rel=1e-4)
    assert float((plane.directions[0] @ plane.directions[1]).abs()) < 1e-4 * float(plane.directions[0].norm() ** 2)
    assert plane.trajectory.tolist() == [[1.0, 0.0]]
    (fact,) = callback.facts()
    assert fact.value == float(plane.losses.min())
    (found,) = json.loads((tmp_path / "findings.json").read_text())["callbacks"]
    assert found["found"][0]["text"] == fact.text
    page = write_model_page(read_model_run(tmp_path)).read_text(encoding="utf-8")
    assert 'alt="slice.png"' in page


def test_frozen_weights_do_not_move():
    module, loader = foreign_model("mlp")
    module.layers[0].requires_grad_(requires_grad=False)
    callback = LossSlice(resolution=5, strict=True)
    foreign_trainer(callbacks=[callback]).fit(module, loader)
    kept = module.layers[0].weight.detach().clone()
    losses = callback.plane.losses
    moves = random_directions(module)
    moves[:, : module.layers[0].weight.numel()] = 0
    center = parameters_to_vector(module.parameters()).detach()
    point = center + callback.plane.axes[0][1] * moves[0] + callback.plane.axes[1][3] * moves[1]
    assert float(losses[1, 3]) == pytest.approx(naive(module, loader, point), rel=1e-3)
    assert torch.equal(kept, module.layers[0].weight)


def test_a_slow_loss_gets_fewer_points():
    callback = LossSlice(resolution=41, max_seconds=1e-6, strict=True)
    fit(callback)
    assert callback.plane.losses.shape == (5, 5)


def test_it_is_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, "", "run")
    fit(LossSlice(resolution=5, strict=True), logger=logger)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["slice"]


@pytest.mark.parametrize(
    ("name", "reason"), [("GAN", "optimises manually"), ("DQN", "cannot be enumerated"), ("PINN", None)]
)
def test_where_the_loss_cannot_be_evaluated_that_is_said(name, reason, tmp_path):
    module, loader = project(name)
    callback = LossSlice(resolution=5)
    trainer = foreign_trainer(callbacks=[callback], logger=CSVLogger(tmp_path, "", ""))
    if reason is None:
        trainer.fit(module, loader)
        assert callback.plane.losses.isfinite().all()
        return
    with pytest.warns(UserWarning, match="no slice of the loss is drawn"):
        trainer.fit(module, loader)
    assert reason in callback.failure
    assert not (tmp_path / "slice.png").exists()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="directions must be one of random, start, got 'curvature'"):
        LossSlice("curvature")
    with pytest.raises(ValueError, match="resolution"):
        LossSlice(resolution=3)
