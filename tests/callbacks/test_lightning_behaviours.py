"""With all three callbacks on, Lightning behaves as without, in both of its namespaces and in other people's models."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_mnn.callbacks import (
    ActivationPatternRecorder,
    AngularVolumeMonitor,
    LocalMinimumDetector,
    LocalVolumeSettings,
    Schedule,
)
from tests.children import side_by_side
from tests.foreign_models import NAMESPACES, ZOO, foreign_model, foreign_trainer

both = pytest.mark.parametrize("namespace", NAMESPACES)
OWN = ("minimum/", "pattern/", "volume/")


def three_callbacks(folder):
    few = LocalVolumeSettings(probe=8, sigmas=(1e-3, 1e-2, 1e-1), num_draws=4)
    return [
        LocalMinimumDetector(Schedule(every=1), stop_training=False, strict=True),
        ActivationPatternRecorder(Schedule(every=1, unit="step"), dirpath=folder, strict=True),
        AngularVolumeMonitor(Schedule(every=1), measure_every=2, local_volume=few, strict=True),
    ]


def train(namespace, folder, name="mlp", *, module=None, loader=None, ckpt_path=None, seed=0, **options):
    """A run with the three callbacks, or with those in the options, from generators that are seeded."""
    made = foreign_model(name, namespace, seed=seed, num_samples=8 if name == "resnet18" else 24)
    module, loader = made[0] if module is None else module, made[1] if loader is None else loader
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    trainer = foreign_trainer(namespace, **{"callbacks": three_callbacks(folder), "default_root_dir": folder} | options)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def generators():
    """What each shared generator would draw next."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002, S311
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])
    return drawn


def logged(trainer, *, own):
    metrics = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith(OWN) == own}


