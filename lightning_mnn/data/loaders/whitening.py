"""Whitening: an affine map that centres the inputs and, up to a floor, gives them equal variance in all directions.

Shapes: N samples, d0 inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mnn.utilities.validation import ArgumentError, is_real_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_mnn.utilities.distributed import ProcessGroup

ROWS = 256  # rows that are mapped at a time


@dataclass(frozen=True)
class Moments:
    """First and second moments of samples, which are enough to centre and whiten them without another pass.

    Attributes:
        count: N.
        mean: float64 (d0,).
        scatter: sums of products of deviations from the mean, float64 (d0, d0), or only of their squares, (d0,).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """The scatter divided by N: (d0, d0), or only the variances, (d0,)."""
        return self.scatter / self.count


def moments(
    blocks: Iterable[Tensor], input_dim: int, *, products: bool = True, device: torch.device | str = "cpu"
) -> Moments:
    """Moments of samples in blocks, in one pass and with memory for d0² numbers and one block.

    Every block is centred by its own mean and merged with those before it by Chan's formula, so that a mean far from
    zero does not reduce the accuracy of the variance.

    Args:
        blocks: (n, d0) each, of any real dtype.
        input_dim: d0.
        products: whether to compute products of different inputs too, which whitening needs; else only squares.
        device: where to compute; it must support float64.

    >>> found = moments([torch.tensor([[1, 5]]), torch.tensor([[3, 5], [5, 5]])], 2)
    >>> found.mean, found.covariance[0, 0]
    (tensor([3., 5.], dtype=torch.float64), tensor(2.6667, dtype=torch.float64))
    """
    mean = torch.zeros(input_dim, dtype=torch.float64, device=device)
    scatter = mean.new_zeros((input_dim, input_dim) if products else (input_dim,))
    count = 0
    for block in blocks:
        if len(block) == 0:
            continue
        rows = block.to(device, torch.float64)
        block_mean = rows.mean(0)
        rows = rows.sub_(block_mean) if block.dtype != torch.float64 else rows - block_mean
        if products:
            scatter.addmm_(rows.T, rows)
        else:
            scatter += rows.square_().sum(0)
        total = count + len(block)
        shift = block_mean.sub_(mean)
        _add_shift(scatter, shift, count * len(block) / total)
        mean += shift * (len(block) / total)
        count = total
    return Moments(count, mean, scatter)


def moments_of_group(own: Moments, process_group: ProcessGroup) -> Moments:
    """Moments of the samples of all processes, the same on each of them.

    Collective: every process of the group must call it. The scatter of ``own`` is overwritten.
    """
    if process_group.size == 1:
        return own
    count = int(process_group.sum(torch.tensor(own.count, device=own.mean.device)))
    mean = process_group.sum(own.mean * (own.count / count))
    _add_shift(own.scatter, own.mean - mean, own.count)
    return Moments(count, mean, process_group.sum(own.scatter))


def _add_shift(scatter: Tensor, shift: Tensor, weight: float) -> None:
    """Add weight · shift shiftᵀ, or its diagonal."""
    if scatter.ndim == 2:
        scatter.addr_(shift, shift, alpha=weight)
    else:
        scatter.addcmul_(shift, shift, value=weight)


