"""Team: processes that each hold a part of the samples, and what they must agree on.

Every process calls the same methods in the same order; each result is the same on all of them.
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


def gather(value: Any) -> list[Any]:
    """The value of every process, in rank order, on every process.

    Raises:
        Interrupted: (on every process) one was asked to stop.
        Exception: (on every process) one has met this error, and called :func:`share_error`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values, requests, errors = _exchanged(value, None)
    stop_if_any(requests)
    raise_first(errors)
    return values


def gather_results(work: Callable[[], Answer]) -> list[Answer]:
    """What each process finds, in rank order, on every process; the work must not wait for other processes.

    Raises:
        Interrupted: (on every process) one was asked to stop; where it is in the middle of its work, it stops there.
        Exception: (on every process) the first error that one of them met.
    """
    if not (dist.is_available() and dist.is_initialized()):
        with alone():
            return [work()]
    found: Answer | None = None
    error: Exception | None = None
    try:
        with alone():
            found = work()
    except Interrupted:
        pass  # which is raised on all below
    except Exception as local_part:  # noqa: BLE001 (of whatever kind)
        error = local_part
    values, requests, errors = _exchanged(found, error)
    stop_if_any(requests)
    raise_first(errors)
    return values


def share_error(error: Exception | None) -> None:
    """Tell the other processes of an error, or of none; they call this, too, or wait in :func:`gather`.

    Raises:
        Exception: (on every process) the first error that one of them met.
    """
    if getattr(error, "is_shared", False):  # the others raise it as well
        raise cast("Exception", error)
    if dist.is_available() and dist.is_initialized():
        raise_first(_exchanged(None, error)[2])
    if error is not None:
        raise error


def _exchanged(value: Any, error: Exception | None) -> tuple[list[Any], list[int], list[BaseException | None]]:
    """Values, requests to stop and errors of all processes."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (value, requested(), error and transferable(error)))
    values, requests, errors = (list(column) for column in zip(*parts, strict=True))
    return values, requests, errors


def on_first_process(trainer: pl.Trainer, work: Callable[[], Answer]) -> Answer:
    """What the first process finds, on every process; an error that it meets is raised on all of them.

    Nothing in the answer may lie on a device of the first process alone.
    """
    if trainer.world_size == 1:
        return work()
    box: list[Any] = [None]
    if trainer.is_global_zero:
        try:
            with alone():
                box = [work()]
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the others wait for an answer, and fail with it)
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception | Interrupted):
        raise box[0]
    return cast("Answer", box[0])


def part_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [low, high) of ``total`` things that falls to one process.

    >>> [part_of(10, rank, 3) for rank in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return total * rank // world_size, total * (rank + 1) // world_size


_pace = Pace(seconds=0.5)  # of questions whether a process is to stop, in work of many sums


class ProcessGroup:
    """One process with all samples: nothing to agree on.

    >>> ProcessGroup().sum(torch.tensor([2.0]))
    tensor([2.])
    """

    size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        return value

    def min(self, value: Tensor) -> Tensor:
        """Smallest over the processes, element by element."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """Largest over the processes, element by element."""
        return value

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:  # noqa: ARG002 (of several processes)
        """Which flags of the host's are set on one of the processes, which exchange them on a device."""
        return list(flags)

    def total(self, number: int, device: torch.device) -> int:  # noqa: ARG002 (of several processes)
        """Sum of the host's numbers over the processes, which exchange them on a device."""
        return number

    def raise_any(self, error: BaseException | None) -> None:
        """Raise the first error that a process met, on all of them; each calls this with its own, or None."""
        if error is not None:
            raise error

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the samples' order."""
        return rows

    def local_part(self, rows: Tensor) -> Tensor:
        """This process's part of joined rows."""
        return rows


class DistributedGroup(ProcessGroup):
    """The processes of torch.distributed's default group, in rank order.

    Where one of them is asked to stop, all stop at one of these calls: about twice a second they ask one another.

    Args:
        num_samples: number of samples that this process holds.
    """

    def __init__(self, num_samples: int) -> None:
        self.size = dist.get_world_size()
        counts: list[int] = [0] * self.size
        dist.all_gather_object(counts, num_samples)
        start = sum(counts[: dist.get_rank()])
        self._own = slice(start, start + num_samples)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        return _reduced(value, dist.ReduceOp.SUM)

    def min(self, value: Tensor) -> Tensor:
        """Smallest over the processes, element by element."""
        return _reduced(value, dist.ReduceOp.MIN)

    def max(self, value: Tensor) -> Tensor:
        """Largest over the processes, element by element."""
        return _reduced(value, dist.ReduceOp.MAX)

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Which flags of the host's are set on one of the processes, which exchange them on a device."""
        return [bool(flag) for flag in self.max(torch.tensor(flags, device=device).int()).tolist()]

    def total(self, number: int, device: torch.device) -> int:
        """Sum of the host's numbers over the processes, which exchange them on a device."""
        return int(self.sum(torch.tensor(number, device=device)))

    def raise_any(self, error: BaseException | None) -> None:
        """Raise the first error that a process met, on all of them; each calls this with its own, or None."""
        errors: list[BaseException | None] = [None] * self.size
        dist.all_gather_object(errors, error and transferable(error))
        raise_first(errors)

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the samples' order."""
        parts: list[Tensor] = [rows] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def local_part(self, rows: Tensor) -> Tensor:
        """This process's part of joined rows."""
        return rows[self._own]


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    value = value.clone()
    dist.all_reduce(value, operation)
    if _pace.is_time():
        _stop_together(value.device)
    return value


def _stop_together(device: torch.device) -> None:
    local_part = [requested(), int(is_over_time()), _pace.proposal() if dist.get_rank() == 0 else 0]
    told = torch.tensor(local_part, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    number, over_time, pause = told.tolist()
    _pace.restart(pause)
    stop_if_any([number])
    if over_time:
        raise TimeLimitError


def raise_first(errors: Sequence[BaseException | None]) -> None:
    """Raise the first error of a list that all processes have."""
    for error in errors:
        if error is not None:
            error.is_shared = True  # type: ignore[attr-defined]
            raise error


def transferable(error: BaseException) -> BaseException:
    """An error that can be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (it is our own)
    except Exception:  # noqa: BLE001 (of whatever its class does)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
