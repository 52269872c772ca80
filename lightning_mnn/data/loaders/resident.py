"""Data that fits in memory: tensors that stay on the device, and mini-batches that are selected from them by index.

Shapes: N samples, d0 inputs, R replicas, B samples per batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_mnn.data.loaders.exact import ExactData, ExactLoader
from lightning_mnn.utilities.transfer import sent

if TYPE_CHECKING:
    from torch import Tensor


class ResidentLoader(ExactLoader):
    """Batches (inputs, targets) of tensors in memory; the batches do not depend on the number of processes.

    Args:
        inputs: (N, d0), or (R, N, d0) with one data set per replica.
        targets: (N,) or (R, N).
        batch_size: B over all processes; None: all N samples.
        **options: see :class:`ExactLoader`.

    Raises:
        ValueError: shapes do not match, the data set is empty, or the batch size is not positive.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int | None = None, **options: Any) -> None:
        if inputs.ndim not in (2, 3) or inputs.shape[-2] != targets.shape[-1]:
            raise ValueError(
                "inputs must be (N, d0) or (R, N, d0) and targets (N,) or (R, N), "
                f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
            )
        super().__init__(inputs.shape[-2], batch_size, **options)
        replicas = len(self.sampler.seeds)
        for name, tensor, plain in (("inputs", inputs, 2), ("targets", targets, 1)):
            if tensor.ndim > plain and tensor.shape[0] != replicas:
                raise ValueError(f"{name} have {tensor.shape[0]} replicas, but there are {replicas} seeds")
        self.inputs = inputs
        self.targets = targets
        self._order: tuple[int, Tensor] | None = None  # an epoch and its order
        self._memory: tuple[Tensor, Tensor] | None = None  # buffers of the last batch, to be reused

    @property
    @override
    def numbers_per_sample(self) -> int:
        return self.inputs.numel() // self.num_samples

    @override
    def samples(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[..., index, :], self.targets[..., index]

    @override
    def _part(self, first: int, low: int, high: int, *, reuse: bool) -> tuple[tuple[Tensor, Tensor], slice | Tensor]:
        if self.num_steps == 1:
            return self.samples(slice(low, high)), slice(low, high)
        if self._order is None or self._order[0] != self.sampler.epoch:
            self._order = self.sampler.epoch, sent(self.sampler.permutation(), self.inputs.device)
        index = self._order[1][..., first + low : first + high]
        if index.ndim == 1 and self.inputs.ndim == 2:
            return self._gathered(index, reuse=reuse), index
        inputs = _select(self.inputs, index, per_replica=self.inputs.ndim == 3)
        return (inputs, _select(self.targets, index, per_replica=self.targets.ndim == 2)), index

    @property
    @override
    def repeats(self) -> bool:
        return self.num_steps == 1 and self.world_size == 1

    def _gathered(self, index: Tensor, *, reuse: bool) -> tuple[Tensor, Tensor]:
        """The samples at one index, in the last batch's memory if reused: new pages cost as much time as the copy."""
        if not reuse:
            return self.inputs[index], self.targets[index]
        if self._memory is None or len(self._memory[1]) != len(index):
            self._memory = self.inputs.new_empty(len(index), self.inputs.shape[1]), self.targets.new_empty(len(index))
        torch.index_select(self.inputs, 0, index, out=self._memory[0])
        torch.index_select(self.targets, 0, index, out=self._memory[1])
        return self._memory


def _select(tensor: Tensor, index: Tensor, *, per_replica: bool) -> Tensor:
    """Samples (B,) or (R, B) of a tensor (N, …) that all replicas share, or (R, N, …) with one part per replica.

    It uses ``index_select``, which needs a third of the time of indexing with brackets.
    """
    if per_replica:
        starts = tensor.shape[1] * torch.arange(len(tensor), device=index.device)
        tensor, index = tensor.flatten(0, 1), index + starts[:, None]
    return tensor.index_select(0, index.flatten()).reshape(*index.shape, *tensor.shape[1:])


class ResidentData(ExactData):
    """A data module whose training set is a pair of tensors, which a subclass returns from :meth:`tensors`.

    Args:
        **options: see :class:`ExactData`.

    Attributes:
        inputs: (N, d0) or (R, N, d0); None before setup.
        targets: (N,) or (R, N); None before setup.
        test_inputs: of the test set; None before setup, and if there is none.
        test_targets: of the test set.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self.test_inputs: Tensor | None = None
        self.test_targets: Tensor | None = None

    @abstractmethod
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The training set before its labels are changed: inputs (N, d0) or (R, N, d0), targets (N,) or (R, N)."""

    def test_tensors(self) -> tuple[Tensor, Tensor] | None:
        """The test set, with the shapes of :meth:`tensors`; None: there is none."""
        return None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.inputs is not None:
            return
        inputs, targets = self.tensors()
        self.inputs, self.targets = inputs.to(self.dtype), self.changed_labels(targets.to(self.dtype))
        if (test := self.test_tensors()) is not None:
            self.test_inputs, self.test_targets = test[0].to(self.dtype), test[1].to(self.dtype)

    @override
    def loader(self, device: torch.device, **options: Any) -> ResidentLoader:
        assert self.inputs is not None  # noqa: S101 (for the type checker)
        assert self.targets is not None  # noqa: S101
        return ResidentLoader(self.inputs.to(device), self.targets.to(device), **options)

    @override
    def test_loader(self, device: torch.device, **options: Any) -> ResidentLoader | None:
        if self.test_inputs is None or self.test_targets is None:
            return None
        return ResidentLoader(self.test_inputs.to(device), self.test_targets.to(device), **options)


class TensorData(ResidentData):
    """A data module for the user's own tensors.

    Args:
        inputs: (N, d0), or (R, N, d0) with one data set per replica.
        targets: (N,) or (R, N).
        **options: see :class:`ResidentData`.

    >>> len(TensorData(torch.zeros(10, 3), torch.ones(10), batch_size=4).train_dataloader())
    3
    """

    def __init__(self, inputs: Tensor, targets: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self._tensors = inputs, targets

    @override
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._tensors

    @property
    @override
    def input_dim(self) -> int:
        return self._tensors[0].shape[-1]
