"""Whitening: an affine map of the inputs after which they are centred and, up to a floor, of equal variance.

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
    from collections.abc import Iterable, Sequence

    from lightning_mnn.utilities.distributed import ProcessGroup

ROWS = 256  # that are mapped at a time


@dataclass(frozen=True)
class Moments:
    """First and second moments of samples: enough to centre and whiten them, and all that needs a pass over them.

    Attributes:
        count: N.
        mean: float64 (d0,).
        scatter: sums of products of deviations from the mean, float64 (d0, d0), or of their squares alone, (d0,).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """The scatter divided by N: (d0, d0), or the variances alone, (d0,)."""
        return self.scatter / self.count


def moments(
    blocks: Iterable[Tensor], input_dim: int, *, products: bool = True, device: torch.device | str = "cpu"
) -> Moments:
    """Moments of samples that come in blocks, in one pass and memory O(d0² + a block).

    Every block is centred by its own mean and joined to those before it by Chan's formula, so that a mean far from
    zero costs no digits of the variance.

    Args:
        blocks: (n, d0) each, of any real dtype.
        input_dim: d0.
        products: between different inputs too, as whitening needs; else their squares alone.
        device: where to compute; it must know float64.

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
        own = rows.mean(0)
        rows = rows.sub_(own) if block.dtype != torch.float64 else rows - own
        if products:
            scatter.addmm_(rows.T, rows)
        else:
            scatter += rows.square_().sum(0)
        total = count + len(block)
        shift = own.sub_(mean)
        _add_shift(scatter, shift, count * len(block) / total)
        mean += shift * (len(block) / total)
        count = total
    return Moments(count, mean, scatter)


def merged(parts: Sequence[Moments]) -> Moments:
    """Moments of all samples from those of parts of them.

    >>> x = torch.arange(12.0).reshape(6, 2)
    >>> found = merged([moments([x[:1]], 2), moments([x[1:]], 2)])
    >>> bool(torch.allclose(found.covariance, torch.cov(x.double().T, correction=0)))
    True
    """
    count = sum(part.count for part in parts)
    mean = torch.stack([part.mean * (part.count / count) for part in parts]).sum(0)
    scatter = torch.zeros_like(parts[0].scatter)
    for part in parts:
        scatter += part.scatter
        _add_shift(scatter, part.mean - mean, part.count)
    return Moments(count, mean, scatter)


def moments_of_group(own: Moments, process_group: ProcessGroup) -> Moments:
    """Moments of the samples of all processes, the same on each of them: what :func:`merged` gives, to rounding.

    Collective: every process of the team must call it. The scatter of ``own`` is written over.
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

    With ``floor`` = 0 the map whitens fully, and directions without variance are an error; a positive floor leaves
    directions with much less variance than the average nearly as small as they were: variance λ becomes
    λ / (λ + floor · c̄).

    Args:
        covariance: float64 (d0, d0).
        floor: least variance, relative to the mean variance of an input.

    Returns:
        float64 (d0, d0); whitened inputs are ``(inputs - mean) @ T``.

    Raises:
        ValueError: a negative or infinite floor, or one too small for inputs without variance in some direction; the
            message names the least one that will do.

    >>> whitening_matrix(torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64)), floor=0.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    return _whitening(covariance.clone(), floor)[0]


def _whitening(covariance: Tensor, floor: float) -> tuple[Tensor, float]:
    """T, and the mean variance of an input after it; the covariance is written over, for it may be a large one."""
    check_floor(floor)
    mean = float(covariance.diagonal().mean())
    values, vectors = covariance.new_empty(len(covariance)), covariance.T  # columns in a row, as eigh wants them
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
        ValueError: it is no number, negative or infinite.
    """
    if not is_real_number(floor) or floor < 0:
        raise ArgumentError("whiten", floor, "must be a finite number that is not negative, or null")


@dataclass(frozen=True)
class InputMap:
    """The map x ↦ scale · (x − mean) T of inputs, whose images may then be brought to one norm.

    Attributes:
        mean: (d0,).
        matrix: T, (d0, d0); None: the identity.
        scale: a number.
        equal_norms: whether images x are divided by ‖x‖/√d0, but for those that are zero.
    """

    mean: Tensor
    matrix: Tensor | None
    scale: float
    equal_norms: bool = False

    def to(self, device: torch.device | str, dtype: torch.dtype) -> InputMap:
        """The map with its numbers in another precision, which is that of what it computes."""
        matrix = None if self.matrix is None else self.matrix.to(device, dtype)
        return replace(self, mean=self.mean.to(device, dtype), matrix=matrix)

    def apply(self, rows: Tensor, out: Tensor) -> Tensor:
        """Map rows and round them to the dtype of ``out``.

        Without T and norms every number is computed by itself, so a row has one image, bit for bit, whatever rows
        stand beside it. With them the products and sums are all of one shape, blocks of 256 rows filled up with zeros:
        the same holds as far as the machine treats the rows of one shape alike.

        Args:
            rows: (n, d0) of any real dtype.
            out: (n, d0), on the device of the map: where the images are written.

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
        """Centred and scaled rows after T and with their norm."""
        if self.matrix is not None:
            rows = rows @ self.matrix
        if self.equal_norms:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows * torch.where(norms > 0, math.sqrt(rows.shape[1]) / norms, 1.0)
        return rows


def input_map(found: Moments, floor: float | None) -> InputMap:
    """The map after which samples with these moments have mean 0, mean variance 1, and are whitened if asked.

    Args:
        found: moments, with products where there is to be whitening: then the scatter is written over, and finding its
            eigenvectors takes about twice its memory besides.
        floor: of :func:`whitening_matrix`; None: only centre and scale.

    Raises:
        ValueError: samples that are all the same, or what :func:`whitening_matrix` refuses.

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
