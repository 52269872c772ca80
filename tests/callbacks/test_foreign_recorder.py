"""ActivationPatternRecorder in other people's models, against plain hooks, formulas and loops."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from wandb import finish

from lightning_mnn import MNN
from lightning_mnn.callbacks import ActivationPatternRecorder, Schedule
from lightning_mnn.callbacks.pattern_store import PatternStore
from lightning_mnn.data import GaussianData
from lightning_mnn.landscape import ActivationPattern
from lightning_mnn.landscape.kinks.tracing import PatternError
from lightning_mnn.utilities.seeding import generator
from tests.children import side_by_side
from tests.foreign_models import foreign_model, foreign_trainer
from tests.strange_projects import project


class Watcher(pl.Callback):
    """Keeps the weights and what was logged, after the recorder has acted."""

    def __init__(self):
        self.weights, self.logged = {}, {}

    def on_train_start(self, trainer, pl_module):
        self.weights[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.logged[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}

    def on_train_epoch_end(self, trainer, pl_module):
        self.on_train_start(trainer, pl_module)


def above_zero(x):
    return (x > 0).flatten(1)


def winners(x, kernel, stride, padding):
    """Index of the largest of each window, (N, windows), by torch's unfold."""
    padded = F.pad(x, [padding] * 4, value=-torch.inf)
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
    return windows.argmax(-1).flatten(1)


# The module whose output a function of the forward is called on, and the layer that this is.
FUNCTIONS = {
    "functional": {"first": "F.relu", "second": "F.relu.call_2", "third": "F.relu.call_3"},
    "lenet": {"hidden": "F.relu", "features": "F.max_pool2d"},
    "transformer": {f"encoder.layers.{i}.linear1": f"encoder.layers.{i}.F.relu" for i in range(2)},
}


def reference(module, name, inputs):
    """Pieces of each layer of a model of the zoo, by hooks and formulas."""
    found, hooks = {}, []

    def note(layer, x, sizes=None):
        layer = layer if layer not in found else f"{layer}.call_2"
        found[layer] = (above_zero(x) if sizes is None else winners(x, *sizes)).to(torch.int64)

    for path, part in module.named_modules():
        if isinstance(part, nn.ReLU | nn.LeakyReLU | nn.MaxPool2d):
            sizes = (part.kernel_size, part.stride, part.padding) if isinstance(part, nn.MaxPool2d) else None
            hook = lambda _part, args, path=path, sizes=sizes: note(path, args[0], sizes)  # noqa: E731
            hooks.append(part.register_forward_pre_hook(hook))
        if layer := FUNCTIONS.get(name, {}).get(path):
            sizes = (2, 2, 0) if layer == "F.max_pool2d" else None
            hook = lambda _part, _args, out, layer=layer, sizes=sizes: note(layer, out, sizes)  # noqa: E731
            hooks.append(part.register_forward_hook(hook))
    module.eval()
    run = {"manual": "discriminator", "dict_batches": "layers"}.get(name)
    (getattr(module, run) if run else module)(inputs)
    for hook in hooks:
        hook.remove()
    return found


def statistics(now, last, start, layers):
    """What is logged of a snapshot, by loops; of layers of two pieces the upper one is active."""
    found = {"flips": 0, "flips_from_start": 0, "never_active_units": 0, "always_active_units": 0}
    pairs = sum(pieces.numel() for pieces in now.values())
    lost, active = np.zeros(len(next(iter(now.values()))), dtype=bool), 0
    for layer, pieces in now.items():
        own = {
            "flips": int((pieces != last[layer]).sum()),
            "flips_from_start": int((pieces != start[layer]).sum()),
            "distinct": len({tuple(row) for row in pieces.tolist()}),
        }
        own["hamming_from_start"] = own["flips_from_start"] / pieces.numel()
        if layers[layer].num_pieces == 2:
            own["never_active_units"] = sum(not any(unit) for unit in pieces.T.tolist())
            own["always_active_units"] = sum(all(unit) for unit in pieces.T.tolist())
            own["dead_fraction"] = own["never_active_units"] / pieces.shape[1]
            active += pieces.shape[1]
            lost |= np.array([not any(row) for row in pieces.tolist()])
        for key in found:
            found[key] += own.get(key, 0)
        found |= {f"{layer}/{key}": value for key, value in own.items()}
    found["distinct"] = len({tuple(row) for row in torch.cat(list(now.values()), dim=1).tolist()})
    found["hamming_from_start"] = found["flips_from_start"] / pairs
    found["unactivated_samples"] = int(lost.sum())
    found["dead_fraction"] = found["never_active_units"] / active
    return {f"pattern/{key}": value for key, value in found.items()}


