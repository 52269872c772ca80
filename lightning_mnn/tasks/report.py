"""Draw the figure of saved results again, or make a table of the runs below a folder or of the jobs of a sweep."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mnn.figures import (
    band_figure,
    census_figure,
    interpolators_figure,
    model_figure,
    run_figure,
    scan_figure,
)
from lightning_mnn.figures.model_panels import OWN_GROUPS
from lightning_mnn.figures.report_page.model_page import has_model_run, read_model_run, write_model_page
from lightning_mnn.findings import FINDINGS
from lightning_mnn.runs.folders import remove_job_folder
from lightning_mnn.sweeps.jobs import is_finished, is_foreign, read_run, read_sweep
from lightning_mnn.sweeps.page import write_report_page
from lightning_mnn.sweeps.report import print_report, print_verdicts, print_written, runs_without_figure, write_report
from lightning_mnn.sweeps.watch import watch_sweep
from lightning_mnn.utilities.files import DamagedFileError, read_json, relative, write_csv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from omegaconf import DictConfig

# The data file of a figure determines its kind; summary.json is written last, after everything else.
_FIGURES: dict[str, Callable[[Path], Path]] = {
    "scan.csv": scan_figure,
    "census.csv": census_figure,
    "interpolators.csv": interpolators_figure,
    "metrics.csv": run_figure,
}


def report(cfg: DictConfig) -> None:
    """Draw ``figure.png`` in ``cfg.folder`` from the results of an experiment or a training run there.

    If the folder's subfolders contain training runs, write ``table_1.csv`` instead, a row for each network, and print
    it; its first column is the subfolder. Runs that diverged or were interrupted are left out, and their names printed.

    With ``cfg.sweep`` instead, write one table of all jobs below that folder, ``sweep.csv`` and ``sweep.parquet``, and
    draw ``figure.png`` of the finished ones, grouped by what was swept, and ``report.html``, a page with all of it (see
    :mod:`lightning_mnn.sweeps.page`). Jobs that failed, were stopped or have not
    started are in the table without measures, and their names are printed with the command that runs them. Of jobs of
    other tasks only the names are printed. In a sweep of another program the measures are what its ``CSVLogger`` wrote
    and what its jobs returned (see :func:`lightning_mnn.runs.logs.results_of`). With ``cfg.x``, a column of the table,
    it also draws the columns ``cfg.y`` against it (see :func:`lightning_mnn.figures.band_figure`). With ``cfg.watch``
    it first writes ``report.html`` again and again, until the sweep is over or Ctrl-C. With ``cfg.figure`` true it also
    draws the figures of the runs that have none.

    If the folder is a log folder of another program, written by Lightning's ``CSVLogger``, and the callbacks logged to
    it, the figure shows their results (see :func:`lightning_mnn.figures.model_figure`). Its ``report.html`` begins with
    what they found and could not find, from ``findings.json``.

    A run also gets ``report.html``. Nothing else is written: the folder that Hydra makes for a job is removed again.

    Raises:
        ValueError: no folder is given, or both are.
        FileNotFoundError: the folder does not exist, or contains nothing that can be drawn, no finished run or no
            training job; the message says what to do.
    """
    remove_job_folder(Path(cfg.run_dir))
    given = {key: cfg.get(key) for key in ("folder", "sweep") if cfg.get(key) is not None}
    if len(given) > 1:
        raise ValueError(f"folder={cfg.folder} and sweep={cfg.sweep} are two reports: give one of them")
    console = Console(soft_wrap=True, highlight=False)
    if "sweep" in given:
        folder = _existing_folder("sweep", cfg.sweep)
        if cfg.get("watch"):
            watch_sweep(folder, console)
        sweep = read_sweep(folder)
        print_report(sweep, console)
        print_verdicts(sweep, console)
        print_written(write_report(sweep).paths, console)
        if cfg.get("figure"):
            print_written([run_figure(run) for run in runs_without_figure(sweep)], console)
        if cfg.get("x") is not None:
            columns = [cfg.y] if isinstance(cfg.y, str) else list(cfg.y)
            print_written(band_figure(folder, cfg.x, columns, cfg.color, cfg.band), console)
    elif cfg.get("x") is not None:
        raise ValueError(f"x={cfg.x} is a column of a sweep's table: give sweep=DIR, not folder=DIR")
    else:
        _report_folder(_existing_folder("folder", cfg.get("folder")), console)


def _report_folder(folder: Path, console: Console) -> None:
    """Draw one figure, or make a table of the runs below a folder."""
    if _is_of_another_program(folder):
        _report_model_run(folder, console)
        return
    for name, draw in _FIGURES.items():
        if (folder / name).exists():
            _require_summary(folder)
            console.print(f"[bold]drawn again:[/] {relative(draw(folder))}")
            if draw is run_figure:
                print_written([write_report_page(read_run(folder))], console)
            return
    runs = _runs(folder)
    if not runs:
        raise FileNotFoundError(_nothing_to_report(folder))
    finished = {run: summary for run, summary in runs.items() if summary and is_finished(summary)}
    left_out = ", ".join(str(run) for run in runs if run not in finished)
    if not finished:
        raise FileNotFoundError(
            f"{folder} contains no finished training run, only {left_out}: run a command again with resume=true"
        )
    rows = [row for run, summary in finished.items() for row in table_rows(run, summary)]
    write_csv(folder / "table_1.csv", rows)
    console.print(_table(rows))
    if left_out:
        console.print(Text.assemble(("left out because they are not finished: ", "bold"), left_out))
    console.print(f"[bold]written:[/] {relative(folder / 'table_1.csv')}")


def _report_model_run(folder: Path, console: Console) -> None:
    """Draw the figure of a run of any program, if the callbacks logged something, and write its page."""
    run = read_model_run(folder)
    for found in run.findings:
        for fact in found.found:
            console.print(Text.assemble((f"{found.callback}: ", "bold"), fact.text))
    if (folder / "metrics.csv").exists() and any(name.startswith(OWN_GROUPS) for name in run.series):
        console.print(f"[bold]drawn:[/] {relative(model_figure(folder))}")
    print_written([write_model_page(run)], console)


def table_rows(run: Path, summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of Table 1, one for each replica, from a run's path below a folder and its summary; parameters: all weights.

    >>> summary = {"input_dim": 3, "hidden_dims": [4], "num_samples": 32, "replicas": 1, "seed": 5, "seconds": 1.0}
    >>> summary |= {"mce": 0.25, "wrong": 8, "mse": 0.1, "kind": "saddle"}
    >>> (row,) = table_rows(Path("mnist/seed_5"), summary)
    >>> row["data"], row["mce_percent"], row["parameters_per_sample"]
    ('mnist', 25.0, 0.5)
    """
    sizes = [summary["input_dim"], *summary["hidden_dims"]]
    parameters = sum(a * b for a, b in zip(sizes, [*sizes[1:], 1], strict=True))
    for replica in range(summary["replicas"]):
        measures = {
            name: value[replica] if isinstance(value := summary[name], list) else value
            for name in ("mce", "wrong", "mse", "kind")
        }
        yield {
            "data": run.parts[0],
            "run": str(run),
            "seed": summary["seed"] + replica,
            "mce_percent": None if measures["mce"] is None else 100 * measures["mce"],
            "wrong": measures["wrong"],
            "d0": sizes[0],
            "d1": sizes[1],
            "d2": sizes[2] if len(sizes) > 2 else None,
            "num_samples": summary["num_samples"],
            "parameters_per_sample": parameters / summary["num_samples"],
            "seconds": summary["seconds"],
            "mse": measures["mse"],
            "kind": measures["kind"],
        }


