"""Process groups: processes that each have a part of the samples, and the collectives between them.

Every process calls the same methods in the same order, and each result is the same on all of them.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from lightning_mnn.utilities.interruption import (
    Interrupted,
    Pace,
    TimeLimitError,
    alone,
    is_over_time,
    requested,
    stop_if_any,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytorch_lightning as pl
    from torch import Tensor


Answer = TypeVar("Answer")


def is_initialised() -> bool:
    """Whether torch.distributed has formed a group of processes."""
    return dist.is_available() and dist.is_initialized()


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order, on every process.

    Raises:
        Interrupted: (on every process) one of them was asked to stop.
        Exception: (on every process) the error that one of them raised in :func:`share_errors`.
    """
    if not is_initialised():
        return [value]
    values, requests, errors = _exchanged(value, None)
    stop_if_any(requests)
    raise_first(errors)
    return values


def gather_results(work: Callable[[], Answer]) -> list[Answer]:
    """The result of ``work`` on each process, in rank order, on every process; it must not wait for other processes.

    Raises:
        Interrupted: (on every process) one of them was asked to stop; if it is still working, it stops there.
        Exception: (on every process) the first error that was raised on one of them.
    """
    if not is_initialised():
        with alone():
            return [work()]
    found: Answer | None = None
    error: Exception | None = None
    try:
        with alone():
            found = work()
    except Interrupted:
        pass  # raised on all processes below
    except Exception as raised:  # noqa: BLE001 (shared with the other processes)
        error = raised
    values, requests, errors = _exchanged(found, error)
    stop_if_any(requests)
    raise_first(errors)
    return values


def local_result(work: Callable[[], Answer]) -> Answer:
    """The result of ``work`` on this process, if it was completed on every process: see :func:`gather_results`."""
    found: list[Answer] = []
    gather_results(lambda: found.append(work()))
    return found[0]


def share_errors(work: Callable[[], object]) -> None:
    """Do work on every process, in which they may wait for each other.

    Raises:
        Exception: (on every process) the first error that was raised on one of them, while the others had completed
            the work or were waiting in :func:`gather`.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        if getattr(raised, "is_shared", False):  # the other processes raise it, too
            raise
        error = raised
    if is_initialised():
        raise_first(_exchanged(None, error)[2])
    if error is not None:
        raise error


def add_up(value: Tensor) -> None:
    """Replace a tensor by its sum over the processes."""
    if is_initialised():
        dist.all_reduce(value)


def _exchanged(value: Any, error: BaseException | None) -> tuple[list[Any], list[int], list[BaseException | None]]:
    """The values, stop requests and errors of all processes."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (value, requested(), error and transferable(error)))
    values, requests, errors = (list(column) for column in zip(*parts, strict=True))
    return values, requests, errors


def on_first_process(trainer: pl.Trainer, work: Callable[[], Answer]) -> Answer:
    """The result of ``work`` on the first process, on every process; an error that it raises is raised on all of them.

    The result must not contain tensors on a device that only the first process uses.
    """
    if trainer.world_size == 1:
        return work()
    box: list[Any] = [None]
    if trainer.is_global_zero:
        try:
            with alone():
                box = [work()]
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the other processes wait for it, and raise it too)
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception | Interrupted):
        raise box[0]
    return cast("Answer", box[0])


def part_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [low, high) of ``total`` items that belongs to one process.

    >>> [part_of(10, rank, 3) for rank in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return total * rank // world_size, total * (rank + 1) // world_size


_pace = Pace(seconds=0.5)  # of exchanges of stop requests, during work with many reductions


class ProcessGroup:
    """A single process that has all samples, so there is nothing to exchange.

    >>> ProcessGroup().sum(torch.tensor([2.0]))
    tensor([2.])
    """

    size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return value

    def min(self, value: Tensor) -> Tensor:
        """The elementwise minimum over the processes."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """The elementwise maximum over the processes."""
        return value

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:  # noqa: ARG002 (used by the subclass)
        """For each flag of the host, whether any process has set it; the exchange uses tensors on ``device``."""
        return list(flags)

    def total(self, number: int, device: torch.device) -> int:  # noqa: ARG002 (used by the subclass)
        """The sum of a number of the host over the processes; the exchange uses tensors on ``device``."""
        return number

    def raise_any(self, error: BaseException | None) -> None:
        """Raise the first error of any process on all processes; each passes its own error, or None."""
        if error is not None:
            raise error

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the samples."""
        return rows

    def local_part(self, rows: Tensor) -> Tensor:
        """This process's part of rows that :meth:`join` returned."""
        return rows


class DistributedGroup(ProcessGroup):
    """The processes of torch.distributed's default group, in rank order.

    About twice a second, a call also exchanges stop requests: if one process was asked to stop, all stop at that call.

    Args:
        num_samples: number of samples of this process.
    """

    def __init__(self, num_samples: int) -> None:
        self.size = dist.get_world_size()
        counts: list[int] = [0] * self.size
        dist.all_gather_object(counts, num_samples)
        start = sum(counts[: dist.get_rank()])
        self._local = slice(start, start + num_samples)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return _reduced(value, dist.ReduceOp.SUM)

    def min(self, value: Tensor) -> Tensor:
        """The elementwise minimum over the processes."""
        return _reduced(value, dist.ReduceOp.MIN)

    def max(self, value: Tensor) -> Tensor:
        """The elementwise maximum over the processes."""
        return _reduced(value, dist.ReduceOp.MAX)

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag of the host, whether any process has set it; the exchange uses tensors on ``device``."""
        return [bool(flag) for flag in self.max(torch.tensor(flags, device=device).int()).tolist()]

    def total(self, number: int, device: torch.device) -> int:
        """The sum of a number of the host over the processes; the exchange uses tensors on ``device``."""
        return int(self.sum(torch.tensor(number, device=device)))

    def raise_any(self, error: BaseException | None) -> None:
        """Raise the first error of any process on all processes; each passes its own error, or None."""
        raise_first(_exchanged(None, error)[2])

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the samples."""
        parts: list[Tensor] = [rows] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def local_part(self, rows: Tensor) -> Tensor:
        """This process's part of rows that :meth:`join` returned."""
        return rows[self._local]


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    value = value.clone()
    dist.all_reduce(value, operation)
    if _pace.is_time():
        _stop_together(value.device)
    return value


def _stop_together(device: torch.device) -> None:
    local_state = [requested(), int(is_over_time()), _pace.proposal() if dist.get_rank() == 0 else 0]
    reduced = torch.tensor(local_state, device=device)
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    number, over_time, pause = reduced.tolist()
    _pace.restart(pause)
    stop_if_any([number])
    if over_time:
        raise TimeLimitError


def raise_first(errors: Sequence[BaseException | None]) -> None:
    """Raise the first error in a list that is the same on all processes."""
    for error in errors:
        if error is not None:
            error.is_shared = True  # type: ignore[attr-defined]
            raise error


def transferable(error: BaseException) -> BaseException:
    """The error if it can be pickled for other processes, else a RuntimeError with its type and message."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (pickled in the same line)
    except Exception:  # noqa: BLE001 (the error's class may raise anything)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