def of_patterns(logged):
    """What was logged of patterns alone: the rest is in test_vital_signs."""
    others = ("dormant_fraction", "effective_rank", "local_complexity", "freeze_step")
    return {k: float(v) for k, v in logged.items() if k.startswith("pattern/") and not k.endswith(others)}


def pieces_of(recorder, step):
    return {layer: p.unpack_pieces().pieces for layer, p in recorder.store.read_packed(step).items()}


LAYERS = {
    "mlp": ["layers.1", "layers.3", "layers.5"],
    "lenet": ["features.1", "features.2", "features.4", "F.max_pool2d", "F.relu"],
    "resnet18": ["model.relu", "model.maxpool"]
    + [f"model.layer{i}.{j}.relu{call}" for i in range(1, 5) for j in range(2) for call in ("", ".call_2")],
    "gru": ["head.1"],
    "transformer": ["encoder.layers.0.F.relu", "encoder.layers.1.F.relu"],
    "functional": ["F.relu", "F.relu.call_2", "F.relu.call_3"],
    "dict_batches": ["layers.1"],
    "manual": ["discriminator.1"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_patterns_and_numbers_agree_with_hooks_and_loops(name, tmp_path):
    module, loader = foreign_model(name)
    recorder, watcher = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path), Watcher()
    trainer = foreign_trainer(callbacks=[recorder, watcher], max_epochs=2)
    trainer.fit(module, loader)
    assert list(recorder.layers) == LAYERS[name]
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
    fresh, _ = foreign_model(name, seed=1)
    seen = []
    for step in recorder.store.steps:
        fresh.load_state_dict(watcher.weights[step])
        inputs = loader.dataset.inputs if name == "dict_batches" else loader.dataset.tensors[0]
        batches = [reference(fresh, name, batch) for batch in inputs.split(8)]
        expected = {layer: torch.cat([batch[layer] for batch in batches]) for layer in LAYERS[name]}
        found = pieces_of(recorder, step)
        assert found.keys() == expected.keys()
        for layer, pieces in expected.items():
            assert torch.equal(found[layer], pieces), layer
            assert recorder.layers[layer].num_units == pieces.shape[1]
            assert recorder.layers[layer].num_pieces > int(pieces.max())
        seen.append(expected)
        numbers = statistics(expected, seen[-2:][0], seen[0], recorder.layers)
        numbers["pattern/regions_visited"] = sum(
            all(any((a[n] != b[n]).any() for n in a) for b in seen[:i]) for i, a in enumerate(seen)
        )
        assert of_patterns(watcher.logged[step]) == pytest.approx(numbers)
    assert recorder.summary()["regions_visited"] == numbers["pattern/regions_visited"]
    assert numbers["pattern/flips"] > 0 or name == "manual"


class Odd(pl.LightningModule):
    """Functions of all kinds, in-place ones, and blocks under checkpoints and compilation; wrappers round its ReLU."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.inplace, self.six, self.shrink = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardshrink(0.2)
        self.compiled = torch.compile(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), backend="eager")
        self.register_buffer("bound", torch.linspace(-0.1, 0.1, 7))

    def parts(self, x):
        """Pre-activations, and the pieces that they are on."""
        a = self.first(x)
        b = self.second(a.relu() - 0.1)
        c = b.relu().clamp(max=0.3)
        d = self.third(torch.maximum(c, self.bound))
        e = d.abs()
        f = 40 * F.relu6(5 * e)
        g = F.hardshrink(self.compiled._orig_mod[0](f / 100), 0.2)
        return {
            "inplace": a > 0,
            "inplace.call_2": b > 0,
            "F.clamp": b.relu() > 0.3,
            "F.maximum": c < self.bound,
            "F.abs": d > 0,
            "six": (5 * e > 0).int() + (5 * e > 6),
            "compiled.1": self.compiled._orig_mod[0](f / 100) > 0,
            "shrink": (self.compiled._orig_mod[0](f / 100) > -0.2).int() + (g > 0),
        }

    def forward(self, x):
        a = checkpoint(lambda t: self.inplace(self.first(t)), x, use_reentrant=True)
        b = checkpoint(lambda t: self.inplace(self.second(t - 0.1)), a, use_reentrant=False)
        e = self.third(torch.maximum(b.clamp_(max=0.3), self.bound)).abs_()
        f = 40 * self.six(5 * e)
        self.shrink(self.compiled._orig_mod[0](f / 100))
        return self.compiled(f / 100)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # both in training itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_checkpoints_compilation_in_place_functions_and_precisions(precision, tmp_path):
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, torch.randint(2, (12,))), batch_size=5)
    recorder = ActivationPatternRecorder(dirpath=tmp_path)
    module = Odd()
    trainer = foreign_trainer(max_epochs=1, callbacks=[recorder], precision=precision)
    trainer.fit(module, loader)
    found, expected = pieces_of(recorder, 3), {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        for batch in inputs.to(module.first.weight.dtype).split(5):
            for layer, pieces in module.parts(batch).items():
                expected.setdefault(layer, []).append(pieces.to(torch.int64))
    assert found.keys() == expected.keys()
    for layer, pieces in expected.items():
        assert torch.equal(found[layer], torch.cat(pieces)), layer
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    active = {"F.clamp": (0,), "shrink": (0, 2)}
    for layer in expected:
        units = found[layer].T.tolist()
        if layer == "F.maximum":
            assert f"pattern/{layer}/never_active_units" not in logged
            continue
        on = active.get(layer, (1,))
        never = sum(not set(unit) & set(on) for unit in units)
        always = sum(len(set(unit)) == 1 and unit[0] in on for unit in units)
        assert logged[f"pattern/{layer}/never_active_units"] == never
        assert logged[f"pattern/{layer}/always_active_units"] == always


def test_layers_are_narrowed_and_names_that_match_nothing_are_told(tmp_path):
    features = ["features.1", "features.2", "features.4"]
    for modules, expected in (("features", features), (["*.relu", "features.?"], [*features, "F.relu"])):
        module, loader = foreign_model("lenet")
        recorder = ActivationPatternRecorder(modules=modules)
        foreign_trainer(callbacks=[recorder], fast_dev_run=True).fit(module, loader)
        assert list(recorder.layers) == expected
    module, loader = foreign_model("lenet")
    with pytest.raises(TypeError, match=r"modules='nothing' matches none .* LeNet.*: features\.1, features\.2"):
        foreign_trainer(callbacks=[ActivationPatternRecorder(modules="nothing")]).fit(module, loader)


def test_the_budget_bounds_the_probe_and_what_is_held(tmp_path):
    module, loader = foreign_model("lenet", num_samples=40)
    one = 3 * sum(
        (units + 7) // 8 * digits
        for units, digits in ((4 * 28 * 28, 1), (4 * 14 * 14, 2), (6 * 10 * 10, 1), (6 * 5 * 5, 2), (16, 1))
    )
    held = []

    class Meter(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            snapshots = (recorder._first, recorder._last)
            bits = {id(p.bits): p.bits.untyped_storage().nbytes() for s in snapshots for p in s.values()}
            held.append(sum(bits.values()))

    recorder = ActivationPatternRecorder(memory_budget=30 * one + 1, dirpath=tmp_path)
    foreign_trainer(callbacks=[recorder, Meter()]).fit(module, loader)
    assert {len(p.active) for p in recorder.store.read(0).values() if hasattr(p, "active")} == {30}
    assert held == [20 * one] * 2
    for probe, budget, most in ((31, 30 * one, 30), (None, one - 1, 0)):
        recorder = ActivationPatternRecorder(probe=probe, memory_budget=budget, strict=True)
        needed = (probe or 1) * one
        with pytest.raises(ValueError, match=f"need {needed} bytes .* more than memory_budget={budget}: .* {most} sam"):
            foreign_trainer(callbacks=[recorder]).fit(module, loader)


def test_a_probe_is_a_fixed_subset_in_order(tmp_path):
    recorders = [ActivationPatternRecorder(probe=p, seed=3, dirpath=tmp_path / str(p)) for p in (None, 7)]
    for recorder in recorders:
        module, loader = foreign_model("mlp", shuffle=True)
        foreign_trainer(callbacks=[recorder]).fit(module, loader)
    whole, part = (pieces_of(recorder, 0) for recorder in recorders)
    order = torch.randperm(24, generator=generator(3, "probe"))[:7].sort().values
    for layer, pieces in part.items():
        assert torch.equal(pieces, whole[layer][order])


class Stream(IterableDataset):
    def __init__(self, inputs, targets):
        self.rows = list(zip(inputs, targets, strict=True))

    def __iter__(self):
        return iter(self.rows)


def test_of_iterable_data_the_first_batch_is_recorded(tmp_path):
    module, loader = foreign_model("functional")
    inputs, targets = loader.dataset.tensors
    stream = DataLoader(Stream(inputs, targets), batch_size=8)
    for probe, size in ((None, 8), (3, 3)):
        recorder = ActivationPatternRecorder(probe=probe, dirpath=tmp_path / str(size), strict=True)
        trainer = foreign_trainer(callbacks=[recorder])
        trainer.fit(module, stream)
        module.eval()
        assert recorder.store.steps == [0, 3, 6]
        expected = reference(module, "functional", inputs[:size])
        for layer, pieces in pieces_of(recorder, trainer.global_step).items():
            assert torch.equal(pieces, expected[layer])
        module.train()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = ActivationPatternRecorder(probe=3, dirpath=tmp_path / "3", strict=True)
    with pytest.warns(UserWarning, match="recording starts again, and flips are counted from here"):
        foreign_trainer(callbacks=[resumed], max_epochs=3).fit(module, stream, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.store.path.name == "patterns-v1.zarr"
    assert resumed.store.steps == [6, 9]


def test_of_a_first_batch_as_many_samples_are_recorded_as_fit_into_the_budget(tmp_path):
    module, loader = foreign_model("functional")
    stream = DataLoader(Stream(*loader.dataset.tensors), batch_size=8)
    one = 3 * sum(-(-units // 8) for units in (12, 12, 6))
    recorder = ActivationPatternRecorder(memory_budget=5 * one, dirpath=tmp_path, strict=True)
    foreign_trainer(callbacks=[recorder]).fit(module, stream)
    assert {len(pieces) for pieces in pieces_of(recorder, 0).values()} == {5}


def test_iterable_data_may_have_a_batch_as_probe(tmp_path):
    module, loader = foreign_model("functional")
    inputs, targets = loader.dataset.tensors
    stream = DataLoader(Stream(inputs, targets), batch_size=8)
    recorder = ActivationPatternRecorder(probe=(inputs[:5], targets[:5]), dirpath=tmp_path)
    trainer = foreign_trainer(callbacks=[recorder])
    trainer.fit(module, stream)
    module.eval()
    expected = reference(module, "functional", inputs[:5])
    for layer, pieces in pieces_of(recorder, trainer.global_step).items():
        assert torch.equal(pieces, expected[layer])
    module, loader = foreign_model("dict_batches")
    recorder = ActivationPatternRecorder(probe={"x": inputs[:1], "y": targets[:1]}, dirpath=tmp_path)
    foreign_trainer(callbacks=[recorder]).fit(module, loader)
    assert recorder.store.read(0)["layers.1"].active.shape == (1, 10)


class Calls(pl.Callback):
    """Notes what a module's forward is called with in training, from outside of the module."""

    def __init__(self):
        self.inputs = []

    def on_train_start(self, trainer, pl_module):
        self.handle = pl_module.register_forward_pre_hook(self._note)

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()

    def _note(self, module, args):
        if module.training:  # and not in a pass of the recorder
            self.inputs.append(args[0].detach().clone())


def test_what_training_calls_a_forward_with_is_recorded_where_it_takes_no_batch(tmp_path):
    module, loader = project("GAN")
    recorder, calls = ActivationPatternRecorder(dirpath=tmp_path, strict=True), Calls()
    trainer = foreign_trainer(callbacks=[calls, recorder])
    trainer.fit(module, loader)
    assert recorder.store.steps == [2, 6, 12]  # the first snapshot is after the first batch, in which there are 2 steps
    expected = (module.generator[0](calls.inputs[0]) > 0).long()
    assert torch.equal(pieces_of(recorder, 12)["generator.1"], expected)
    assert not module._forward_pre_hooks


def test_a_forward_that_training_never_calls_is_told_with_its_error():
    module, loader = project("GAN")
    module.training_step = lambda batch, batch_idx: None
    recorder = ActivationPatternRecorder()
    with pytest.warns(UserWarning, match=r"ActivationPatternRecorder stops here.*GAN.forward was called with"):
        foreign_trainer(callbacks=[recorder]).fit(module, loader)
    assert recorder.failure.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")


def test_an_unusual_forward_and_a_loss_that_draws_noise(tmp_path):
    module, loader = foreign_model("manual")
    recorder = ActivationPatternRecorder(
        forward_fn=lambda m, batch: m.generator(batch[0][:, :4].clone()), dirpath=tmp_path / "manual"
    )
    foreign_trainer(callbacks=[recorder]).fit(module, loader)
    assert list(recorder.layers) == ["generator.1"]
    expected = (module.generator[0](loader.dataset.tensors[0][:, :4]) > 0).long()
    assert torch.equal(pieces_of(recorder, recorder.store.steps[-1])["generator.1"], expected)
    module, loader = foreign_model("no_forward")
    module.lr = 0.0
    recorder = ActivationPatternRecorder(dirpath=tmp_path)
    trainer = foreign_trainer(callbacks=[recorder])
    trainer.fit(module, loader)
    assert recorder.store.steps == [0, 3, 6]
    assert list(recorder.layers) == ["layers.1"]
    assert recorder._kinks.found.opaque == ()  # no comparison of the metric either
    assert recorder.summary()["regions_visited"] == 1  # the noise is the same in each pass
    assert float(trainer.callback_metrics["pattern/flips_from_start"]) == 0


def test_training_is_bit_for_bit_as_without(tmp_path):
    outcomes = []
    for callbacks in ([], [ActivationPatternRecorder(Schedule(every=1, unit="step"), dirpath=tmp_path)]):
        module, loader = foreign_model("lenet", shuffle=True)
        pl.seed_everything(1, verbose=False)
        foreign_trainer(callbacks=callbacks).fit(module, loader)
        outcomes.append((*module.state_dict().values(), torch.rand(3)))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_goes_on_with_its_snapshots(tmp_path):
    logged, recorders = [], []
    for folder in ("whole", "resumed"):
        stops = (6,) if folder == "whole" else (3, 6)
        for epochs in stops:
            module, loader = foreign_model("lenet")
            module.dropout.p = 0.0  # whose generator is not saved
            recorders.append(ActivationPatternRecorder(Schedule(every=2), dirpath=tmp_path / folder))
            saver = ModelCheckpoint(tmp_path / folder / "saved", filename="{epoch}", save_top_k=-1)
            trainer = foreign_trainer(max_epochs=epochs, callbacks=[recorders[-1], saver], enable_checkpointing=True)
            path = tmp_path / folder / "saved" / "epoch=2.ckpt"
            trainer.fit(module, loader, ckpt_path=path if epochs == 6 and folder == "resumed" else None)
        logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("pattern/")})
    assert logged[0] == logged[1]
    assert logged[0]["pattern/flips_from_start"] > 0
    assert recorders[0].summary() == recorders[-1].summary()
    assert recorders[-1].store.path == tmp_path / "resumed" / "patterns.zarr"
    assert recorders[-1].store.steps == [0, 6, 12, 18]
    state = torch.load(tmp_path / "whole" / "saved" / "epoch=5.ckpt", weights_only=True)["callbacks"]
    assert any("ActivationPatternRecorder" in key for key in state)


