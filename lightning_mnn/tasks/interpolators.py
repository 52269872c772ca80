"""Compare random networks that make no training error with trained ones: a table, a figure and a summary."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lightning_mnn.data.loaders.selection import changed_labels
from lightning_mnn.figures import interpolators_figure
from lightning_mnn.figures.sweep_bands import half_width
from lightning_mnn.landscape import Architecture, random_interpolators
from lightning_mnn.landscape.volumes.rare_events.interpolators import QUANTILES
from lightning_mnn.model.zero_error import OPTIMIZERS, train_to_zero_error
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
from lightning_mnn.utilities.files import relative, write_csv, write_json
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import (
    ArgumentError,
    one_of,
    positive_integer,
    real_number,
    seed_number,
    truth_value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig
    from torch import Tensor

# Parts of the config that the task does not use, with their defaults.
_UNUSED = dict.fromkeys(("data", "model", "optimizer", "schedule", "trainer", "callbacks")) | {
    "replicas": 1,
    "dtype": "float64",
}

# Settings on which no part depends; names of parts contain those that choose the data and the network.
_INDIFFERENT = ("num_samples", "networks", "label_noise", "data_sets")

_OF_TRAINED = ("optimizer", "lr", "batch_size")  # keys of an optimiser's node

RANDOM = "random"  # prefix of the columns of random interpolators, beside the optimisers' names


@dataclass(frozen=True)
class Problem:
    """A data set for a network.

    Attributes:
        num_samples: N.
        network: the architecture of random and trained networks.
        label_noise: fraction of the training labels that are flipped, rounded to whole samples.
        teacher: widths of the hidden layers of the random network whose signs are the labels; None: random labels.
        num_test: T.
        seed: of teacher and data. Data sets of one seed at several N share their teacher and test set.
    """

    num_samples: int
    network: Architecture
    label_noise: float
    teacher: tuple[int, ...] | None
    num_test: int
    seed: int

    @property
    def label(self) -> str:
        """Its part of the names of files."""
        return f"{self.hidden_dims}_N_{self.num_samples}_noise_{self.label_noise}_seed_{self.seed}"

    @property
    def hidden_dims(self) -> str:
        """Widths of the hidden layers, such as 10x10."""
        return "x".join(map(str, self.network.hidden_dims)) or "none"

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in the table, without the data set."""
        return {
            "hidden_dims": self.hidden_dims,
            "label_noise": self.label_noise,
            "num_samples": self.num_samples,
            "input_dim": self.network.input_dim,
            "weights": self.network.num_weights,
        }

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and labels ±1 of the training set, (N, d0) and (N,), and of the test set, float64."""
        teacher = None
        if self.teacher is not None:
            teacher = Architecture(self.network.input_dim, self.teacher)
            draw = generator(self.seed, "interpolators teacher")
            theta = torch.randn(1, teacher.num_weights, generator=draw, dtype=torch.float64)

        def samples(count: int, *purpose: str | int) -> tuple[Tensor, Tensor]:
            draw = generator(self.seed, "interpolators inputs", *purpose)
            inputs = torch.randn(count, self.network.input_dim, generator=draw, dtype=torch.float64)
            if teacher is None:
                return inputs, 2.0 * torch.randint(0, 2, (count,), generator=draw) - 1
            return inputs, torch.where(teacher.outputs(theta, inputs)[0] > 0, 1.0, -1.0).double()

        inputs, labels = samples(self.num_samples, "train", self.num_samples)
        labels = changed_labels(labels, [self.seed], self.label_noise, random_labels=False)
        return inputs, labels.double(), *samples(self.num_test, "test")

    def sample(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What random interpolators do, by columns; the options are those of splitting."""
        inputs, labels, test_inputs, test_labels = self.draw()
        found = random_interpolators(
            inputs,
            labels,
            self.network.hidden_dims,
            negative_slope=self.network.negative_slope,
            bias=self.network.bias,
            threshold=0.0,
            test_inputs=test_inputs,
            test_targets=test_labels,
            seed=self.seed,
            **options,
        )
        probability, error = found.probability, found.test_error
        quantiles = found.quantiles or dict.fromkeys(QUANTILES)
        return {
            "log_probability": probability.log_value,
            "log_probability_low": probability.log_low,
            "log_probability_high": probability.log_high,
            f"{RANDOM}_test_error": None if error is None else error.value,
            f"{RANDOM}_test_error_low": None if error is None else error.low,
            f"{RANDOM}_test_error_high": None if error is None else error.high,
            **{f"{RANDOM}_test_error_{100 * q:g}_percent": value for q, value in quantiles.items()},
            "levels": found.levels,
            "evaluations": found.evaluations,
        }

    def train(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """What trained networks do, by columns; the options are those of the training."""
        inputs, labels, test_inputs, test_labels = self.draw()
        batch = options["batch_size"]
        options = {**options, "batch_size": None if batch is None else min(batch, self.num_samples)}
        found = train_to_zero_error(self.network, inputs, labels, seed=self.seed, **options)
        errors: list[float] = []
        if reached := int(found.reached.sum()):
            outputs = self.network.outputs(found.weights[found.reached], test_inputs)
            errors = (outputs * test_labels <= 0).double().mean(1).tolist()
        return {
            f"{name}_networks": options["replicas"],
            f"{name}_interpolating": reached,
            f"{name}_test_error": statistics.fmean(errors) if errors else None,
            f"{name}_test_error_std": statistics.stdev(errors) if reached > 1 else None,
            f"{name}_steps_median": statistics.median(found.steps[found.reached].tolist()) if reached else None,
        }


def interpolators(cfg: DictConfig) -> None:
    """Estimate how probable random interpolators are, and compare their test errors with those of trained networks.

    The run folder gets ``interpolators.csv``, a row for each network, label noise, N and data set, ``summary.json``,
    with means over the data sets, and ``figure.png``. Logarithms are natural. Trained networks that make training
    errors after ``max_steps`` steps are counted and left out of the test errors.

    ``plan.json`` contains all that the results depend on, ``parts/`` the finished parts, which are not done again. If
    the command is killed, at any time, and run again, it resumes and writes the same files as an uninterrupted run,
    except for the seconds, which are processor seconds. The same folder can later be used with other sizes and networks
    and more data sets; other settings need another folder.

    Table, figure and means also go to one W&B run, unless ``logger.mode`` is ``disabled``.

    Raises:
        ValueError: a value of the config is out of its range; the message names its key.
        FileExistsError: another process works in the folder, or it contains another run, or one with another plan.
    """
    run_dir, settings = Path(cfg.run_dir), _settings(cfg)
    processes = number_of_processes("interpolators.processes", settings.pop("processes"))
    problems = _problems(settings, cfg.seed)
    versions = {name: version(name) for name in ("lightning_mnn", "torch", "numpy", "scipy")}
    kept = {key: value for key, value in settings.items() if key not in _INDIFFERENT}
    plan = {"seed": cfg.seed, "interpolators": kept, "versions": versions}
    parts = {problem: _parts(problem, settings) for problem in problems}
    with run_lock(run_dir):
        initialise_folder(run_dir, plan)
        command = command_of_run(run_dir)
        longest_first = sorted(problems, key=lambda problem: problem.num_samples, reverse=True)
        everything = [part for problem in longest_first for part in parts[problem]]
        found = finish_experiment(everything, run_dir, processes, command)
        rows = [_row(problem, cfg.seed, [found[part.name] for part in parts[problem]]) for problem in problems]
        means = case_means(rows, list(settings["trained"]))
        seconds = sum(row["seconds"] for row in rows)
        write_csv(run_dir / "interpolators.csv", rows)
        write_json(
            run_dir / "summary.json",
            {"command": command, "seconds": seconds, **plan, "interpolators": settings, "cases": means},
        )
        interpolators_figure(run_dir)
        log_to_wandb(cfg, run_dir, ("interpolators",), {"seconds": seconds, "cases": means})
        Console(soft_wrap=True, highlight=False).print(f"[bold]everything is in[/] {relative(run_dir)}")


def case_means(rows: Sequence[Mapping[str, Any]], trained: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the data sets of each network, label noise and N, with 95 % intervals over the data sets.

    ``NAME_minus_random`` is the mean of the differences on the data sets on which both are known.
    """
    keys = ("hidden_dims", "label_noise", "num_samples", "input_dim", "weights")
    cases: list[dict[str, Any]] = []
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        same = [row for row in rows if tuple(row[key] for key in keys) == case]
        means: dict[str, Any] = {**dict(zip(keys, case, strict=True)), "data_sets": len(same)}
        logs = [row["log_probability"] for row in same]
        means |= mean_with_interval("log_probability", [log for log in logs if log is not None and log > -torch.inf])
        means["not_reached"] = sum(log is None or log == -torch.inf for log in logs)
        for name in (RANDOM, *trained):
            column = f"{name}_test_error"
            found = mean_with_interval(column, [row[column] for row in same if row[column] is not None])
            means |= {key: None if value is None else min(max(value, 0.0), 1.0) for key, value in found.items()}
        for name in trained:
            for column in (f"{name}_networks", f"{name}_interpolating"):
                means[column] = sum(row[column] for row in same)
            pairs = [(row[f"{name}_test_error"], row[f"{RANDOM}_test_error"]) for row in same]
            differences = [one - other for one, other in pairs if one is not None and other is not None]
            means |= mean_with_interval(f"{name}_minus_random", differences)
        cases.append(means)
    return cases


def mean_with_interval(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean of independent values and the ends of its 95 % interval, by Student's t; None if it is unknown.

    >>> mean_with_interval("x", [1.0])
    {'x': 1.0, 'x_low': None, 'x_high': None}
    """
    mean = statistics.fmean(values) if values else None
    if mean is None or len(values) < 2:
        return {name: mean, f"{name}_low": None, f"{name}_high": None}
    half = half_width(values)
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def _parts(problem: Problem, settings: Mapping[str, Any]) -> list[Part]:
    splitting = {key: settings[key] for key in ("particles", "runs", "steps")}
    training = {key: settings[key] for key in ("replicas", "max_steps")}
    parts = [Part(f"{RANDOM}_{problem.label}", partial(problem.sample, splitting))]
    for name, options in settings["trained"].items():
        parts.append(Part(f"{name}_{problem.label}", partial(problem.train, name, options | training)))
    return parts


def _row(problem: Problem, seed: int, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row = {**problem.columns, "data_set": problem.seed - seed}
    for part in found:
        row |= {key: value for key, value in part.items() if key != "seconds"}
    return row | {"seconds": sum(part["seconds"] for part in found)}


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The node ``interpolators`` as a dictionary, checked."""
    settings = task_settings(cfg, "interpolators", "interpolators")
    refuse_unused(cfg, "interpolators", _UNUSED)
    check_loggers(cfg, "interpolators")
    for key in ("input_dim", "num_test", "data_sets", "particles", "runs", "steps", "replicas", "max_steps"):
        positive_integer(f"interpolators.{key}", settings[key])
    if settings["runs"] < 2:
        raise ArgumentError("interpolators.runs", 1, "must be at least 2", "an interval comes from their spread")
    for size in different("interpolators.num_samples", settings["num_samples"], "numbers"):
        positive_integer("interpolators.num_samples", size)
    for noise in different("interpolators.label_noise", settings["label_noise"], "fractions"):
        real_number("interpolators.label_noise", noise, at_least=0, at_most=1)
    for network in different("interpolators.networks", settings["networks"], "lists of widths"):
        _widths("interpolators.networks", network)
    if settings["teacher"] is not None:
        _widths("interpolators.teacher", settings["teacher"])
    real_number("interpolators.negative_slope", settings["negative_slope"])
    truth_value("interpolators.bias", settings["bias"])
    seed_number("seed", cfg.seed)
    if not isinstance(settings["trained"], dict):
        raise ArgumentError("interpolators.trained", settings["trained"], "must be optimisers by name", "or {}")
    for name, options in settings["trained"].items():
        _check_optimiser(f"interpolators.trained.{name}", name, options)
    return settings


def _check_optimiser(key: str, name: str, options: Any) -> None:
    if name == RANDOM or not isinstance(options, dict) or set(options) != set(_OF_TRAINED):
        raise ArgumentError(key, options, f"must have the keys {', '.join(_OF_TRAINED)}, and not be named {RANDOM}")
    one_of(f"{key}.optimizer", options["optimizer"], OPTIMIZERS)
    real_number(f"{key}.lr", options["lr"], above=0)
    if options["batch_size"] is not None:
        positive_integer(f"{key}.batch_size", options["batch_size"])


def _widths(key: str, widths: Any) -> tuple[int, ...]:
    if not isinstance(widths, list):
        raise ArgumentError(key, widths, "must be a list of widths", "such as [10], or [] for none")
    return tuple(positive_integer(key, width) for width in widths)


def _problems(settings: Mapping[str, Any], seed: int) -> list[Problem]:
    teacher = None if settings["teacher"] is None else tuple(settings["teacher"])
    slope, bias = float(settings["negative_slope"]), settings["bias"]
    return [
        Problem(
            size,
            Architecture(settings["input_dim"], tuple(widths), slope, bias),
            float(noise),
            teacher,
            settings["num_test"],
            seed + data_set,
        )
        for widths, noise, size in product(settings["networks"], settings["label_noise"], settings["num_samples"])
        for data_set in range(settings["data_sets"])
    ]
