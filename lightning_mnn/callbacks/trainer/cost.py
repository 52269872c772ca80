"""TimeShare: keeps what a callback costs within a share of the time of training."""

from __future__ import annotations

import time
from contextlib import contextmanager
from enum import StrEnum, auto
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

END_SECONDS = 30.0  # that a callback without a limit may work at the end of training, however short the training was
END_SHARE = 0.05  # of training's time that it may work at the end of a longer one


class CostTier(StrEnum):
    """How much of the time of training a callback may take.

    Attributes:
        LIGHT: at most 1 %.
        STANDARD: at most 5 %.
        FULL: no limit.
    """

    LIGHT = auto()
    STANDARD = auto()
    FULL = auto()

    @property
    def share(self) -> float | None:
        """The largest share; None: no limit."""
        return {CostTier.LIGHT: 0.01, CostTier.STANDARD: 0.05}.get(self)


class TimeShare:
    """Measures the time of a callback's work, and says whether more of it stays within a share of training's time.

    Training's time is that since the start without the callback's own. Half of the share is kept for the end. Work
    whose cost is not known yet is tried within the time that is left, if the least that it may take is not more, and
    stopped after it; after that it is tried again when twice that time is left. Where there is a limit, a GPU is waited
    for before and after the work, so that the work of training is not counted as the callback's.

    Args:
        share: the largest share; None: no limit.

    Attributes:
        spent: seconds of the work so far.
        left_out: number of times at which there was no time for it.
        done: number of times at which it was done.

    >>> TimeShare(None).affordable()
    True
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.begin()

    def begin(self) -> None:
        """Start the clock of a training."""
        self.spent, self.left_out, self.done = 0.0, 0, 0
        self._last = self._current = 0.0
        self._measuring = False
        self._start = time.monotonic()

    def affordable(self, least: float = 0.0) -> bool:
        """Whether the work can be done again within half of the share; what is left out is counted.

        Args:
            least: seconds that the work takes at least.
        """
        if self.share is None:
            return True
        fits = self._left(self.share / 2) > max(self._last, least)
        self.left_out += not fits
        return fits

    def _left(self, share: float) -> float:
        return share * self.training_seconds - self.spent

    @property
    def training_seconds(self) -> float:
        """Seconds since the start without the callback's own."""
        return time.monotonic() - self._start - self.spent

    def seconds_now(self) -> float | None:
        """Seconds that the work may take now; None: no limit."""
        return None if self.share is None else max(0.0, self._left(self.share / 2))

    def seconds_at_end(self, least: float = 0.0) -> float:
        """Seconds that the work may take at the end: what is left, and none if that is too short for it.

        Without a limit on the whole, 30 s or 5 % of training's time.

        Args:
            least: seconds that the work takes at least.

        >>> TimeShare(None).seconds_at_end()
        30.0
        """
        if self.share is None:
            return max(END_SECONDS, END_SHARE * self.training_seconds)
        left = self._left(self.share)
        return left if left >= max(self._last, least) else 0.0

    def stopped(self) -> None:
        """Count the work that was measured last as left out: it was stopped before its end, and takes longer."""
        if self.share is not None:
            self.left_out, self.done, self._last = self.left_out + 1, self.done - 1, 2 * self._last

    @contextmanager
    def measured(self, device: torch.device, *, repeats: bool = True, completes: bool = True) -> Iterator[None]:
        """A context whose time is counted, once where such contexts are nested.

        Args:
            device: the device on which the module trains.
            repeats: whether the work is what is done at the scheduled times.
            completes: whether that is all of it for this time; otherwise more follows.
        """
        outermost, self._measuring = not self._measuring, True
        self._wait(device)
        start = time.monotonic()
        try:
            yield
        finally:
            self._wait(device)
            seconds = time.monotonic() - start
            if outermost:
                self._measuring = False
                self.spent += seconds
            if repeats:
                self._current += seconds
            if repeats and completes:
                self._last, self._current, self.done = self._current, 0.0, self.done + 1

    def _wait(self, device: torch.device) -> None:
        if self.share is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    def __str__(self) -> str:
        """What the work cost, in one sentence."""
        training = max(self.training_seconds, 1e-9)
        percent = 100 * self.spent / training
        if self.share is None:
            return f"took {self.spent:.1f} s, {percent:.2g} % of training"
        text = f"took {self.spent:.1f} s, {percent:.2g} % of training (limit {100 * self.share:g} %)"
        if self.left_out:
            times = self.left_out + self.done
            text += f"; to stay within it, {self.left_out} of {times} times were left out"
        return text