def test_states_of_before_are_taken_or_passed_over():
    """As they were saved before there were layers of more than two pieces, and more layers were met."""
    module, loader = foreign_model("mlp")
    recorder = ActivationPatternRecorder()  # without a store the state holds the bits, as it always did
    foreign_trainer(callbacks=[recorder], max_epochs=1).fit(module, loader)
    state = recorder.state_dict()
    old = {
        key: {n: {"bits": p["bits"], "width": p["width"]} for n, p in state[key].items()} for key in ("first", "last")
    }
    taken = ActivationPatternRecorder()
    taken.load_state_dict({"last_step": 3, "regions": state["regions"]} | old)
    assert taken.state_dict()["regions"] == recorder.state_dict()["regions"]
    for layer, p in recorder._first.items():
        assert torch.equal(taken._first[layer].bits, p.bits)
    trainer = foreign_trainer(max_epochs=1)
    trainer.fit(module, loader)  # so that it has a loader
    taken.prepare(trainer, module)
    assert taken._first.keys() == recorder._first.keys()
    taken.load_state_dict(
        {"last_step": 3, "regions": [["a"]], "first": {}, "last": {"layers.1": old["last"]["layers.1"]}}
    )
    with pytest.warns(
        UserWarning, match=r"other layers or samples \(layers\.1 of 24 samples; now layers\.1, layers\.3"
    ):
        taken.prepare(trainer, module)
    assert (taken._last, taken._regions, taken._last_step) == ({}, [], None)


