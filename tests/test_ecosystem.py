"""lightning-mnn in other projects: both namespaces, command lines, configurations, the entry point and loggers."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
from lightning_mnn.callbacks.environment import VARIABLE, asked_for, factory
from lightning_mnn.callbacks.scheduled import ScheduledCallback, callback_of_lightning
from lightning_mnn.data import GaussianData
from lightning_mnn.loggers.media import log_histogram, log_image, log_table
from tests.children import PATIENCE, processes, run_a_script
from tests.documented import page, undocumented_keys, undocumented_names
from tests.foreign_models import NAMESPACES, OTHERS, ZOO, cross_entropy_of, foreign_model, foreign_trainer
from tests.wandb_files import records_of

ROOT = Path(__file__).parent.parent
CALLBACKS = [LocalMinimumDetector, ActivationPatternRecorder, AngularVolumeMonitor]
OWN = ("minimum/", "pattern/", "volume/")
IN_YAML = """
trainer:
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  accelerator: cpu
  logger: false
  callbacks:
  - class_path: lightning_mnn.callbacks.LocalMinimumDetector
    init_args:
      schedule:
        class_path: lightning_mnn.callbacks.Schedule
        init_args: {every: 7}
      stop_training: false
      loss_fn: tests.foreign_models.cross_entropy_of
  - class_path: lightning_mnn.callbacks.ActivationPatternRecorder
    init_args: {schedule: {growth: 3.0, unit: step}, probe: 5}
  - class_path: lightning_mnn.callbacks.AngularVolumeMonitor
    init_args: {measure: [start, end], cones: {budget: 1.0e+6}}
