"""task=slice: the pictures of a finished run."""

import pytest
import torch
from PIL import Image

from lightning_mnn.results import load_run
from lightning_mnn.tasks.slice import _drawn, _states
from tests.children import command

SMALL = ("data.num_samples=20", "trainer.max_epochs=40", "~logger.wandb")
OFF = ("callbacks.angular_volume_monitor=null", "callbacks.activation_pattern_recorder=null")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    shared = (*SMALL, *OFF, "model.hidden_dims=[4]")
    command(
        folder, *shared, "data.input_dim=2", "callbacks=snapshots", "callbacks.snapshots.every_n_epochs=10",
        "hydra.run.dir=snapshots",
    )  # fmt: skip
    command(folder, *SMALL, *OFF, "data.input_dim=3", "model.hidden_dims=[4,3]", "replicas=2", "hydra.run.dir=deep")
    return folder


@pytest.mark.slow
def test_a_run_with_snapshots_gets_all_pictures(runs):
    said = command(runs, "task=slice", "folder=snapshots")
    assert [line for line in said.splitlines() if line.startswith("drawn:")] == [
        f"drawn: snapshots/{name}" for name in ("slice.png", "line.png", "inputs.png", "inputs.gif")
    ]
    with Image.open(runs / "snapshots" / "inputs.gif") as image:
        assert image.n_frames == 6  # the start, four checkpoints, the end
    assert not list(runs.glob("outputs/*"))


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["random", "curvature"])
def test_a_deep_run_with_replicas_gets_those_of_its_first_network(runs, plane):
    said = command(runs, "task=slice", "folder=deep", f"plane={plane}")
    assert "drawn: deep/slice.png" in said
    assert "inputs.gif" not in said


def test_the_trajectory_starts_where_training_did(runs):
    run = load_run(runs / "snapshots")
    module = run.module()
    states = _states(run, module)
    assert list(states) == ["step 0", "step 10", "step 20", "step 30", "step 40"]
    assert torch.equal(states["step 40"]["0.weight"], module.hidden_weights[0].double())
    assert torch.equal(states["step 0"]["0.weight"], type(module)(**module.hparams).hidden_weights[0].double())


def test_the_centre_is_the_run(runs):
    for name in ("snapshots", "deep"):
        run = load_run(runs / name)
        drawn = _drawn(run)
        module = run.module()
        with torch.no_grad():
            expected = module(drawn.inputs) if module.replicas == 1 else module(run.data().tensors()[0])[0]
            assert torch.allclose(drawn.module(drawn.inputs)[:, 0], expected, atol=1e-3)
        mse = run.summary["mse"]
        predictions = drawn.module(drawn.inputs)[:, 0]
        found = float((predictions - drawn.targets).square().mean().detach())
        assert found == pytest.approx(mse if module.replicas == 1 else mse[0], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "task=slice needs a finished run: give folder=DIR"),
        (("folder=none",), "folder=none: there is no such folder"),
        (("folder=snapshots", "plane=flat"), "plane=flat: must be one of trajectory, random, curvature"),
    ],
)
def test_mistakes_are_named_in_one_line(runs, arguments, message):
    assert message in command(runs, "task=slice", *arguments, expect=1)