def test_what_suits_no_stated_network_is_refused(make_trainer):
    for options in ({"modules": "*"}, {"forward_fn": print}, {"probe": torch.ones(2, 3)}):
        with pytest.raises(TypeError, match=r"modules without a method network\(\); MNN has one"):
            make_trainer(max_epochs=1, callbacks=[ActivationPatternRecorder(**options)]).fit(
                MNN(3, (4,)), GaussianData(8, 3)
            )
    with pytest.raises(ValueError, match="memory_budget must be at least 1 and a whole number, got 0"):
        ActivationPatternRecorder(memory_budget=0)


def test_layers_of_an_mnn_are_told_apart(make_trainer, tmp_path):
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    trainer = make_trainer(max_epochs=3, callbacks=[recorder])
    trainer.fit(MNN(4, (7, 5), optimizer={"name": "adam", "lr": 0.1}), GaussianData(30, 4))
    steps = recorder.store.steps
    now, last, start = (pieces_of(recorder, steps[i]) for i in (-1, -2, 0))
    logged = of_patterns(trainer.callback_metrics)
    numbers = statistics(now, last, start, recorder.layers)
    assert logged == pytest.approx(numbers | {"pattern/regions_visited": logged["pattern/regions_visited"]})
    assert numbers["pattern/layer_2/flips"] + numbers["pattern/layer_1/flips"] == numbers["pattern/flips"] > 0