"""
ON_THE_COMMAND_LINE = [
    "--trainer.callbacks+=lightning_mnn.callbacks.LocalMinimumDetector",
    "--trainer.callbacks.schedule.every=7",
    "--trainer.callbacks.stop_training=false",
    "--trainer.callbacks.loss_fn=tests.foreign_models.cross_entropy_of",
    "--trainer.callbacks+=lightning_mnn.callbacks.ActivationPatternRecorder",
    "--trainer.callbacks.schedule={growth: 3.0, unit: step}",
    "--trainer.callbacks.probe=5",
    "--trainer.callbacks+=lightning_mnn.callbacks.AngularVolumeMonitor",
    "--trainer.callbacks.measure=[start, end]",
    "--trainer.callbacks.cones.budget=1e6",
]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("way", ["yaml", "command line"])
def test_lightning_cli_makes_the_callbacks(way, namespace, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["program"])
    cli = importlib.import_module(f"{namespace}.cli")
    callback = importlib.import_module(namespace).Callback
    module, loader = foreign_model("mlp", namespace)

    class Model(type(module)):
        def train_dataloader(self):
            return loader

    (tmp_path / "mine.yaml").write_text(IN_YAML.partition("  callbacks:")[0] if way == "command line" else IN_YAML)
    options = ["--config", str(tmp_path / "mine.yaml"), *(ON_THE_COMMAND_LINE if way == "command line" else [])]
    made = cli.LightningCLI(Model, args=["fit", *options], seed_everything_default=False)
    own = made.trainer.callbacks[:3]
    assert [type(one) for one in own] == CALLBACKS
    assert all(isinstance(one, callback) for one in own)
    detector, recorder, monitor = own
    assert detector.schedule == Schedule(every=7)
    assert not detector.stop_training
    assert detector.loss_fn is cross_entropy_of
    assert (recorder.schedule, recorder.probe) == (Schedule(growth=3.0, unit="step"), 5)
    assert (monitor.measure, monitor.cones) == (("start", "end"), ConeSettings(budget=1e6))
    assert made.trainer.global_step == 6


def test_lightning_cli_reads_configs_of_before_settings_were_grouped(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    cli = importlib.import_module("pytorch_lightning.cli")
    options = {"class_path": "lightning_mnn.callbacks.AngularVolumeMonitor", "init_args": {"budget": 1e6, "probe": 4}}
    with pytest.warns(DeprecationWarning, match=r"cones=ConeSettings\(budget=…\)|LocalVolumeSettings\(probe=…\)"):
        made = cli.LightningCLI(
            type(foreign_model("mlp")[0]),
            args=[
                "--trainer.logger=false",
                "--trainer.accelerator=cpu",
                f"--trainer.callbacks=[{json.dumps(options)}]",
            ],
            run=False,
            seed_everything_default=False,
        )
    monitor = next(one for one in made.trainer.callbacks if isinstance(one, AngularVolumeMonitor))
    assert (monitor.cones, monitor.local_volume.probe) == (ConeSettings(budget=1e6), 4)


@pytest.mark.parametrize("broken", [None, SimpleNamespace()])
def test_a_missing_or_broken_lightning_does_not_matter(broken, monkeypatch):
    assert issubclass(ScheduledCallback, callback_of_lightning())
    monkeypatch.setitem(sys.modules, "lightning.pytorch", broken)
    assert callback_of_lightning() is object


class TestHydra:
    """``callbacks=mnn`` in a program that knows nothing of ours."""

    def composed(self, folder: Path, *overrides: str):
        (folder / "callbacks").mkdir(parents=True)
        (folder / "config.yaml").write_text("defaults: [_self_, {callbacks: default}]\nseed: null\n")
        (folder / "callbacks" / "default.yaml").write_text("timer: {_target_: pytorch_lightning.callbacks.Timer}\n")
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose("config", ["hydra.searchpath=[pkg://lightning_mnn.conf]", *overrides])

    @pytest.mark.parametrize("override", ["callbacks=mnn", "+callbacks@own=mnn", "callbacks=[default,mnn]"])
    def test_another_program_takes_the_callbacks(self, override, tmp_path, monkeypatch):
        config = self.composed(tmp_path / "theirs", override)
        group = config.own if "own" in override else config.callbacks
        OmegaConf.to_container(group, resolve=True, throw_on_missing=True)
        made = [instantiate(one) for one in group.values()]
        assert [type(one) for one in made if isinstance(one, ScheduledCallback)] == CALLBACKS
        assert len(made) == (4 if "default" in override else 3)
        module, loader = foreign_model("mlp")
        foreign_trainer(callbacks=made, default_root_dir=tmp_path / "run").fit(module, loader)
        assert (tmp_path / "run" / "patterns.zarr").is_dir()

    def test_its_main_config_can_take_them_beside_its_own(self, tmp_path):
        (yaml,) = re.findall(r"^# a Hydra program.*\n((?:.+\n)+?)```", page("how-to/hydra.md"), re.MULTILINE)
        (tmp_path / "callbacks").mkdir()
        (tmp_path / "config.yaml").write_text(yaml)
        (tmp_path / "callbacks" / "default.yaml").write_text("timer: {_target_: pytorch_lightning.callbacks.Timer}\n")
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            callbacks = compose("config").callbacks
        made = [instantiate(one) for one in callbacks.values()]
        assert [type(one).__name__ for one in made] == ["Timer", *(kind.__name__ for kind in CALLBACKS)]

    def test_its_own_overrides_reach_them(self, tmp_path):
        config = self.composed(
            tmp_path / "theirs", "callbacks=mnn", "callbacks.activation_pattern_recorder.probe=7",
            "callbacks.local_minimum_detector.schedule.every=3", "callbacks.angular_volume_monitor=null",
            "++callbacks.local_minimum_detector.loss_fn="
            "{_target_: hydra.utils.get_method, path: tests.foreign_models.cross_entropy_of}",
        )  # fmt: skip
        detector, recorder = (instantiate(one) for one in config.callbacks.values() if one is not None)
        assert (detector.schedule, detector.loss_fn, recorder.probe) == (Schedule(every=3), cross_entropy_of, 7)

    def test_our_own_program_sets_their_folder_and_seed(self):
        with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
            own = compose("config", ["run_dir=there", "seed=5"]).callbacks
        recorder, monitor = own.activation_pattern_recorder, own.angular_volume_monitor
        assert (recorder.dirpath, recorder.seed, monitor.seed) == ("there", 5, 5)


class TestEntryPoint:
    @pytest.mark.parametrize("value", [None, "", "0"])
    def test_it_is_off_and_imports_nothing_heavy(self, value):
        environment = {name: v for name, v in os.environ.items() if name != VARIABLE}
        environment |= {} if value is None else {VARIABLE: value}
        code = (
            "import sys, lightning_mnn.callbacks.environment as entry; assert entry.factory() == []; "
            "assert not {'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)

    def test_a_program_that_knows_nothing_gets_them(self, tmp_path):
        """In the other namespace, which is imported last."""
        program = tmp_path / "program.py"
        program.write_text(
            "import lightning_mnn.callbacks.added\n"
            "import lightning.pytorch as other\n"
            "from tests.foreign_models import foreign_model, foreign_trainer\n"
            "trainer = foreign_trainer('lightning.pytorch')\n"
            "trainer.fit(*foreign_model('mlp', 'lightning.pytorch'))\n"
            "own = [one for one in trainer.callbacks if hasattr(one, 'schedule')]\n"
            "assert all(isinstance(one, other.Callback) for one in own)\n"
            "print(*(type(one).__name__ for one in own), *trainer.callback_metrics)\n"
        )
        process = processes.Process(target=run_a_script, args=(tmp_path, "program.py", (), {VARIABLE: "1"}))
        process.start()
        process.join(PATIENCE)
        told = Path("err.txt").read_text()
        assert process.exitcode == 0, told
        said = Path("out.txt").read_text().split()
        assert said[:3] == [kind.__name__ for kind in CALLBACKS]
        assert {"pattern/flips", "train_loss"} <= set(said)
        assert any(name.startswith("minimum/") for name in said)
        assert "does nothing" not in told
        assert "LocalMinimumDetector: " in told  # what it found, by rank_zero_info

    def test_names_choose_and_unknown_ones_are_refused(self, monkeypatch):
        assert asked_for("detector,monitor,detector") == (("detector", "monitor"), "full")
        monkeypatch.setenv(VARIABLE, "recorder, minotaur")
        with pytest.raises(ValueError, match=r"LIGHTNING_MNN_CALLBACKS must be .* there is no minotaur"):
            factory()

    def test_what_the_program_gave_stays_alone(self, monkeypatch, tmp_path):
        monkeypatch.setenv(VARIABLE, "1")
        own = [ActivationPatternRecorder(probe=5), ActivationPatternRecorder(probe=7), AngularVolumeMonitor()]
        trainer = foreign_trainer(callbacks=[*own], default_root_dir=tmp_path, max_epochs=1)
        trainer.fit(*foreign_model("mlp"))
        kinds = [type(one) for one in trainer.callbacks if isinstance(one, ScheduledCallback)]
        assert sorted(kinds, key=str) == sorted([type(one) for one in own] + [LocalMinimumDetector], key=str)
        assert kinds.index(LocalMinimumDetector) < kinds.index(AngularVolumeMonitor)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(*foreign_model("mlp"))
        assert [type(one) for one in trainer.callbacks if isinstance(one, ScheduledCallback)] == kinds

    def test_what_the_module_brings_stays_alone(self, monkeypatch, make_trainer):
        monkeypatch.setenv(VARIABLE, "1")
        trainer = make_trainer(max_epochs=2)
        trainer.fit(MNN(6, (5,)), GaussianData(20, 6))
        kinds = [type(one) for one in trainer.callbacks if isinstance(one, ScheduledCallback)]
        assert sorted(kinds, key=str) == sorted(CALLBACKS, key=str)
        assert next(one for one in trainer.callbacks if isinstance(one, LocalMinimumDetector)).stop_training

    @pytest.mark.usefixtures("away")
    def test_a_run_resumes_with_their_states(self, monkeypatch, tmp_path):
        monkeypatch.setenv(VARIABLE, "recorder")
        trainer = foreign_trainer(max_epochs=3, default_root_dir=tmp_path)
        trainer.fit(*foreign_model("mlp"))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        again = foreign_trainer(max_epochs=5, default_root_dir=tmp_path)
        again.fit(*foreign_model("mlp", seed=1), ckpt_path=tmp_path / "a.ckpt")
        recorders = [
            next(one for one in run.callbacks if isinstance(one, ActivationPatternRecorder)) for run in (trainer, again)
        ]
        assert recorders[1].store.path == recorders[0].store.path  # gone on with
        assert recorders[1].store.steps == [0, 3, 6, 9, 12, 15]

    @pytest.mark.parametrize(("what", "name"), [("no kinks", "recorder"), ("iterable", "monitor")])
    def test_where_they_cannot_work_they_warn_once_and_the_run_goes_on(self, what, name, monkeypatch, tmp_path):
        monkeypatch.setenv(VARIABLE, name)
        module, loader = foreign_model("mlp")
        if what == "no kinks":
            module.layers = torch.nn.Sequential(torch.nn.Linear(8, 3))
        else:

            class Stream(torch.utils.data.IterableDataset):
                def __iter__(self):
                    return iter(foreign_model("mlp")[1].dataset)

            loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
        trainer = foreign_trainer(default_root_dir=tmp_path)
        with pytest.warns(UserWarning, match=r"(Recorder|Monitor) stops here, and training goes on") as told:
            trainer.fit(module, loader)
        assert sum("training goes on" in str(one.message) for one in told) == 1
        assert trainer.global_step == 6
        assert "train_loss" in trainer.callback_metrics


class TestLoggers:
    """What was logged is read back from the files that each logger wrote."""

    @pytest.mark.parametrize("namespace", NAMESPACES)
    def test_all_get_the_same_scalars_at_the_steps_of_the_schedules(self, namespace, tmp_path):
        import wandb

        loggers = importlib.import_module(f"{namespace}.loggers")
        made = [
            loggers.CSVLogger(tmp_path / "csv"),
            loggers.TensorBoardLogger(tmp_path / "board"),
            loggers.WandbLogger(save_dir=tmp_path, offline=True),
        ]
        callbacks = [
            LocalMinimumDetector(Schedule(every=2), stop_training=False),
            ActivationPatternRecorder(Schedule(every=2, unit="step")),
            AngularVolumeMonitor(
                Schedule(every=1),
                measure=("start", "end"),
                measure_every=1,
                local_volume=LocalVolumeSettings(num_draws=4),
            ),
        ]
        trainer = foreign_trainer(namespace, logger=made, callbacks=callbacks, max_epochs=3)
        try:
            trainer.fit(*foreign_model("mlp", namespace))
        finally:
            wandb.finish()
        table, board, cloud = from_csv(made[0]), from_tensorboard(made[1]), from_wandb(tmp_path)
        steps = {"minimum": [0, 6, 9], "pattern": [0, 2, 4, 6, 8, 9], "volume": [0, 3, 6, 9]}
        assert {name.partition("/")[0] for name in table} == set(steps)
        for name, values in table.items():
            assert set(values) <= set(steps[name.partition("/")[0]])
            assert board[name] == pytest.approx(values, rel=1e-6)  # of single precision
            assert cloud[name] == pytest.approx(values)
        assert list(table["pattern/flips"]) == steps["pattern"]
        assert list(table["minimum/loss"]) == steps["minimum"]
        last = {name: values[9] for name, values in table.items() if 9 in values}
        assert last == pytest.approx({name: float(trainer.callback_metrics[name]) for name in last})
        assert (Path(made[0].log_dir) / "patterns.zarr").is_dir()

    @pytest.mark.parametrize("namespace", NAMESPACES)
    def test_tensorboard_shows_histograms_and_pictures_and_csv_passes_over_them(self, namespace, tmp_path):
        from matplotlib.figure import Figure

        loggers = importlib.import_module(f"{namespace}.loggers")
        Figure(figsize=(2, 1), dpi=50).savefig(tmp_path / "a.png")
        board, table = loggers.TensorBoardLogger(tmp_path), loggers.CSVLogger(tmp_path)
        assert log_histogram(board, "units", torch.tensor([1.0, 2.0, 4.0]), 3)
        assert log_image(board, "figure", tmp_path / "a.png", 4)
        assert not log_histogram(table, "units", torch.ones(2), 3)
        assert not log_image(table, "figure", tmp_path / "a.png", 4)
        assert not log_table(board, "rows", ["a"], [[1]], 5)
        board.experiment.flush()
        events = events_of(board)
        (histogram,), (image,) = events.Histograms("units"), events.Images("figure")
        assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (3, 3, 7)
        assert (image.step, image.width, image.height) == (4, 100, 50)


def from_csv(logger):
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(OWN)]
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in names}


def events_of(logger):
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return events


def from_tensorboard(logger):
    events = events_of(logger)
    names = [name for name in events.Tags()["scalars"] if name.startswith(OWN)]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def from_wandb(folder):
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for row in (record["history"]["item"] for record in records_of(path) if "history" in record):
        for name, value in row.items():
            if name.startswith(OWN):
                found.setdefault(name, {})[row["trainer/global_step"]] = value
    return found


class Names(Logger):
    """Keeps the names that are logged."""

    name = version = "names"

    def __init__(self):
        super().__init__()
        self.logged = set()

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged |= {name for name in metrics if name.startswith(OWN)}


def test_each_scalar_name_and_each_key_of_a_summary_is_documented(tmp_path, make_trainer):
    names, keys = Names(), set()
    for name in [*ZOO, *OTHERS]:
        if name == "resnet18":  # it has the names of the others, and takes long
            continue
        callbacks = [
            LocalMinimumDetector(second_order=SecondOrderSettings(max_products=3)),
            ActivationPatternRecorder(dirpath=tmp_path / name),
            AngularVolumeMonitor(local_volume=LocalVolumeSettings(probe=4, sigmas=(1e-4, 1e-2, 1.0), num_draws=2)),
        ]
        foreign_trainer(logger=names, callbacks=callbacks, max_epochs=1).fit(*foreign_model(name, num_samples=8))
        keys |= {key for callback in callbacks for key in callback.summary()}
    for widths in ((6,), (5, 4)):
        trainer = make_trainer(logger=names, max_epochs=2, callbacks=[ActivationPatternRecorder(dirpath=tmp_path)])
        trainer.fit(MNN(6, widths), GaussianData(20, 6))
    assert len(names.logged) > 100
    assert undocumented_names(names.logged) == []
    assert undocumented_keys("summary.json", keys) == []