def _existing_folder(key: str, folder: str | None) -> Path:
    if folder is None:
        raise ValueError("task=report needs saved results: give folder=DIR, or sweep=DIR for all jobs of a sweep")
    path = Path(folder).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{key}={folder}: there is no such folder")
    return path


def _is_of_another_program(folder: Path) -> bool:
    """Whether this is a log folder of a Trainer in which no run of this program was started."""
    own = any((folder / name).exists() for name in ("summary.json", "plan.json"))
    return has_model_run(folder) and not own and is_foreign(folder)


def _require_summary(folder: Path) -> None:
    if not (folder / "summary.json").exists():
        raise FileNotFoundError(
            f"{folder} contains no summary.json, which is written at the end: run its command again to finish it "
            "(for a training run, with resume=true)"
        )


def _runs(folder: Path) -> dict[Path, dict[str, Any]]:
    """Summaries of training runs at any depth below a folder, by their relative paths; unreadable ones are empty."""
    paths = sorted(path.parent for path in folder.rglob("summary.json") if path.parent != folder)
    found = {path.relative_to(folder): _summary(path) for path in paths}
    return {run: summary for run, summary in found.items() if not summary or _is_training_run(summary)}


def _summary(run: Path) -> dict[str, Any]:
    try:
        return read_json(run / "summary.json")
    except DamagedFileError:
        return {}


def _is_training_run(summary: dict[str, Any]) -> bool:
    return {"mse", "mce", "hidden_dims", "num_samples", "seconds"} <= summary.keys()


def _nothing_to_report(folder: Path) -> str:
    if (folder / "plan.json").exists():
        return f"{folder} contains an experiment that is not finished: run its command again, which resumes it"
    logs = sorted(
        path.parent
        for depth, name in product(("*", "*/*"), ("metrics.csv", FINDINGS))
        for path in folder.glob(f"{depth}/{name}")
    )
    if logs:
        return f"{folder} contains log folders: give one of them, such as folder={logs[-1]}"
    if any(folder.glob("events.out.tfevents.*")):
        return (
            f"{folder} contains only a log of TensorBoard: add a CSVLogger to the Trainer, or callbacks of "
            "lightning_mnn.callbacks, which write findings.json beside it"
        )
    return (
        f"{folder} contains no scan.csv, census.csv, interpolators.csv or metrics.csv to draw, and no training runs "
        "with a summary.json below it: give the folder of a run or experiment, or one with runs in it"
    )


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("data", "MCE %", "wrong", "d0", "d1", "N", "params/N", "seconds", "kind"):
        table.add_column(name, justify="left" if name in ("data", "kind") else "right", overflow="fold")
    for row in rows:
        widths = str(row["d1"]) if row["d2"] is None else f"{row['d1']}, {row['d2']}"
        table.add_row(
            row["run"],
            "–" if row["mce_percent"] is None else f"{row['mce_percent']:.3g}",
            "–" if row["wrong"] is None else f"{row['wrong']:,}",
            f"{row['d0']:,}",
            widths,
            f"{row['num_samples']:,}",
            f"{row['parameters_per_sample']:.3f}",
            f"{row['seconds']:,.0f}",
            str(row["kind"] or "not classified").replace("_", " "),
        )
    return table