class Small(pl.LightningModule):
    """A forward, and a training step that may do more with it."""

    lr = 0.05

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        self.head = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        self.criterion = nn.L1Loss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Further(Small):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.head(self(batch[0]))[:, 0], batch[1])


class Hinge(Small):
    """Whose loss has kinks of its own."""

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        size = sum(p.abs().sum() for p in self.net.parameters())
        return F.relu(1 - out).mean() + self.criterion(out[:, 0], batch[1]) + 0.01 * size


class Weighted(Small):
    def forward(self, x, scale):
        return self.net(x * scale[:, None])

    def training_step(self, batch, batch_idx):
        return self(batch[0], batch[2]).square().mean()


class Clipped(Small):
    """Changes weights in its training step."""

    def training_step(self, batch, batch_idx):
        self.net[0].weight.data.mul_(0.9)
        return self.head(self(batch[0])).square().mean()


class Physics(Small):
    """The loss is of the gradient by the inputs; there is no forward."""

    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)
        return (slope - 1).square().mean()


class Picky(Physics):
    def training_step(self, batch, batch_idx):
        if not self.training:
            raise RuntimeError("for training alone")
        return super().training_step(batch, batch_idx)


def small_data(num_samples=20, parts=2, **options):
    inputs = torch.randn(num_samples, 3, generator=torch.Generator().manual_seed(1))
    others = [torch.linspace(-1, 1, num_samples).roll(3 * i) for i in range(parts - 1)]
    return DataLoader(TensorDataset(inputs, *others), **{"batch_size": 4} | options)


