"""What the command of a sweep does around its jobs: it locks the folder, and writes the report at the end."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from lightning_mnn.config.job_configs import JobConfigs
from lightning_mnn.config.paths import hydra_path
from lightning_mnn.launchers.jobs.records import SWEEP_RECORD
from lightning_mnn.runs.folders import refusals
from lightning_mnn.sweeps.adaptive import prepare
from lightning_mnn.sweeps.lock import held
from lightning_mnn.utilities.compat.hydra_internals import replace_composition
from lightning_mnn.utilities.files import relative

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

MAX_RUN_FIGURES = 8  # figures of runs, at 0.6 s each, that the end of a sweep draws

_current: SweepEnd | None = None


class SweepReportCallback(Callback):
    """Remembers a sweep when it starts. Hydra calls no callback if a job fails: :func:`finish` does the rest."""

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _current  # noqa: PLW0603 (a process has one command)
        with refusals():
            _current = SweepEnd(config)
            prepare(config, _current.folder)
        replace_composition(lambda compose: JobConfigs(compose).of)


class SweepEnd:
    """A sweep that was started by this process.

    Args:
        config: the config of the sweep, which Hydra composes without what is swept.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.folder: Path = hydra_path(config, "sweep.dir").absolute()
        self.lock = ExitStack()
        self.lock.enter_context(held(self.folder))

    @property
    def is_wanted(self) -> bool:
        """Whether the sweep gets a report: not with ``report=false``, and not after a test run that saves nothing."""
        return bool(_selected(self.config, "report")) and not _selected(self.config, "trainer.fast_dev_run")

    def report(self) -> None:
        """Write and print the report, log it to W&B, and draw the figures of the runs if they are few."""
        from lightning_mnn.sweeps.jobs import read_sweep  # noqa: PLC0415 (slow; every command imports this module)

        try:
            sweep = read_sweep(self.folder)
        except FileNotFoundError:  # no training runs, or the command was refused
            return
        from rich.console import Console  # noqa: PLC0415

        from lightning_mnn.figures import run_figure  # noqa: PLC0415
        from lightning_mnn.sweeps.report import (  # noqa: PLC0415
            print_report,
            print_verdicts,
            print_written,
            runs_without_figure,
            write_report,
        )
        from lightning_mnn.sweeps.wandb import log_summary_run  # noqa: PLC0415

        console = Console(soft_wrap=True, highlight=False)
        print_report(sweep, console, unfinished=not (self.folder / SWEEP_RECORD).exists())  # else the launcher told
        print_verdicts(sweep, console)
        report = write_report(sweep)
        print_written(report.paths, console)
        log_summary_run(self.config, sweep, report)
        missing = runs_without_figure(sweep) if _selected(self.config, "figure") is None else []
        if len(missing) <= MAX_RUN_FIGURES:
            print_written([run_figure(run) for run in missing], console)
        else:
            console.print(
                f"[bold]figures of the runs:[/] lightning-mnn task=report sweep={relative(self.folder)} figure=true "
                "draws them"
            )

    def print_how_to_resume(self) -> None:
        """Print the command that runs what an interrupted sweep has left, unless the launcher has printed it."""
        if (self.folder / SWEEP_RECORD).exists():
            return
        from rich.console import Console  # noqa: PLC0415

        from lightning_mnn.sweeps.jobs import read_sweep  # noqa: PLC0415
        from lightning_mnn.sweeps.report import print_how_to_resume  # noqa: PLC0415

        print_how_to_resume(read_sweep(self.folder), Console(soft_wrap=True, highlight=False))


def finish(error: BaseException | None) -> None:
    """End the sweep of this process, if there is one; nothing that fails here changes the result of the command.

    Args:
        error: what ended the command; None if nothing did.
    """
    global _current
    end, _current = _current, None
    if end is None:
        return
    with end.lock:
        if not end.is_wanted or not end.folder.is_dir():
            return
        try:
            if is_interruption(error):
                end.print_how_to_resume()
            else:
                end.report()
        except (Exception, KeyboardInterrupt) as failure:  # noqa: BLE001 (the sweep itself is over)
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())
            sys.stderr.write(
                f"the report of the sweep is not complete ({reason}): lightning-mnn task=report "
                f"sweep={relative(end.folder)} writes it\n"
            )


def is_interruption(error: BaseException | None) -> bool:
    """Whether a signal ended the command: Ctrl-C or SIGTERM."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (130, 143))


def _selected(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
