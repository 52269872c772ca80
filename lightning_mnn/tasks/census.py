"""Count what the regions of random weights contain: a table of proportions beside theoretical bounds, and a figure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lightning_mnn.figures import census_figure
from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.volumes.rare_events.suboptimal import rare_census
from lightning_mnn.landscape.volumes.region_census import LABELS, Case, Census, GaussianSamples, Outcome, tally
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
from lightning_mnn.utilities.validation import (
    ArgumentError,
    one_of,
    positive_integer,
    real_number,
    seed_number,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from omegaconf import DictConfig

    from lightning_mnn.landscape.intervals import Estimate

# The draws that a proportion is over: rank and residual of a region are known without a search for a minimum.
_OF_ALL = ("rank_deficient", "suboptimal_residual", "suboptimal_minimum")
_OF_SEARCHED = ("any_minimum", "global_minimum", "undecided")

# Parts of the config that the task does not use, with their defaults: nothing is trained.
_UNUSED = dict.fromkeys(("data", "model", "optimizer", "schedule", "trainer", "callbacks")) | {
    "replicas": 1,
    "dtype": "float64",
}


@dataclass(frozen=True)
class Draws:
    """Independent regions at one size and slope.

    Attributes:
        scan: name of the scan that they belong to.
        cases: equal except for ε, which increases.
        num_regions: regions that are searched for a minimum.
        num_screened: further regions, searched only if their residual is sub-optimal.
        parts: number of parts among which they are divided.
    """

    scan: str
    cases: tuple[Case, ...]
    num_regions: int
    num_screened: int
    parts: int

    def names(self) -> list[str]:
        """Names of the parts."""
        return [f"{self.scan}_{_label(self.cases[0])}_{part}" for part in range(self.parts)]

    def count(self, part: int) -> dict[str, Any]:
        """What the regions of a part contain: for each case a tally of the searched regions and one of the screened."""
        total = self.num_regions + self.num_screened
        searched: list[list[Outcome]] = [[] for _ in self.cases]
        screened: list[list[Outcome]] = [[] for _ in self.cases]
        for index in range(part, total, self.parts):
            search = index < self.num_regions
            for outcomes, outcome in zip(searched if search else screened, self._outcomes(index, search), strict=True):
                outcomes.append(outcome)
        return {"searched": [tally(o) for o in searched], "screened": [tally(o) for o in screened]}

    def rows(self, parts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of the table, one for each ε, from the counts of all parts."""
        for number, case in enumerate(self.cases):
            searched = [part["searched"][number] for part in parts]
            found = {name: getattr(Census.from_counts(searched), name) for name in _OF_SEARCHED}
            everything = Census.from_counts(searched + [part["screened"][number] for part in parts])
            found |= {name: getattr(everything, name) for name in _OF_ALL}
            yield {
                "scan": self.scan,
                **_sizes(case),
                **{
                    f"{name}_{key}": value
                    for name in (*_OF_ALL, *_OF_SEARCHED)
                    for key, value in vars(found[name]).items()
                },
                **_theorems(case),
                "seconds": sum(part["seconds"] for part in parts),
            }

    def _outcomes(self, index: int, search: bool) -> Iterator[Outcome]:  # noqa: FBT001 (it is internal)
        """What region number `index` contains, for each ε in turn."""
        outcome: Outcome | None = None
        for case in self.cases:
            # A region that is not sub-optimal at one ε is not sub-optimal at a greater ε; nothing else depends on ε.
            if outcome is None or outcome.suboptimal:
                outcome = case.outcome(index) if search else _screen(case, index)
            yield outcome