@pytest.mark.parametrize(
    ("kind", "layers", "told"),
    [
        (Small, ["net.1"], ""),
        (Further, ["net.1", "head.1"], "Further.training_step calls head.1, which its forward does not"),
        (Hinge, ["net.1"], ""),
        (Clipped, ["net.1"], ""),
        (Weighted, ["net.1"], "forward is called with the first 2 parts of a batch as x, scale; for another choice"),
        (Weighted, ["net.1"], "Weighted.forward has net.1 on other pieces than training_step has for the same samples"),
    ],
)
def test_the_layers_of_training_are_recorded_and_guesses_are_told(kind, layers, told, tmp_path, caplog):
    outcomes = []
    for callbacks in ([], [recorder := ActivationPatternRecorder(dirpath=tmp_path)]):
        module, loader = kind(), small_data(parts=3)
        with caplog.at_level("INFO"):
            foreign_trainer(callbacks=callbacks, max_epochs=1).fit(module, loader)
        outcomes.append([p.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert list(recorder.layers) == layers
    assert told in caplog.text
    assert told or "Activation patterns" not in caplog.text
    with torch.no_grad():
        x = loader.dataset.tensors[0]
        h = module.net[0](x * loader.dataset.tensors[1][:, None] if kind is Weighted else x)
        assert torch.equal(pieces_of(recorder, 5)["net.1"], (h > 0).long())
        if "head.1" in layers:
            assert torch.equal(pieces_of(recorder, 5)["head.1"], (module.head[0](module.net(x)) > 0).long())


def test_training_steps_may_take_gradients_and_their_failures_name_the_remedy(tmp_path):
    recorder, module, loader = ActivationPatternRecorder(dirpath=tmp_path), Physics(), small_data()
    foreign_trainer(callbacks=[recorder], max_epochs=1).fit(module, loader)
    expected = module.net[0](loader.dataset.tensors[0]) > 0
    assert torch.equal(pieces_of(recorder, 5)["net.1"], expected.long())
    with pytest.raises(TypeError, match=r"Picky.*for training alone.*forward_fn\(module, batch\)"):
        foreign_trainer(callbacks=[ActivationPatternRecorder(dirpath=tmp_path, strict=True)]).fit(Picky(), small_data())


class Diverging(Small):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 if self.global_step < 7 else torch.nan)


class Joining(Small):
    def forward(self, x):
        return self.net(x) if self.current_epoch < 2 else self.head(self.net(x))


class Reloading(pl.LightningDataModule):
    def __init__(self, *data_sets):
        super().__init__()
        self.data_sets = data_sets

    def train_dataloader(self):
        return DataLoader(self.data_sets[self.trainer.current_epoch % len(self.data_sets)], batch_size=4)


@pytest.mark.parametrize(
    ("module", "data", "why"),
    [
        (Diverging, small_data, r"after 10 steps.*input of net\.1 contains NaN"),
        (Joining, small_data, r"after 15 steps.*head\.1 is not the same"),
        (Small, lambda: Reloading(*(small_data(n).dataset for n in (20, 20, 8, 8))), "training set has 8 samples now"),
    ],
)
@pytest.mark.filterwarnings("ignore:Activation patterns. the training set is a different object")
def test_what_fails_in_the_midst_of_training_does_not_end_it(module, data, why, tmp_path):
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="Activation patterns: none are recorded") as caught:
        trainer.fit(module(), data())
    (told,) = [str(w.message) for w in caught if "none are recorded" in str(w.message)]
    assert re.search(why, told)
    assert "was called with" not in told
    assert trainer.current_epoch == 4
    assert recorder.store.steps == {Diverging: [0, 5], Joining: [0, 5, 10], Small: [0, 5, 10]}[module]
    assert recorder.state_dict()["last_step"] == recorder.store.steps[-1]


