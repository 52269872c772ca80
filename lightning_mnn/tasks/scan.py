"""Train many small networks on Gaussian data at several sizes; write a table and a figure of what they converged to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_mnn.callbacks import LocalMinimumDetector, Schedule
from lightning_mnn.callbacks.evidence.tiers import Evidence
from lightning_mnn.data import GaussianData
from lightning_mnn.figures.experiments.scaling import FIGURES, scan_figure
from lightning_mnn.model.mnn import MNN
from lightning_mnn.runs.quiet import quieten
from lightning_mnn.runs.resume import run_lock
from lightning_mnn.tasks.experiment import (
    check_loggers,
    command_of_run,
    different,
    finish_experiment,
    log_to_wandb,
    number_of_processes,
    refuse_unused,
    task_settings,
)
from lightning_mnn.tasks.parts import Part, initialise_folder
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.files import relative, write_csv, write_json
from lightning_mnn.utilities.validation import ArgumentError, one_of, positive_integer, real_number
from lightning_mnn.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

THRESHOLDS = {"plus_minus": 0.0, "zero_one": 0.5}  # by labels; teacher labels have no classification error

# The reference size that N is a multiple of, and the settings on which no trained network depends.
_REFERENCES = ("square", "parameter")
_INDIFFERENT = ("input_dims", "hidden_layers", "samples_per", "ratios")

# Groups of the config that the task does not use: the settings of scan define each network and its data.
_UNUSED = dict.fromkeys(("data", "model", "trainer", "callbacks"))

# Columns that the detector computes: of the trained weights, and of the minimum next to them.
_MEASURES = (
    *("mse", "mce", "wrong", "min_preactivation", "relative_preactivation", "stationarity"),
    *("kind", "zero_error", "distance", "margin_ratio", "minimum_mse", "minimum_mce", "kinks", "rank"),
    "reason",
)

# Kinds in the printed table; None: two hidden layers, and nothing is proved.
_KIND_LABELS: dict[str | None, str] = {
    Kind.DIFFERENTIABLE_MINIMUM: "differentiable",
    Kind.KINK_MINIMUM: "on kinks",
    Kind.SADDLE: "saddle",
    Kind.NOT_STATIONARY: "not stationary",
    None: "not classified",
}


@dataclass(frozen=True)
class Size:
    """N samples, and a network with hidden layers as wide as its input.

    Attributes:
        num_samples: N.
        input_dim: d = d0 = d1 (= d2).
        hidden_layers: how many.
    """

    num_samples: int
    input_dim: int
    hidden_layers: int

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return (self.input_dim,) * self.hidden_layers

    @property
    def parameters(self) -> int:
        """All weights, d0·d1 + d1 of them with one hidden layer and d0·d1 + d1·d2 + d2 with two.

        >>> Size(20, 10, 1).parameters, Size(20, 10, 2).parameters
        (110, 210)
        """
        return self.hidden_layers * self.input_dim**2 + self.input_dim

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in the tables."""
        return {
            "num_samples": self.num_samples,
            "input_dim": self.input_dim,
            "hidden_dims": "x".join(str(width) for width in self.hidden_dims),
            "hidden_layers": self.hidden_layers,
            "parameters": self.parameters,
            "parameters_per_sample": self.parameters / self.num_samples,
        }


