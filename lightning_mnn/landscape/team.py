"""Team: processes that each hold a part of the samples, and what they must agree on.

Every process calls the same methods in the same order; each result is the same on all of them.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lightning_mnn.utilities.interruption import Pace, TimeLimitError, is_over_time, requested, stop_if_any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_pace = Pace(seconds=0.5)  # of questions whether a process is to stop, in work of many sums


class Team:
    """One process with all samples: nothing to agree on.

    >>> Team().sum(torch.tensor([2.0]))
    tensor([2.])
    """

    size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        return value

    def least(self, value: Tensor) -> Tensor:
        """Smallest over the processes, element by element."""
        return value

    def most(self, value: Tensor) -> Tensor:
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

    def own(self, rows: Tensor) -> Tensor:
        """This process's part of joined rows."""
        return rows


class ProcessTeam(Team):
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

    def least(self, value: Tensor) -> Tensor:
        """Smallest over the processes, element by element."""
        return _reduced(value, dist.ReduceOp.MIN)

    def most(self, value: Tensor) -> Tensor:
        """Largest over the processes, element by element."""
        return _reduced(value, dist.ReduceOp.MAX)

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Which flags of the host's are set on one of the processes, which exchange them on a device."""
        return [bool(flag) for flag in self.most(torch.tensor(flags, device=device).int()).tolist()]

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

    def own(self, rows: Tensor) -> Tensor:
        """This process's part of joined rows."""
        return rows[self._own]


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    value = value.clone()
    dist.all_reduce(value, operation)
    if _pace.is_time():
        _stop_together(value.device)
    return value


def _stop_together(device: torch.device) -> None:
    own = [requested(), int(is_over_time()), _pace.proposal() if dist.get_rank() == 0 else 0]
    told = torch.tensor(own, device=device)
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
