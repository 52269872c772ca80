"""Build a W&B workspace for the logs of runs: their curves, and a comparison of the final values across a sweep."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mnn.figures import PANELS, Panel
from lightning_mnn.loggers.wandb import without_terminal
from lightning_mnn.runs.folders import remove_job_folder
from lightning_mnn.utilities.compat.wandb_internals import forget_foreign_service, workspace_content

if TYPE_CHECKING:
    from omegaconf import DictConfig

_STEP = "trainer/global_step"

# Panels in addition to those of a run's own figure; a panel is in the section of its first curve.
MORE = (
    Panel(
        "Certified",
        "share of the networks",
        (("minimum/certified", "local minima"), ("minimum/on_kinks", "on kinks")),
        "linear",
    ),
    Panel("Kinks", "samples on a kink", (("minimum/kinks", "at the weights"),), "linear"),
    Panel("Upper bound of the rank", "samples", (("minimum/rank_cap", "Σ d0 over active units"),), "linear"),
    Panel("Regions seen", "activation patterns", (("pattern/regions_visited", "so far"),), "linear"),
    Panel(
        "Idle units",
        "units",
        (("pattern/never_active_units", "never active"), ("pattern/always_active_units", "always active")),
        "linear",
    ),
    Panel("Lost samples", "samples", (("pattern/unactivated_samples", "that activate no unit"),), "linear"),
    Panel(
        "Volume of the units' cones",
        "log-volume (nats)",
        (("volume/unit_least", "least"), ("volume/unit_mean", "mean"), ("volume/unit_most", "most")),
        "linear",
    ),
    Panel("Against an average cell", "nats", (("volume/log_ratio_to_average_cell", "mean unit"),), "linear"),
    Panel("Cones of the units", "log-volume (nats)", (("volume/units", "histogram"),), "linear"),
)

SECTIONS = {"training": "train/", "minima": "minimum/", "patterns": "pattern/", "volumes": "volume/"}

# For the comparison: keys of the config, and keys of the summary (True: logarithmic axis).
CONFIGURED = ("data.num_samples", "model.negative_slope", "optimizer.lr", "seed")
ENDS = {
    "mse": True,
    "mce": False,
    "test_mse": True,
    "test_mce": False,
    "rank": False,
    "regions_visited": False,
    "log_volume": False,
    "steps": True,
}
COLUMNS = ("kind", *ENDS, "seconds")  # of the table of runs
PICTURE = "figure"


def dashboard(cfg: DictConfig) -> None:
    """Save a workspace to W&B and print its address; with ``cfg.dry_run`` print it as JSON, without an account.

    Its sections are training, minima, patterns, volumes, and the comparison of runs. Each call saves a new workspace.
    The folder that Hydra makes for the job is removed again.

    Raises:
        ValueError: the package wandb-workspaces is missing, or there is no project to save to.
        PermissionError: W&B is not logged in to any account.
        ConnectionError: W&B did not accept the workspace.
    """
    remove_job_folder(Path(cfg.run_dir))
    entity, project, name = (cfg.dashboard[key] for key in ("entity", "project", "name"))
    if cfg.dry_run:
        sys.stdout.write(to_json(workspace(entity or "", project or "", name)) + "\n")
        return
    if not project:
        raise ValueError("task=dashboard needs a project to save to: give dashboard.project=NAME, or dry_run=true")
    _package("workspaces")
    sys.stdout.write(f"saved: {_save(entity, project, name)}\n")


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace, a :class:`wandb_workspaces.workspaces.Workspace`.

    Raises:
        ValueError: the package is missing.
    """
    ws = _package("workspaces")
    sections = [
        ws.Section(
            name=title,
            panels=[_curves(panel) for panel in (*PANELS, *MORE) if panel.curves[0][0].startswith(prefix)],
            is_open=True,
        )
        for title, prefix in SECTIONS.items()
    ]
    sections.append(ws.Section(name="comparison", panels=_comparison(), is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=_STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(pinned_columns=[f"summary:{key}" for key in COLUMNS]),
    )


def to_json(built: Any) -> str:
    """A workspace as JSON, in the form in which W&B stores it."""
    return json.dumps(workspace_content(built), indent=2, ensure_ascii=False, allow_nan=False)


def _curves(panel: Panel) -> Any:
    return _package("reports.v2").LinePlot(
        title=panel.title,
        x=_STEP,
        y=[name for name, _ in panel.curves],
        title_x="optimiser step",
        title_y=panel.unit,
        log_y=panel.scale == "log",
        max_runs_to_show=100,
    )


def _comparison() -> list[Any]:
    """Panels of the final values of a sweep's runs: against their settings and against each other."""
    wr = _package("reports.v2")

    def end(key: str) -> Any:
        return wr.SummaryMetric(key)

    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in CONFIGURED]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=end(key), log=log or None) for key, log in ENDS.items()]
    scatters = [
        wr.ScatterPlot(title=f"{key} against {setting}", x=wr.Config(setting), y=end(key), log_y=ENDS[key])
        for setting, key in zip(CONFIGURED, ("rank", "mse", "mse", "log_volume"), strict=True)
    ]
    return [
        wr.ParallelCoordinatesPlot(title="Settings and ends", columns=columns),
        *scatters,
        wr.ScatterPlot(title="Volume and loss", x=end("log_volume"), y=end("mse"), log_y=True),
        wr.BarPlot(
            title="Share of local minima",
            metrics=["minimum/certified.last"],
            groupby=wr.Config("model.negative_slope"),
            groupby_aggfunc="mean",
            title_x="share of the networks",
        ),
        wr.ParameterImportancePlot(with_respect_to="mse"),
        wr.RunComparer(diff_only="split"),
        wr.MediaBrowser(title="Figures of the runs", media_keys=[PICTURE]),
    ]


def _package(part: str) -> Any:
    """A part of wandb-workspaces, which only this task needs.

    Raises:
        ValueError: the package is missing.
    """
    try:
        return importlib.import_module(f"wandb_workspaces.{part}")
    except ImportError as error:
        raise ValueError(
            f"task=dashboard needs the package wandb-workspaces ({error}): pip install lightning-mnn[dashboard]"
        ) from None


def _save(entity: str | None, project: str, name: str) -> str:
    """Save the workspace; without an entity, save it in the account's default entity.

    Returns:
        Its address.

    Raises:
        PermissionError: there is no account.
        ConnectionError: W&B did not accept the workspace.
    """
    import wandb  # noqa: PLC0415 (slow)

    logged_in = False
    forget_foreign_service()
    wandb.setup(wandb.Settings(silent=True))
    try:
        with suppress(wandb.errors.UsageError), without_terminal():  # login(prompt=False) of newer releases
            logged_in = wandb.login()
        if logged_in:
            return str(workspace(entity or str(wandb.Api().default_entity), project, name).save().url)
    except Exception as error:  # noqa: BLE001 (of many types, and none has a remedy for the user)
        raise ConnectionError(_save_error(error)) from None
    raise PermissionError("W&B has no account here: run wandb login, or give dry_run=true to print the workspace")


def _save_error(error: BaseException) -> str:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"W&B did not accept the workspace ({first}): check wandb login, dashboard.entity and dashboard.project; "
        "dry_run=true prints it instead"
    )