def whitening_matrix(covariance: Tensor, floor: float) -> Tensor:
    """The symmetric matrix T = (C + floor · c̄ · I)^(−½), C the covariance of the inputs, c̄ the mean of its diagonal.

    With ``floor`` = 0 the map whitens fully, and a direction without variance is an error. With a positive floor,
    directions with much less variance than the average stay small: variance λ becomes λ / (λ + floor · c̄).

    Args:
        covariance: float64 (d0, d0).
        floor: variance added in every direction, relative to the mean variance of an input.

    Returns:
        float64 (d0, d0); whitened inputs are ``(inputs - mean) @ T``.

    Raises:
        ValueError: the floor is negative or infinite, or too small for inputs without variance in some direction; the
            message names the smallest possible floor.

    >>> whitening_matrix(torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64)), floor=0.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    return _whitening(covariance.clone(), floor)[0]


def _whitening(covariance: Tensor, floor: float) -> tuple[Tensor, float]:
    """T, and the mean variance of an input after it. The covariance is overwritten, because it may be large."""
    check_floor(floor)
    mean = float(covariance.diagonal().mean())
    values, vectors = covariance.new_empty(len(covariance)), covariance.T  # column-major, as eigh requires for out
    torch.linalg.eigh(vectors, out=(values, vectors))
    values.clamp_(min=0)
    floored = values + floor * mean
    rounding = len(values) * torch.finfo(values.dtype).eps
    if floored[0] <= rounding * floored[-1]:
        least = (rounding * float(values[-1]) - float(values[0])) / (mean * (1 - rounding))
        problem = f"must be at least {1.1 * least:.1e}"
        raise ArgumentError("whiten", floor, problem, "the inputs have no variance in some direction")
    vectors *= floored**-0.25
    return vectors @ vectors.T, float((values / floored).mean())


def check_floor(floor: Any) -> None:
    """Check the floor of a whitening.

    Raises:
        ValueError: the floor is not a number, or it is negative or infinite.
    """
    if not is_real_number(floor) or floor < 0:
        raise ArgumentError("whiten", floor, "must be a finite number that is not negative, or null")


@dataclass(frozen=True)
class InputMap:
    """The map x ↦ scale · (x − mean) T of inputs, whose results may then be normalised.

    Attributes:
        mean: (d0,).
        matrix: T, (d0, d0); None: the identity.
        scale: a number.
        equal_norms: whether results x are divided by ‖x‖/√d0; results that are zero stay zero.
    """

    mean: Tensor
    matrix: Tensor | None
    scale: float
    equal_norms: bool = False

    def to(self, device: torch.device | str, dtype: torch.dtype) -> InputMap:
        """The map with its numbers on another device and in another dtype, in which it then computes."""
        matrix = None if self.matrix is None else self.matrix.to(device, dtype)
        return replace(self, mean=self.mean.to(device, dtype), matrix=matrix)

    def apply(self, rows: Tensor, out: Tensor) -> Tensor:
        """Map rows and round them to the dtype of ``out``.

        Without T and norms, every number is computed separately, so the result of a row is the same, bit for bit,
        whatever the other rows are. With them, all products and sums have the same shape, blocks of 256 rows padded
        with zeros, so the same is true as long as the machine computes all rows of one shape in the same way.

        Args:
            rows: (n, d0) of any real dtype.
            out: (n, d0) on the device of the map, for the results.

        Returns:
            ``out``.

        >>> InputMap(torch.tensor([1.0, 2.0]), None, 3.0).apply(torch.tensor([[2, 2]]), torch.empty(1, 2))
        tensor([[3., 0.]])
        """
        direct = self.matrix is None and not self.equal_norms and out.dtype == self.mean.dtype
        memory = None if direct else self.mean.new_zeros(ROWS, len(self.mean))
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            block = out[part] if memory is None else memory[: len(rows[part])]
            block.copy_(rows[part]).sub_(self.mean).mul_(self.scale)
            if memory is not None:
                memory[len(block) :] = 0
                out[part] = self._whitened(memory)[: len(block)]
        return out

    def _whitened(self, rows: Tensor) -> Tensor:
        """Apply T and the normalisation to centred and scaled rows."""
        if self.matrix is not None:
            rows = rows @ self.matrix
        if self.equal_norms:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows * torch.where(norms > 0, math.sqrt(rows.shape[1]) / norms, 1.0)
        return rows


def input_map(found: Moments, floor: float | None) -> InputMap:
    """The map that gives samples with these moments mean 0 and mean variance 1, and whitens them if requested.

    Args:
        found: moments. Whitening needs the products; it overwrites the scatter, and needs about twice its memory in
            addition to find the eigenvectors.
        floor: of :func:`whitening_matrix`; None: only centre and scale.

    Raises:
        ValueError: all samples are the same, or :func:`whitening_matrix` raises it.

    >>> input_map(moments([torch.tensor([[0.0], [4.0]])], 1), None)
    InputMap(mean=tensor([2.], dtype=torch.float64), matrix=None, scale=0.5, equal_norms=False)
    """
    variances = found.scatter.diagonal() if found.scatter.ndim == 2 else found.scatter
    variance = float(variances.mean()) / found.count
    if not variance > (8 * torch.finfo(torch.float64).eps * float(found.mean.abs().max())) ** 2:
        raise ValueError(f"the inputs of all {found.count} samples are the same: there is nothing to learn from them")
    if floor is None:
        return InputMap(found.mean, None, variance**-0.5)
    matrix, variance = _whitening(found.scatter.div_(found.count), floor)
    return InputMap(found.mean, matrix, variance**-0.5)
