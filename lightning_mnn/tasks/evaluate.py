"""Evaluate finished runs again: on other data, from another checkpoint, or certified with other settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from lightning_mnn.config.choices import given_keys
from lightning_mnn.data.error_sums import ErrorSums
from lightning_mnn.data.loaders.shards import exact_shard, flat_batch
from lightning_mnn.landscape import certify
from lightning_mnn.runs.folders import remove_job_folder
from lightning_mnn.runs.saved import data_of, load_run
from lightning_mnn.sweeps.jobs import EVALUATION, Status, read_sweep
from lightning_mnn.sweeps.table import write_table
from lightning_mnn.utilities.files import relative, write_json
from lightning_mnn.utilities.transfer import plain
from lightning_mnn.utilities.validation import ArgumentError, check_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from lightning_mnn.data import ExactData
    from lightning_mnn.landscape.minima.certificate import Certificate
    from lightning_mnn.landscape.network import Network
    from lightning_mnn.model.mnn import MNN
    from lightning_mnn.runs.saved import Run

_MAX_DISTANCE = "callbacks.local_minimum_detector.max_distance"
_OF_CERTIFICATES = (
    *("kind", "reason_code", "reason", "zero_error", "distance", "weight_distance", "margin_ratio"),
    *("kinks", "rank", "rank_cap"),
)


def evaluate(cfg: DictConfig) -> None:
    """Evaluate the run in ``cfg.folder``, or each finished run of the sweep there, and write ``evaluation.json``.

    The weights are those of ``checkpoints/last.ckpt``, or of the checkpoint that ``cfg.ckpt_path`` names there. The
    data are those of the run, built again from its config, with the keys ``data.KEY`` that the command gives; or others
    that it chooses by ``data=NAME``. Certificates use the run's ``max_distance``, or that of the command. Everything is
    computed in float64 in this process, with all samples in memory.

    The keys are those of ``summary.json``, and ``max_distance``; ``mse`` and ``mce`` are of the weights. Of a sweep the
    table is written anew, with a column ``evaluated.KEY`` for each.

    Raises:
        ValueError: no folder is given, or the data do not fit the network.
        FileNotFoundError: the folder contains no finished run, or a run has no such checkpoint.
    """
    remove_job_folder(Path(cfg.run_dir))
    if cfg.folder is None:
        raise ValueError("task=evaluate needs a finished run or sweep: give folder=DIR")
    folder, console = Path(cfg.folder).absolute(), Console(soft_wrap=True, highlight=False)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={cfg.folder}: there is no such folder")
    if (folder / ".hydra").is_dir():
        _evaluate_run(cfg, folder, console)
        return
    finished = [job.folder for job in read_sweep(folder).having(Status.FINISHED) if job.folder and not job.foreign]
    if not finished:
        raise FileNotFoundError(f"folder={cfg.folder} contains no finished run: run its command again with resume=true")
    for run in finished:
        _evaluate_run(cfg, folder / run, console)
    for path in write_table(read_sweep(folder)):
        console.print(f"[bold]written:[/] {relative(path)}")


def _evaluate_run(cfg: DictConfig, folder: Path, console: Console) -> None:
    run = load_run(folder)
    given = given_keys()
    module = run.module(cfg.ckpt_path or "last.ckpt")
    datamodule = data_of(cfg) if "data" in given else run.data(**_changes(cfg, given))
    _check_sizes(module, datamodule)
    chosen = cfg if _MAX_DISTANCE in given else run.config
    detector = (chosen.get("callbacks") or {}).get("local_minimum_detector") or {}
    objective = _objective(run)
    distance = float(detector.get("max_distance", 1e-3)) if objective == "mse" else None
    found = results_of(module, datamodule, distance) | {"objective": objective, "data": _data_overrides()}
    write_json(folder / EVALUATION, found)
    console.print(f"[bold]{escape(str(relative(folder)))}[/] {escape(_line(run, found))}")


def _data_overrides() -> str:
    """What the command says about the data; empty: they are those of the run."""
    given = (override.lstrip("+~") for override in HydraConfig.get().overrides.task)
    return " ".join(one for one in given if one.partition("=")[0].partition(".")[0] == "data")


def _changes(cfg: DictConfig, given: set[str]) -> dict[str, Any]:
    """What the command changes in the data of a run."""
    return {key.removeprefix("data."): OmegaConf.select(cfg, key) for key in sorted(given) if key.startswith("data.")}


def _check_sizes(module: MNN, datamodule: ExactData) -> None:
    for name, ours, theirs in (
        ("input_dim", int(module.hparams["input_dim"]), datamodule.input_dim),
        ("replicas", module.replicas, datamodule.replicas),
    ):
        if ours != theirs:
            problem = f"does not fit the network, which has {ours}"
            raise ArgumentError(f"data.{name}", theirs, problem, "choose data of that size")


def _objective(run: Run) -> str:
    """What the run lowered, as its summary says."""
    found = run.summary.get("objective") or "mse"
    several = set(found) if isinstance(found, list) else {found}
    return several.pop() if len(several) == 1 else "none"


def results_of(module: MNN, datamodule: ExactData, max_distance: float | None) -> dict[str, Any]:
    """Errors on the training and the test set, and certificates; values of several replicas are lists.

    Without a ``max_distance`` there are no certificates: those are of minima of the MSE, over all weights.
    """
    network = module.network().to(torch.float64)
    inputs, targets = samples_of(datamodule, replicated=module.replicas > 1)
    regression = bool(module.hparams["regression"])
    sums = ErrorSums(module.threshold, regression=regression)
    sums.add(network.predict(inputs), targets)
    found = {name: plain(value) for name, value in sums.means().items()}
    if (loader := datamodule.exact_test_loader()) is not None:
        tested = ErrorSums(module.threshold, regression=regression)
        for batch in exact_shard(loader):
            x, y = flat_batch(batch, replicated=module.replicas > 1)
            tested.add(network.predict(x.double()), y.double())
        found |= {f"test_{name}": plain(value) for name, value in tested.means().items()}
    if len(network.hidden_weights) == 1 and max_distance is not None:
        found |= _certified(network, inputs, targets, module.threshold, max_distance)
    return found


def samples_of(datamodule: ExactData, *, replicated: bool) -> tuple[Tensor, Tensor]:
    """All samples of the training set, in float64."""
    loader = datamodule.train_dataloader()
    sizes = {"num_samples": loader.num_samples, "input_dim": datamodule.input_dim}
    check_memory(3 * 8.0 * datamodule.replicas * loader.num_samples * datamodule.input_dim, "the samples", sizes)
    parts = [flat_batch(batch, replicated=replicated) for batch in exact_shard(loader)]
    inputs = torch.cat([x.double() for x, _ in parts], dim=-2)
    return inputs, torch.cat([y.double() for _, y in parts], dim=-1)


def _certified(
    network: Network, inputs: Tensor, targets: Tensor, threshold: float | None, max_distance: float
) -> dict[str, Any]:
    hidden, output = network.hidden_weights[0], network.output_weights
    options: dict[str, Any] = {"threshold": threshold, "max_distance": max_distance}
    certificates: Any = certify(hidden, output, inputs, targets, network.negative_slope, **options)
    several: list[Certificate] = certificates if isinstance(certificates, list) else [certificates]
    columns = {name: [_value(getattr(one, name)) for one in several] for name in _OF_CERTIFICATES}
    columns |= {f"minimum_{name}": [getattr(one, name) for one in several] for name in ("mse", "mce")}
    found = {name: values if isinstance(certificates, list) else values[0] for name, values in columns.items()}
    return found | {"max_distance": max_distance}


def _value(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def _line(run: Run, found: dict[str, Any]) -> str:
    """The results of a run in a line; of replicas the means and counts."""
    texts = []
    for name in ("mse", "mce", "test_mse", "test_mce"):
        values = found.get(name)
        if values is not None:
            listed = values if isinstance(values, list) else [values]
            texts.append(f"{name} {sum(listed) / len(listed):.4g}")
    kinds = found.get("kind")
    if kinds is not None:
        listed = kinds if isinstance(kinds, list) else [kinds]
        texts.append(", ".join(f"{listed.count(kind)} × {kind}" for kind in dict.fromkeys(listed)))
    if found.get("objective", "mse") != "mse":
        texts.append(f"not certified again: its objective is {found['objective']}")
    before = run.summary.get("kind")
    texts += [f"was {before}"] if isinstance(before, str) and isinstance(kinds, str) and before != kinds else []
    return "; ".join(texts)