def test_errors_before_training_are_raised(tmp_path):
    module = Small()
    module.net[0].weight.data.fill_(torch.nan)
    recorder = ActivationPatternRecorder(dirpath=tmp_path, strict=True)
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=1)
    with pytest.raises(PatternError, match="contains NaN") as caught:
        trainer.fit(module, small_data())
    assert not getattr(caught.value, "__notes__", [])  # that forward was called with something wrong


def test_another_training_set_is_told_once(tmp_path):
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    same = small_data().dataset
    trainer.fit(Small(), Reloading(same))  # without a warning, which would be an error
    recorder = ActivationPatternRecorder(Schedule(every=1), dirpath=tmp_path)
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="training set is a different object than at the start") as caught:
        trainer.fit(Small(), Reloading(same, small_data().dataset))
    assert sum("a different object" in str(w.message) for w in caught) == 1


def test_batches_that_training_leaves_out_are_not_recorded(tmp_path):
    class Squeezing(Small):
        def forward(self, x):
            if len(x) == 1:
                raise RuntimeError("a single sample")
            return self.net(x)

    recorder = ActivationPatternRecorder(dirpath=tmp_path)
    foreign_trainer(callbacks=[recorder], max_epochs=1).fit(Squeezing(), small_data(21, drop_last=True))
    assert len(pieces_of(recorder, 0)["net.1"]) == 20
    recorder = ActivationPatternRecorder(probe=9, dirpath=tmp_path, strict=True)
    with pytest.raises(RuntimeError, match="a single sample") as caught:
        foreign_trainer(callbacks=[recorder]).fit(Squeezing(), small_data(21, drop_last=True))
    assert re.search(r"last batch of 1 samples.*batch_size=4, drop_last=True.*multiple", caught.value.__notes__[-1])


def test_the_store_is_in_the_folder_of_the_run(monkeypatch, tmp_path):
    """W&B's loggers have one folder for many runs, and one in it for the checkpoints of each."""
    module, loader = foreign_model("mlp")
    recorder = ActivationPatternRecorder()
    foreign_trainer(callbacks=[recorder], max_epochs=1).fit(module, loader)
    assert recorder.store is None  # without a logger nothing is written here
    assert recorder.summary()["regions_visited"] >= 1
    assert not [*tmp_path.iterdir()]
    monkeypatch.chdir(tmp_path.parent)
    csv, wandb = CSVLogger(tmp_path / "csv"), WandbLogger("x", save_dir=tmp_path, offline=True, project="p", id="abc")
    for logger, folder in ((csv, csv.log_dir), (wandb, tmp_path / "p" / "abc"), (False, tmp_path)):
        recorder = ActivationPatternRecorder()
        options = {"max_epochs": 1, "default_root_dir": tmp_path, "logger": logger}
        foreign_trainer(callbacks=[recorder], **options).fit(module, loader)
        assert recorder.store.path == Path(folder) / "patterns.zarr"
        assert recorder.store.steps
    finish()