def is_clean(module):
    """Whether nothing that a pass needs is left on the submodules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(
        not any(getattr(part, kind) for kind in hooks) and not {"forward", "log", "log_dict"} & set(vars(part))
        for part in module.modules()
    )


def same_state(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def recorder_of(trainer):
    return next(one for one in trainer.callbacks if isinstance(one, ActivationPatternRecorder))


def detector_of(trainer):
    return next(one for one in trainer.callbacks if isinstance(one, LocalMinimumDetector))


def digests(trainer):
    store = recorder_of(trainer).store
    return {step: store.attributes(step)["digest"] for step in store.steps}


@pytest.mark.parametrize(
    ("name", "namespace"),
    [
        (name, namespace)
        for name in (*ZOO, "no_forward", "dict_batches")
        for namespace in NAMESPACES
        if (name, namespace) != ("resnet18", NAMESPACES[0])  # which takes long
    ],
)
def test_training_is_bit_for_bit_as_without_them(name, namespace, tmp_path):
    epochs = 1 if name == "resnet18" else 3
    module, trainer = train(namespace, tmp_path / "with", name, max_epochs=epochs)
    with_them = generators()
    alone, plain = train(namespace, tmp_path / "without", name, max_epochs=epochs, callbacks=[])
    assert same_state(module, alone)
    assert with_them == generators()
    assert logged(trainer, own=False) == logged(plain, own=False)
    assert [part.training for part in module.modules()] == [part.training for part in alone.modules()]
    assert is_clean(module)
    assert vars(module).keys() == vars(alone).keys()
    assert {name.partition("/")[0] + "/" for name in logged(trainer, own=True)} == set(OWN)


@both
def test_fast_dev_run(namespace, tmp_path):
    module, trainer = train(namespace, tmp_path / "run", fast_dev_run=True)
    assert trainer.global_step == 1
    assert not (tmp_path / "run" / "patterns.zarr").exists()
    assert recorder_of(trainer).store is None
    assert is_clean(module)


@both
def test_a_run_resumed_has_the_numbers_of_an_unbroken_one(namespace, tmp_path):
    module, unbroken = train(namespace, tmp_path / "unbroken", max_epochs=4)
    _, started = train(namespace, tmp_path / "broken", max_epochs=2)
    started.save_checkpoint(tmp_path / "a.ckpt")
    again, resumed = train(
        namespace, tmp_path / "broken", max_epochs=4, ckpt_path=tmp_path / "a.ckpt", seed=1, loader=_loader(namespace)
    )
    assert same_state(module, again)
    expected = logged(unbroken, own=True)  # and what was logged only before the break
    assert logged(resumed, own=True) == {name: expected[name] for name in logged(resumed, own=True)}
    assert digests(resumed) == digests(unbroken)
    assert list(digests(resumed)) == list(range(13))
    for found, expected in zip(resumed.callbacks[:3], unbroken.callbacks[:3], strict=True):
        assert found.summary() == expected.summary()


def _loader(namespace):
    return foreign_model("mlp", namespace)[1]


@both
def test_accumulated_gradients_make_one_step(namespace, tmp_path):
    module, trainer = train(namespace, tmp_path / "with", accumulate_grad_batches=3)
    alone, _ = train(namespace, tmp_path / "without", accumulate_grad_batches=3, callbacks=[])
    assert same_state(module, alone)
    assert recorder_of(trainer).store.steps == [0, 1, 2]


@both
def test_of_few_batches_the_training_set_is_still_the_whole(namespace, tmp_path):
    module, trainer = train(namespace, tmp_path / "with", limit_train_batches=1)
    alone, _ = train(namespace, tmp_path / "without", limit_train_batches=1, callbacks=[])
    assert same_state(module, alone)
    store = recorder_of(trainer).store
    assert store.steps == [0, 1, 2]
    assert all(layer.active.shape[-2] == 24 for layer in store.read(2).values())


@both
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["step", "pass"])
def test_an_error_leaves_nothing_behind(place, error, namespace, tmp_path):
    """In a step of training, or in a forward pass of a callback, in eval mode."""
    module, loader = foreign_model("mlp", namespace)
    kind = type(module)

    class Failing(kind):
        steps = 0

        def forward(self, x):
            if self.steps == 4 and self.training == (place == "step"):
                raise error
            return super().forward(x)

        def on_train_batch_start(self, batch, batch_idx):
            self.steps += 1

    module.__class__ = Failing
    trainer = foreign_trainer(namespace, callbacks=three_callbacks(tmp_path), default_root_dir=tmp_path)
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, loader)
    assert trainer.global_step == (3 if place == "step" else 4)
    assert is_clean(module)
    assert all(part.training for part in module.modules())
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    module.__class__ = kind
    module, trainer = train(namespace, tmp_path, module=module, callbacks=trainer.callbacks[:3])
    assert trainer.global_step == 6


@both
def test_mixed_precision_on_the_cpu(namespace, tmp_path):
    module, trainer = train(namespace, tmp_path / "with", precision="bf16-mixed")
    alone, _ = train(namespace, tmp_path / "without", precision="bf16-mixed", callbacks=[])
    assert same_state(module, alone)
    assert all(np.isfinite(value) for value in logged(trainer, own=True).values())
    assert len(digests(trainer)) == 7


@both
def test_a_compiled_part(namespace, tmp_path):
    def compiled():
        module, _ = foreign_model("mlp", namespace)
        module.layers = torch.compile(module.layers, backend="eager")
        return module

    module, trainer = train(namespace, tmp_path / "with", module=compiled())
    alone, _ = train(namespace, tmp_path / "without", module=compiled(), callbacks=[])
    assert same_state(module, alone)
    _, plain = train(namespace, tmp_path / "plain")
    assert digests(trainer) == digests(plain)
    assert logged(trainer, own=True).keys() == logged(plain, own=True).keys()


@both
def test_a_loader_with_workers(namespace, tmp_path):
    data = _loader(namespace).dataset
    loader = DataLoader(data, batch_size=8, num_workers=1)
    module, trainer = train(namespace, tmp_path / "with", loader=loader)
    _, plain = train(namespace, tmp_path / "plain")
    alone, _ = train(
        namespace, tmp_path / "without", loader=DataLoader(data, batch_size=8, num_workers=1), callbacks=[]
    )
    assert same_state(module, alone)
    assert digests(trainer) == digests(plain)
    assert logged(trainer, own=True) == logged(plain, own=True)


@both
def test_shuffled_batches_are_those_without_them(namespace, tmp_path):
    made = [foreign_model("mlp", namespace, shuffle=True)[1] for _ in range(2)]
    module, _ = train(namespace, tmp_path / "with", loader=made[0])
    alone, _ = train(namespace, tmp_path / "without", loader=made[1], callbacks=[])
    assert same_state(module, alone)


@both
def test_a_stream_of_samples_is_refused_with_the_remedy(namespace, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(_loader(namespace).dataset)

    callback = three_callbacks(tmp_path)[2]
    with pytest.raises(TypeError, match=r"IterableDataset cannot be enumerated: train on a map-style data set"):
        train(namespace, tmp_path, loader=DataLoader(Stream(), batch_size=8), callbacks=[callback])


@both
def test_several_optimisers_by_hand(namespace, tmp_path):
    module, trainer = train(namespace, tmp_path / "with", "manual")
    alone, plain = train(namespace, tmp_path / "without", "manual", callbacks=[])
    assert same_state(module, alone)
    assert logged(trainer, own=False) == logged(plain, own=False)
    assert is_clean(module)
    assert recorder_of(trainer).store.steps == [0, 2, 4, 6, 8, 10, 12]
    assert "loss_fn" in json.dumps(detector_of(trainer).summary())


@both
def test_copies_of_the_callbacks_are_independent(namespace, tmp_path):
    own = three_callbacks(tmp_path / "first")
    copies = copy.deepcopy(own)
    train(namespace, tmp_path / "first", callbacks=own, max_epochs=1)
    assert all(one.summary() != other.summary() for one, other in zip(own, copies, strict=True))


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    """In one step an epoch, as over processes Lightning shuffles; in float64, as the nearest kink shows rounding."""
    side_by_side(tmp_path, 2, _in_two_processes, tmp_path)
    data = _loader("pytorch_lightning").dataset
    for namespace in NAMESPACES:
        found = json.loads((tmp_path / f"{namespace}.json").read_text())
        folder = tmp_path / "one" / namespace
        _, trainer = train(namespace, folder, loader=DataLoader(data, batch_size=24), **IN_STEP)
        assert found["world_size"] == 2
        assert found["digests"] == {str(step): digest for step, digest in digests(trainer).items()}
        assert found["logged"] == pytest.approx(logged(trainer, own=True), rel=1e-6, abs=1e-9)


IN_STEP = {"max_epochs": 4, "precision": "64-true"}


def _in_two_processes(folder):
    for namespace in NAMESPACES:
        loader = DataLoader(_loader(namespace).dataset, batch_size=12)
        _, trainer = train(namespace, folder / namespace, loader=loader, devices=2, strategy="ddp", **IN_STEP)
        if trainer.is_global_zero:
            found = {"world_size": trainer.world_size, "digests": digests(trainer), "logged": logged(trainer, own=True)}
            (folder / f"{namespace}.json").write_text(json.dumps(found))