@dataclass(frozen=True)
class Splitting:
    """Multilevel splitting on one data set of a case.

    Attributes:
        case: with Gaussian data.
        data_set: number of the data set among the case's draws.
        particles: P; this and the following as in :func:`~lightning_mnn.landscape.rare_census`.
        runs: R.
        steps: moves of every particle at each level.
        regions: number of regions of each run that are searched for a minimum.
    """

    case: Case
    data_set: int
    particles: int
    runs: int
    steps: int
    regions: int

    @property
    def name(self) -> str:
        """Name of the part."""
        return f"splitting_{_label(self.case)}_{self.data_set}"

    def estimate(self) -> dict[str, Any]:
        """Natural logarithms of the volumes and of the ends of their 95 % intervals."""
        case, (_, data) = self.case, self.case.draw(self.data_set)
        found = rare_census(
            data.inputs,
            data.targets,
            case.width,
            case.negative_slope,
            threshold=data.threshold,
            epsilon=case.epsilon,
            particles=self.particles,
            runs=self.runs,
            steps=self.steps,
            regions=self.regions,
            seed=case.seed,
            max_nodes=case.max_nodes,
        )
        return {
            **_logarithms("suboptimal_residual", found.suboptimal_residual),
            **_logarithms("suboptimal_minimum", found.suboptimal_minimum),
            "undecided": found.undecided,
            "levels": len(found.suboptimal_residual.levels),
            "evaluations": found.suboptimal_residual.evaluations,
        }

    def row(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Row of the table of splitting; −inf becomes an empty field."""
        return {**_sizes(self.case), "data_set": self.data_set, **_theorems(self.case), **part}


def census(cfg: DictConfig) -> None:
    """Count what random regions contain, at all sizes, slopes and ε of ``cfg.census``.

    The run folder gets ``census.csv``, a row for each size, slope and ε, ``splitting.csv``, a row for each data set on
    which a volume was estimated by multilevel splitting, ``figure.png`` and ``summary.json``. Volumes in ``log_…``
    columns are natural logarithms; seconds are processor seconds.

    ``plan.json`` contains all that the results depend on, ``parts/`` the counts of every finished part, which is not
    drawn again. If the command is killed, at any time, and run again, it resumes and writes the same files as an
    uninterrupted run, except for the seconds: the name of the experiment's folder contains ``name`` and ``seed``, not
    the time. Other settings need another folder.

    Tables, figure and counts also go to one W&B run, unless ``logger.mode`` is ``disabled``.

    Raises:
        ValueError: a value of the config is out of its range; the message names its key.
        FileExistsError: another process works in the folder, or it contains another run, or a census with another plan.
    """
    run_dir, settings = Path(cfg.run_dir), _settings(cfg)
    processes = number_of_processes("census.processes", settings.pop("processes"))
    draws, splittings = _draws(settings, cfg.seed), _splittings(settings, cfg.seed)
    versions = {name: version(name) for name in ("lightning_mnn", "torch", "numpy", "scipy")}
    plan = {"seed": cfg.seed, "census": settings, "versions": versions}
    with run_lock(run_dir):
        initialise_folder(run_dir, plan)
        parts = [Part(splitting.name, splitting.estimate) for splitting in splittings]
        parts += [Part(name, partial(item.count, part)) for item in draws for part, name in enumerate(item.names())]
        command = command_of_run(run_dir)
        found = finish_experiment(parts, run_dir, processes, command)
        write_csv(
            run_dir / "census.csv", [row for item in draws for row in item.rows([found[n] for n in item.names()])]
        )
        write_csv(run_dir / "splitting.csv", [splitting.row(found[splitting.name]) for splitting in splittings])
        counts = {
            "regions_searched": sum(item.num_regions for item in draws),
            "regions_screened": sum(item.num_screened for item in draws),
            "data_sets_split": len(splittings),
            "seconds": sum(part["seconds"] for part in found.values()),
        }
        write_json(run_dir / "summary.json", {"command": command, **counts, **plan})
        census_figure(run_dir)
        log_to_wandb(cfg, run_dir, ("census", "splitting"), counts)
        Console(soft_wrap=True, highlight=False).print(f"[bold]everything is in[/] {relative(run_dir)}")


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The node ``census`` as a dictionary, its lists and counts checked.

    The sizes are checked where they are used.
    """
    settings = task_settings(cfg, "census", "census")
    refuse_unused(cfg, "census", _UNUSED)
    check_loggers(cfg, "census")
    for key in ("negative_slopes", "epsilons"):
        different(f"census.{key}", settings[key], "numbers")
    positive_integer("census.parts", settings["parts"])
    for name, scan in settings["scans"].items():
        positive_integer(f"census.scans.{name}.num_regions", scan["num_regions"])
        if scan["num_screened"]:
            positive_integer(f"census.scans.{name}.num_screened", scan["num_screened"])
    for key in ("data_sets", "runs", "steps", "regions"):
        positive_integer(f"census.splitting.{key}", settings["splitting"][key])
    if settings["splitting"]["runs"] < 2:
        raise ArgumentError("census.splitting.runs", 1, "must be at least 2", "an interval comes from their spread")
    seed_number("seed", cfg.seed)
    one_of("census.labels", settings["labels"], sorted(LABELS))
    whole_number("census.max_nodes", settings["max_nodes"], at_least=0)
    for epsilon in settings["epsilons"]:
        real_number("census.epsilons", epsilon, at_least=0, below=1, remedy="it is a fraction of the samples")
    return settings


def _entries(key: str, entries: Any, names: str) -> list[Any]:
    """A list of entries, each with one number for every name in ``names``."""
    for entry in different(key, entries, "entries", at_least=0):
        if not isinstance(entry, list) or len(entry) != len(names.split(", ")):
            raise ArgumentError(
                key, entry, "must contain one number for each name in each entry", f"they are [{names}]"
            )
    return list(entries)


def _draws(settings: dict[str, Any], seed: int) -> list[Draws]:
    draws = []
    for name, scan in settings["scans"].items():
        key = f"census.scans.{name}.sizes"
        for slope, size in product(settings["negative_slopes"], _entries(key, scan["sizes"], "N, d0, d1")):
            epsilons = sorted(settings["epsilons"])
            cases = tuple(_case(key, [*size, slope], epsilon, settings, seed) for epsilon in epsilons)
            draws.append(Draws(name, cases, scan["num_regions"], scan["num_screened"], settings["parts"]))
    return draws


def _splittings(settings: dict[str, Any], seed: int) -> list[Splitting]:
    node, key = settings["splitting"], "census.splitting.cases"
    splittings = []
    for *entry, particles in reversed(_entries(key, node["cases"], "N, d0, d1, ρ, particles")):
        case = _case(key, entry, node["epsilon"], settings, seed)
        positive_integer(f"{key}: particles, the last number of {[*entry, particles]},", particles)
        splittings += [
            Splitting(case, data_set, particles, node["runs"], node["steps"], node["regions"])
            for data_set in range(node["data_sets"])
        ]
    return splittings


def _case(key: str, entry: Any, epsilon: float, settings: Mapping[str, Any], seed: int) -> Case:
    """The case of an entry [N, d0, d1, ρ]; errors name the config's key."""
    try:
        num_samples, input_dim, width, slope = entry
        data = GaussianSamples(num_samples, input_dim, settings["labels"])
        return Case(data, width, slope, epsilon, seed, settings["max_nodes"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}, with [N, d0, d1, ρ] = {entry} and ε = {epsilon}: {error}") from None


def _screen(case: Case, index: int) -> Outcome:
    """What a region contains; it is searched for a minimum only if its residual is sub-optimal."""
    outcome = replace(case, max_nodes=0).outcome(index)
    return case.outcome(index) if outcome.suboptimal else outcome


def _label(case: Case) -> str:
    sizes = _sizes(case)
    return f"{sizes['num_samples']}_{sizes['input_dim']}_{sizes['width']}_slope_{case.negative_slope}"


def _sizes(case: Case) -> dict[str, Any]:
    data = case.data
    if not isinstance(data, GaussianSamples):
        raise TypeError("sizes are defined for Gaussian data only")
    return {
        "num_samples": data.num_samples,
        "input_dim": data.input_dim,
        "width": case.width,
        "negative_slope": case.negative_slope,
        "epsilon": case.epsilon,
        "parameters_per_sample": data.input_dim * case.width / data.num_samples,
    }


def _theorems(case: Case) -> dict[str, float | None]:
    """Theorem 6's upper bound on log E V(L_ε), and Theorem 9's lower bound on log V(G) if d1 ≥ 2N/d0."""
    sizes = _sizes(case)
    samples, inputs, width = (sizes[name] for name in ("num_samples", "input_dim", "width"))
    suboptimal = bounds.suboptimal_log_volume(samples, inputs, width, case.epsilon, case.negative_slope)
    wide = sizes["parameters_per_sample"] >= 2
    return {
        "log_theorem_6_suboptimal": min(float(suboptimal), 0.0),
        "log_theorem_9_global": float(bounds.global_log_volume(samples, inputs, width)) if wide else None,
    }


def _logarithms(name: str, estimate: Estimate) -> dict[str, float]:
    return {
        f"log_{name}": estimate.log_value,
        f"log_{name}_low": estimate.log_low,
        f"log_{name}_high": estimate.log_high,
    }