def test_any_layer_name_can_be_stored(tmp_path):
    class Slashes(Small):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"a/b": nn.ReLU(), "a%2Fb": nn.Tanh(), "__r": nn.ReLU6()})
            self.add_module("__s", nn.ReLU())

        def forward(self, x):
            for part in (*self.parts.values(), getattr(self, "__s")):
                x = part(x)
            return self.net(x)

    recorder = ActivationPatternRecorder(dirpath=tmp_path)
    foreign_trainer(callbacks=[recorder], max_epochs=1).fit(Slashes(), small_data())
    found = pieces_of(recorder, 0)
    assert found.keys() == recorder.layers.keys() == {"parts.a/b", "parts.__r", "__s", "net.1"}
    assert torch.equal(found["parts.a/b"], (small_data().dataset.tensors[0] > 0).long())


def test_stores_without_names_of_layers_are_read(tmp_path):
    store = PatternStore(tmp_path / "patterns.zarr")
    pattern = ActivationPattern(torch.tensor([[True, False, True]]))
    store.write(2, 1, {"features.1": pattern.pack()}, "abc")
    (described,) = (tmp_path / "patterns.zarr").glob("step_*/features.1/zarr.json")
    content = json.loads(described.read_text())
    assert content["attributes"].pop("layer") == "features.1"
    described.write_text(json.dumps(content))
    assert torch.equal(PatternStore(store.path).read(2)["features.1"].active, pattern.active)


def test_a_checkpoint_with_other_names_is_recorded_anew_from_its_step(tmp_path):
    class Old(ActivationPatternRecorder):
        """Names layers as modules of one nn.Sequential were before."""

        state_key = "ActivationPatternRecorder{'probe': None, 'seed': 0}"

        def state_dict(self):
            bits = {key: {"layer_1": vars(getattr(self, f"_{key}")["net.1"])} for key in ("first", "last")}
            return super().state_dict() | bits | {"stored": {}}

    trainer = foreign_trainer(callbacks=[Old(dirpath=tmp_path)], max_epochs=1)
    trainer.fit(Small(), small_data())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    recorder = ActivationPatternRecorder(Schedule(every=9), dirpath=tmp_path)
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=3)
    with pytest.warns(UserWarning, match=r"layer_1 of 20 samples; now net\.1 of 20 samples.*recording starts again"):
        trainer.fit(Small(), small_data(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert (recorder.store.path.name, recorder.store.steps) == ("patterns-v1.zarr", [5, 15])


def in_processes(devices, folder):
    """What is found on one or two processes."""
    side_by_side(folder, devices, main, devices, folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    one, two = (in_processes(devices, tmp_path / str(devices)) for devices in (1, 2))
    assert (one.pop("world_size"), two.pop("world_size")) == (1, 2)
    assert one["digests"] == two["digests"]
    assert len(one["digests"]) == 4
    assert one["logged"] == pytest.approx(two["logged"])
    assert "padded" in one["error"]
    assert one["error"] == two["error"]


def main(devices, folder):
    torch.set_num_threads(1)
    module, _ = foreign_model("lenet")
    inputs = torch.randn(22, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, torch.arange(22) % 10), batch_size=22 // devices)
    module.dropout.p = 0.0  # of which each process would draw its own
    recorder = ActivationPatternRecorder(Schedule(every=1), probe=13, dirpath=folder)
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "precision": "64-true"}
    trainer = foreign_trainer(callbacks=[recorder], max_epochs=3, **options)
    trainer.fit(module, loader)
    found = {"world_size": trainer.world_size, "error": ""}
    found["logged"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("pattern/")}
    if trainer.is_global_zero:
        found["digests"] = [recorder.store.attributes(step)["digest"] for step in recorder.store.steps]
    rows = [torch.ones(4)] * 21 + [torch.ones(6)]  # the last one, which is not the first process's, is longer
    loader = DataLoader(rows, batch_size=11, collate_fn=lambda batch: [nn.utils.rnn.pad_sequence(batch)])
    recorder = ActivationPatternRecorder(forward_fn=lambda m, batch: F.relu(batch[0]), strict=True)
    try:
        foreign_trainer(callbacks=[recorder], max_epochs=1, **options).fit(foreign_model("mlp")[0], loader)
    except ValueError as error:
        found["error"] = str(error)
    if trainer.is_global_zero:
        (folder / "found.json").write_text(json.dumps(found))