@dataclass(frozen=True)
class Fit:
    """A few networks of one size, trained side by side, each on its own data.

    Attributes:
        size: N and the widths.
        first: number of the first network.
        replicas: R.
        seed: seed of network 0; network r uses seed + r, for its weights and its data.
        optimizer, schedule, dtype, negative_slope: see :class:`~lightning_mnn.MNN`.
        labels: see :class:`~lightning_mnn.data.GaussianData`.
        max_epochs: number of epochs; each is one step, because batches are full.
    """

    size: Size
    first: int
    replicas: int
    seed: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    dtype: str
    labels: str
    negative_slope: float
    max_epochs: int

    @property
    def name(self) -> str:
        """Name of the part."""
        size, last = self.size, self.first + self.replicas - 1
        return f"layers_{size.hidden_layers}_d_{size.input_dim}_N_{size.num_samples}_replicas_{self.first}_{last}"

    @property
    def cost(self) -> int:
        """Multiplications of an epoch, up to a factor."""
        return self.replicas * self.size.num_samples * self.size.parameters

    def model(self) -> MNN:
        """The networks before training."""
        return MNN(
            self.size.input_dim,
            self.size.hidden_dims,
            self.negative_slope,
            self.replicas,
            optimizer=self.optimizer,
            schedule=self.schedule,
            threshold=THRESHOLDS[self.labels],
            dtype=self.dtype,
            seed=self.seed + self.first,
            default_callbacks=False,
        )

    def data(self) -> GaussianData:
        """Their data sets."""
        return GaussianData(
            self.size.num_samples,
            self.size.input_dim,
            self.labels,
            replicas=self.replicas,
            seed=self.seed + self.first,
            dtype=self.dtype,
        )

    def train(self) -> dict[str, Any]:
        """Train the networks and certify what they converged to; return a row for each.

        Raises:
            DivergenceError: the MSE of any of them is no longer finite.
        """
        quieten()
        detector = LocalMinimumDetector(Schedule(every=self.max_epochs), stop_training=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=self.max_epochs,
            log_every_n_steps=min(50, self.max_epochs),  # divergence is detected at these steps
            callbacks=[detector],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(self.model(), self.data())
        except DivergenceError as error:
            size, seed = self.size, self.seed + self.first
            where = f"N = {size.num_samples}, d = {size.input_dim}, {size.hidden_layers} hidden layer(s)"
            raise DivergenceError(f"{where}, seeds from {seed} on: {error}") from None
        found = detector.summary()
        return {"rows": [self._row(found, replica, trainer.current_epoch) for replica in range(self.replicas)]}

    def _row(self, found: dict[str, Any], replica: int, epochs: int) -> dict[str, Any]:
        number = self.first + replica
        values = {name: found[name][replica] if isinstance(found[name], list) else found[name] for name in _MEASURES}
        necessary = found["evidence"] != Evidence.CERTIFICATE and values["kind"] != Kind.NOT_STATIONARY
        if self.size.hidden_layers > 1 and (necessary or values["kind"] == Kind.UNDECIDED):
            values["kind"] = None  # nothing was proved, as the reason says
        return {**self.size.columns, "replica": number, "seed": self.seed + number, "epochs": epochs, **values}


def scan(cfg: DictConfig) -> None:
    """Train ``cfg.replicas`` networks at each size of ``cfg.scan``, and report what each of them converged to.

    The run folder gets ``scan.csv``, a row for each network, ``summary.json``, with means and counts for each size, and
    ``figure.png``. In the table ``mse``, ``mce``, ``wrong``, ``min_preactivation``, ``relative_preactivation`` and
    ``stationarity`` describe the trained weights as they are; ``kind`` and all columns after it describe the minimum
    next to them, if there is one. With two hidden layers ``kind`` is empty where nothing is proved, or where there are
    too many weights for certificates of all replicas and only necessary conditions are satisfied. Seconds are processor
    seconds.

    ``plan.json`` contains all that a network's training depends on, ``parts/`` the finished parts, which are not
    trained again. If the command is killed, at any time, and run again, it resumes and writes the same files as an
    uninterrupted run, except for the seconds. The same folder can later be used with more sizes, more replicas or
    another figure; other settings need another folder.

    Table, figure and counts also go to one W&B run, unless ``logger.mode`` is ``disabled``.

    Raises:
        ValueError: a value of the config is out of its range; the message names its key.
        FileExistsError: another process works in the folder, or it contains another run, or a scan with another plan.
        DivergenceError: the MSE of a network is no longer finite.
    """
    run_dir, settings = Path(cfg.run_dir), _settings(cfg)
    figure, processes = settings.pop("figure"), number_of_processes("scan.processes", settings.pop("processes"))
    sizes = _sizes(settings)
    plan = _plan(cfg, settings)
    fits = _fits(cfg, settings, sizes)
    with run_lock(run_dir):
        initialise_folder(run_dir, plan)
        longest_first = sorted(fits, key=lambda fit: fit.cost, reverse=True)
        command = command_of_run(run_dir)
        found = finish_experiment([Part(fit.name, fit.train) for fit in longest_first], run_dir, processes, command)
        rows = [row for fit in fits for row in found[fit.name]["rows"]]
        seconds = {size: sum(found[fit.name]["seconds"] for fit in fits if fit.size == size) for size in sizes}
        summaries = [
            size_summary(size, [row for row in rows if size.columns.items() <= row.items()], seconds[size])
            for size in sizes
        ]
        write_csv(run_dir / "scan.csv", rows)
        counts = {"networks": len(rows), "kinds": _kinds(rows), "seconds": sum(seconds.values())}
        write_json(
            run_dir / "summary.json",
            {
                "command": command,
                "figure": figure,
                **counts,
                "replicas": cfg.replicas,
                **plan,
                "scan": settings,
                "sizes": summaries,
            },
        )
        scan_figure(run_dir)
        named = {kind or "not_classified": count for kind, count in _kinds(rows).items()}  # W&B takes no key None
        log_to_wandb(cfg, run_dir, ("scan",), counts | {"kinds": named})
        _print_table(summaries, run_dir)


def size_summary(size: Size, rows: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Means and counts over the networks of one size; standard deviations are those of a sample (n − 1)."""
    errors, squares = [row["mce"] for row in rows], [row["mse"] for row in rows]
    return {
        **size.columns,
        "replicas": len(rows),
        "mce_mean": statistics.fmean(errors),
        "mce_std": statistics.stdev(errors) if len(errors) > 1 else None,
        "mse_min": min(squares),
        "mse_max": max(squares),
        "mse_geometric_mean": math.exp(statistics.fmean(map(math.log, squares))) if min(squares) > 0 else 0.0,
        "min_preactivation_median": statistics.median(row["min_preactivation"] for row in rows),
        "kinds": _kinds(rows),
        "seconds": seconds,
    }


def _kinds(rows: Sequence[dict[str, Any]]) -> dict[str | None, int]:
    return dict(Counter(row["kind"] for row in rows).most_common())


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The node ``scan`` as a dictionary, checked except for what the model and data of :class:`Fit` check."""
    settings = task_settings(cfg, "scan", "figure_5_1|figure_5_2")
    refuse_unused(cfg, "scan", _UNUSED)
    check_loggers(cfg, "scan")
    for key, what in (("input_dims", "widths"), ("hidden_layers", "numbers of layers"), ("ratios", "numbers")):
        different(f"scan.{key}", settings[key], what)
    for width in settings["input_dims"]:
        positive_integer("scan.input_dims", width)
    for key in ("max_epochs", "replicas_per_part"):
        positive_integer(f"scan.{key}", settings[key])
    positive_integer("replicas", cfg.replicas)
    for key, known in {"samples_per": _REFERENCES, "labels": tuple(THRESHOLDS), "figure": tuple(FIGURES)}.items():
        one_of(f"scan.{key}", settings[key], known)
    if not set(settings["hidden_layers"]) <= {1, 2}:
        raise ArgumentError("scan.hidden_layers", settings["hidden_layers"], "must be [1], [2] or [1,2]")
    for ratio in settings["ratios"]:
        real_number("scan.ratios", ratio, above=0)
    return settings


def _sizes(settings: dict[str, Any]) -> list[Size]:
    sizes: list[Size] = []
    for layers, width, ratio in product(settings["hidden_layers"], settings["input_dims"], settings["ratios"]):
        reference = width**2 if settings["samples_per"] == "square" else Size(1, width, layers).parameters
        size = Size(math.floor(Fraction(str(ratio)) * reference), width, layers)  # exact, as the ratio is written
        if size.num_samples < 1 or size in sizes:
            how = "no sample" if size.num_samples < 1 else f"N = {size.num_samples} a second time"
            problem = f"must not contain {ratio}, which gives {how} at d = {width}"
            raise ArgumentError("scan.ratios", settings["ratios"], problem, "leave it out, or use wider networks")
        sizes.append(size)
    return sizes


def _plan(cfg: DictConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """All that the training depends on, except the sizes and numbers of networks; part names contain those."""
    names = ("lightning_mnn", "pytorch_lightning", "torch", "numpy", "scipy")
    return {
        "seed": cfg.seed,
        "dtype": cfg.dtype,
        **{key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("optimizer", "schedule")},
        "scan": {key: value for key, value in settings.items() if key not in _INDIFFERENT},
        "versions": {name: version(name) for name in names},
    }


def _fits(cfg: DictConfig, settings: dict[str, Any], sizes: Sequence[Size]) -> list[Fit]:
    """The parts, size by size.

    One model and one data set are built here, so that errors in the settings are reported before any work.
    """
    options: dict[str, Any] = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("optimizer", "schedule")}
    options |= {key: settings[key] for key in ("labels", "negative_slope", "max_epochs")}
    options |= {"seed": cfg.seed, "dtype": cfg.dtype}
    fits = [
        Fit(size, first, min(settings["replicas_per_part"], cfg.replicas - first), **options)
        for size in sizes
        for first in range(0, cfg.replicas, settings["replicas_per_part"])
    ]
    fits[0].model()
    fits[0].data()
    return fits


def _print_table(summaries: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Print a line for each size."""
    table = Table("hidden", "N", "MCE %", "MSE", "min |w·x|", "converged to", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for size in summaries:
        spread = "" if size["mce_std"] is None else f" ± {100 * size['mce_std']:.3g}"
        kinds = ", ".join(f"{count} {_KIND_LABELS[kind]}" for kind, count in size["kinds"].items())
        table.add_row(
            size["hidden_dims"],
            f"{size['num_samples']:,}",
            f"{100 * size['mce_mean']:.3g}{spread}",
            f"{size['mse_min']:.1e} … {size['mse_max']:.1e}",
            f"{size['min_preactivation_median']:.1e}",
            kinds,
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"[bold]everything is in[/] {relative(run_dir)}")
