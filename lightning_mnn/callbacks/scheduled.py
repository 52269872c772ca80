"""ScheduledCallback: base class of the callbacks that act at scheduled times."""

from __future__ import annotations

import importlib
import math
import time
from abc import abstractmethod
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.module_network import NetworkModule
from lightning_mnn.callbacks.evaluation.run_module import StepFailedError
from lightning_mnn.callbacks.evaluation.snapshots import weights_of
from lightning_mnn.callbacks.evaluation.training_set import forget_statistics
from lightning_mnn.callbacks.trainer.cost import CostTier, TimeShare
from lightning_mnn.callbacks.trainer.findings_file import folders_of_findings, write_findings
from lightning_mnn.callbacks.trainer.last_checkpoint import or_stop_here
from lightning_mnn.callbacks.trainer.long_pass import duration, end_of_training
from lightning_mnn.data.loaders.shards import num_samples
from lightning_mnn.findings import FINDINGS, CallbackFindings, Unknown, UnknownCode
from lightning_mnn.utilities.compat.lightning_internals import trains_in_children
from lightning_mnn.utilities.distributed import on_first_process, share_errors
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.files import read_json, write_json
from lightning_mnn.utilities.interruption import (
    Interrupted,
    TimeLimitError,
    safe_point,
    time_limit,
)
from lightning_mnn.utilities.transfer import fetched
from lightning_mnn.utilities.validation import (
    ArgumentError,
    MisfitError,
    one_of,
    real_number,
    truth_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_mnn.callbacks.schedule import Schedule
    from lightning_mnn.findings import Fact


def callback_of_lightning() -> type:
    """``Callback`` of ``lightning.pytorch``, whose LightningCLI accepts only its own; ``object`` if there is none.

    It is imported even if the program uses ``pytorch_lightning``, which takes 0.1 to 0.4 s and 7 MB (beside the 5 s of
    ``pytorch_lightning`` and torch): a class has its bases from the beginning, and the program may import it later.
    """
    try:
        found: type = importlib.import_module("lightning.pytorch").Callback
    except Exception:  # noqa: BLE001 (not installed, or broken: then no program uses it)
        return object
    return found


if TYPE_CHECKING:
    OtherCallback = object
else:
    OtherCallback = callback_of_lightning()


class ScheduledCallback(pl.Callback, OtherCallback):
    """A callback that acts before training, at scheduled times, and at the end; in one process never twice at a step.

    It runs in the Trainer of ``pytorch_lightning`` and in that of ``lightning.pytorch``, and is an instance of the
    ``Callback`` of both.

    If the run is asked to stop while a callback acts, the action stops (see
    :mod:`lightning_mnn.utilities.interruption`). If the run can be resumed from this step, so that a
    :class:`~lightning_mnn.callbacks.LastCheckpoint` saves it there, the callback's state records the interruption, and
    a resumed run begins with the whole action.

    If callbacks after it change the weights at the end of training, as weight averaging does, it acts once more, so
    that its last result is about the module's final weights.

    A callback only observes: if it fails, it warns once, does nothing more in that run, and training goes on.

    Args:
        schedule: when to act between the start and the end.
        strict: if true, an error ends the run.
        tier: which share of training's time the actions may take, those at the start and the end included. An action
            that does not fit is left out, or stopped; the first one includes the preparation.
        end_seconds: time limit of the work at the end of training; None: what is left of the tier's share, and with
            "full" 30 s or 5 % of training's time, whichever is more, for an MNN no limit; ``math.inf``: no limit.

    Attributes:
        cost: the time of the actions.
        completed_epochs: number of epochs that are done when the callback acts.
        over_time: what stopped the work at the end before it was done, in words; None: nothing did.
        failure: the error after which the callback does nothing more; None: there was none.
    """

    missing = "nothing is reported"  # the warning's text for what is missing after a failure
    remedy = ""  # what may prevent a failure
    ends_diverged = True  # whether a DivergenceError in the callback ends training
    acts_at_start = True  # whether there is an action before the first step

    def __init__(
        self, schedule: Schedule, *, strict: bool = False, tier: str = "full", end_seconds: float | None = None
    ) -> None:
        self.schedule = schedule
        self.tier = CostTier(one_of("tier", str(tier), map(str, CostTier)))
        unlimited = end_seconds in (None, math.inf)
        self.end_seconds = end_seconds if unlimited else real_number("end_seconds", end_seconds, at_least=0)
        self.cost = TimeShare(self.tier.share)
        self.strict = truth_value("strict", strict)
        self.failure: str | None = None
        self.over_time: str | None = None
        self._ending = False  # whether the work at the end of training is being done
        self._seconds_at_end = math.inf  # its limit
        self._weights: list[Tensor] | None = None  # digests of the weights when it acted last
        self._last_fit: dict[str, Any] | None = None  # attributes after the last fit, until this one begins
        self._result_file = Path(gettempdir(), f"lightning-mnn-{token_hex(8)}.json")  # from a child that trained
        self._received: dict[str, Any] | None = None
        self._last_step: int | None = None
        self.completed_epochs = 0
        self._acted = False  # whether this process has acted; a resumed run has a last step before that
        self._pending = False  # whether the action at the present step was interrupted
        self._waits = False  # whether it waits for the first batch, to prepare
        self._deferred = False  # whether it waits for the time to prepare

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: all but the functions of the module that Lightning sets, which refer to the module."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @property
    def acts_within_epochs(self) -> bool:
        """Whether the callback acts after single steps."""
        return self.schedule.unit == "step"

    def epochs_until_due(self, done: int) -> float:
        """Number of epochs, when ``done`` of them are done, until the callback acts at the end of one."""
        return self.schedule.until_due(done) if self.schedule.unit == "epoch" else 1

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Inspect the module and its data before the first step; on every process.

        Raises:
            StepFailedError: a ``training_step`` that had to run failed. The module's own hooks for the start of
                training and of an epoch run after those of the callbacks, and may not have created what it needs. So
                this method is called again at the first batch, and only then the error counts.
        """

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act for the first time, after :meth:`prepare`; in a resumed run, if an action was interrupted."""
        if self._last_step is None or self._pending:
            self._act_once(trainer, pl_module)

    def least_seconds(self, trainer: pl.Trainer) -> float:
        """Seconds that an action takes at least, from the time of training so far; to leave out what cannot fit."""
        del trainer
        return 0.0

    @abstractmethod
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the callback's work, at the weights after ``trainer.global_step`` steps. Runs on every process.

        Until the last safe point nothing may be logged, and the content of :meth:`state_dict` must not change.
        """

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act for the last time, at the end of training."""
        self._start_late(trainer, pl_module)  # there was no batch
        self._prepare_deferred(trainer, pl_module)
        resumed = not self._acted  # if training had ended before
        if self._last_step == trainer.global_step and (resumed or not self._knows(pl_module)):
            self.recall(trainer, pl_module)
        self._act_once(trainer, pl_module)

    def recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute again what :meth:`act` finds at the present step, without logging.

        Called in a resumed run, and if another callback has changed the weights since.
        """

    def run_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the work at the end was stopped: results at other weights are not those of the end."""

    def summary(self) -> dict[str, Any]:
        """The callback's results, as plain values for ``summary.json``; per-network values are lists over replicas."""
        return {}

    def facts(self) -> list[Fact]:
        """What was found so far."""
        return []

    def unknowns(self) -> list[Unknown]:
        """What could not be found so far, besides what an error prevents."""
        return []

    def report(self) -> CallbackFindings:
        """What was found, and what could not be, for ``findings.json``."""
        unknown = [*self.unknowns()]
        if self.failure is not None:
            unknown.insert(0, Unknown(self.missing, UnknownCode.ERROR, self.failure, self.remedy or None))
        return CallbackFindings(type(self).__name__, tuple(self.facts()), tuple(unknown), self.summary())

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._last_fit = self.__getstate__()
            self._last_step, self._acted, self._waits, self._pending, self._deferred = None, False, False, False, False
            self.failure, self._weights, self._received, self.over_time = None, None, None, None
            _add_final_check(trainer)
            forget_statistics(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.completed_epochs, self._last_fit = trainer.current_epoch, None
        self.cost.begin()
        self.observe(lambda: self._begin(trainer, pl_module))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._waits:
            self.observe(lambda: self._start_late(trainer, pl_module))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.schedule.unit == "step" and self.schedule.due(trainer.global_step):
            self._act_or_postpone(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.completed_epochs = trainer.current_epoch + 1
        if self.schedule.unit == "epoch" and self.schedule.due(self.completed_epochs):
            self._act_or_postpone(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.observe(lambda: self._finish_in_time(trainer, pl_module))
        if self.failure is not None:
            rank_zero_info(f"{type(self).__name__}: {self.missing}, because of {self.failure}")
        elif self.cost.share is not None:
            rank_zero_info(f"{type(self).__name__}: it {self.cost}")
        if not self._had_no_time:
            self._weights = weights_of(pl_module)
        if trainer.is_global_zero and trains_in_children(trainer):
            write_json(self._result_file, self.summary())

    def received(self) -> dict[str, Any] | None:
        """The summary of a fit that ran in a child of this process, as with "ddp_spawn"; None: there was none."""
        if self._last_step is None and self._result_file.exists():
            self._received = read_json(self._result_file, (), "fit again")
            self._result_file.unlink()
        return self._received

    def finish_again(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish once more, if the weights have changed since."""
        if not self._had_no_time and not self._knows(pl_module):
            self.on_train_end(trainer, pl_module)

    @property
    def _had_no_time(self) -> bool:
        """Whether there was no time for any action: other weights would not change that."""
        return self.over_time is not None and not self._acted

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        last_fit, self._last_fit = self._last_fit, None
        if last_fit is not None and last_fit["_last_step"] is not None:  # there was nothing left to train
            vars(self).update(last_fit)
            self._last_fit = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step, "owes": self._pending}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step, self._pending = state_dict.get("last_step"), state_dict.get("owes", False)

    def observe(self, work: Callable[[], object]) -> None:
        """Do a part of the callback's work, on every process; an error in it ends the work, but not training.

        Raises:
            DivergenceError: training diverged.
            ArgumentError, MisfitError: an argument of the callback does not fit the run.
            Exception: another error, if ``strict`` is true.
        """
        if self.failure is not None:
            return
        try:
            share_errors(work)
        except (ArgumentError, MisfitError):
            raise
        except Exception as error:
            if self.strict or (isinstance(error, DivergenceError) and self.ends_diverged):
                raise
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        reason = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        self.failure, self._waits, self._pending, self._deferred = reason, False, False, False
        remedy = f" What may help: {self.remedy}." if self.remedy else ""
        rank_zero_warn(
            f"{type(self).__name__} stops here, and training goes on: {self.missing}, because of {reason}.{remedy} "
            "With strict=True the error ends the run"
        )

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.cost.share is not None:  # a share of no time is none
            self._deferred = True
            self.cost.left_out += self.acts_at_start
            return
        try:
            with self.cost.measured(pl_module.device, repeats=False):
                share_errors(lambda: self.prepare(trainer, pl_module))
        except StepFailedError:
            self._waits = True
        else:
            self.start(trainer, pl_module)

    def _knows(self, pl_module: pl.LightningModule) -> bool:
        """Whether the weights are those at which the callback acted last."""
        known, now = self._weights or [], weights_of(pl_module)
        return len(known) == len(now) and all(fetched(*(a == b for a, b in zip(known, now, strict=True))))

    def _start_late(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._waits:
            share_errors(lambda: self.prepare(trainer, pl_module))
            self._waits = False
            self.start(trainer, pl_module)

    def _prepare_deferred(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare, and start, if there was no time for it at the start."""
        if not self._deferred:
            return
        safe_point()
        self._waits = True  # there is no later time for what fails
        try:
            with self.cost.measured(pl_module.device, repeats=False):
                self.prepare(trainer, pl_module)
        except TimeLimitError:
            self.cost.left_out += 1
            raise
        finally:
            self._waits = False
        self._deferred = False
        self.start(trainer, pl_module)

    def _act_once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self._last_step:
            return
        before, self._last_step = self._last_step, trainer.global_step
        try:
            with self.cost.measured(pl_module.device):
                self.act(trainer, pl_module)
                self._weights = weights_of(pl_module)
        except (Interrupted, TimeLimitError) as error:
            self._last_step = before
            if isinstance(error, TimeLimitError):
                self.cost.stopped()
            raise
        self._acted, self._pending = True, False

    def _act_in_time(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act within what is left of the share; what takes longer is left out."""
        if self.cost.share is None:
            self._act_once(trainer, pl_module)
            return
        try:
            with time_limit(on_first_process(trainer, self.cost.seconds_now)):
                self._prepare_deferred(trainer, pl_module)
                self._act_once(trainer, pl_module)
        except TimeLimitError:
            pass

    def _finish_in_time(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish within the time for the end of training."""
        self._ending, self.over_time = True, None
        seconds = self.end_seconds
        if seconds is None and self.cost.share is None and isinstance(pl_module, NetworkModule):
            seconds = math.inf  # its work is limited by counts of operations: the same results on every machine
        if seconds is None:
            seconds = on_first_process(trainer, lambda: self.cost.seconds_at_end(self.least_seconds(trainer)))
        self._seconds_at_end = seconds
        what = f"{type(self).__name__} at the end of training"
        try:
            with (
                self.cost.measured(pl_module.device, repeats=False),
                end_of_training(trainer, what, seconds),
                time_limit(seconds),
            ):
                self._check_time_for_action(trainer, seconds)
                self.finish(trainer, pl_module)
        except TimeLimitError:
            self.over_time = self.over_time or self._over_end(seconds)
            self.run_out(trainer, pl_module)
            rank_zero_info(f"{type(self).__name__}: {self.over_time}")
        finally:
            self._ending = False

    def _check_time_for_action(self, trainer: pl.Trainer, seconds: float) -> None:
        """Begin nothing without time; of several processes none could stop it.

        Raises:
            TimeLimitError: there is none.
        """
        if seconds <= 0 and self._last_step != trainer.global_step:
            self.cost.left_out += 1
            raise TimeLimitError

    def _over_end(self, seconds: float) -> str:
        """Why the work at the end was stopped, and what gives it more time."""
        if self.end_seconds is None and self.cost.share is not None:
            limit = f"{100 * self.cost.share:g} % of training's time (tier={self.tier})"
            return f"{limit} left too little for the end of training: use tier=full, or end_seconds=, for more"
        return f"the end of training has {duration(seconds)}: use end_seconds=, for more"

    def _affordable(self, trainer: pl.Trainer) -> bool:
        """Whether there is time for an action, by the clock of the first process."""
        if self.cost.share is None:
            return True
        return on_first_process(trainer, lambda: self.cost.affordable(self.least_seconds(trainer)))

    @property
    def _epoch_seconds(self) -> float:
        """Seconds that an epoch of training took, at least."""
        return self.cost.training_seconds / max(1, self.completed_epochs)

    def _seconds_of_samples(self, trainer: pl.Trainer, samples: float) -> float:
        """Seconds that training took for so many samples, at least; 0 where their number is not known."""
        try:
            total = num_samples(trainer.train_dataloader)
        except TypeError:
            return 0.0
        return samples / total * self._epoch_seconds

    def _act_or_postpone(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act at a step from which the run can be resumed; if interrupted, leave the action to the resumed run."""
        if self.failure is not None or not self._affordable(trainer):
            return
        act = lambda: self._act_in_time(trainer, pl_module)  # noqa: E731
        done = or_stop_here(trainer, lambda: self.observe(act))
        self._pending = not done and self.failure is None and trainer.global_step != self._last_step


class FinalCheck(pl.Callback):
    """Acts behind the scheduled callbacks of a Trainer, at the end of training.

    It makes them act again if others changed the weights, and writes ``findings.json``, what they found and what they
    could not find. It writes that, too, if an error ends training.
    """

    def __init__(self) -> None:
        self._folders: list[Path] = []
        self._began = 0.0

    def epochs_until_due(self, done: int) -> float:  # noqa: ARG002 (the signature of the other callbacks)
        """Number of epochs until one at whose end the callback must act: infinite, it acts in no epoch."""
        return math.inf

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._folders, self._began = folders_of_findings(trainer), time.monotonic()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in _scheduled_callbacks(trainer):
            callback.finish_again(trainer, pl_module)
        self._write(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module, exception)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, error: BaseException | None = None) -> None:
        folders, self._folders = self._folders, []  # once
        if not folders or not trainer.is_global_zero:
            return
        try:
            findings = [callback.report() for callback in _scheduled_callbacks(trainer)]
        except Exception as problem:
            if error is None and any(callback.strict for callback in _scheduled_callbacks(trainer)):
                raise
            rank_zero_warn(f"{FINDINGS} is not written: {type(problem).__name__}: {problem}")
            return
        facts = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        seconds = round(time.monotonic() - self._began, 3)
        write_findings(folders, findings, error=error, module=type(pl_module).__name__, seconds=seconds, **facts)


def _scheduled_callbacks(trainer: pl.Trainer) -> list[ScheduledCallback]:
    run: Any = trainer
    return [callback for callback in run.callbacks if isinstance(callback, ScheduledCallback)]


def _add_final_check(trainer: pl.Trainer) -> None:
    """Add a :class:`FinalCheck` after all callbacks but those that save checkpoints.

    The list is replaced, not changed: Lightning iterates over the old one while this is called.
    """
    run: Any = trainer
    others = [callback for callback in run.callbacks if not isinstance(callback, FinalCheck)]
    saves = [any(kind.__name__ == "Checkpoint" for kind in type(callback).__mro__) for callback in others]
    end = saves.index(True) if True in saves else len(others)
    run.callbacks = [*others[:end], FinalCheck(), *others[end:]]
