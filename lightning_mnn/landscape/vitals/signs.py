"""Vital signs of a layer: dead and dormant units, local complexity, and the effective rank of its activations.

Shapes: N samples, d1 units of a layer, d0 inputs, q directions, ``...`` leading axes (replicas).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.pattern import count_packed
from lightning_mnn.utilities.transfer import to_host, widest_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from lightning_mnn.landscape.pattern import PackedPattern

_BLOCK_NUMBERS = 1 << 22  # numbers of activations that are converted to float64 at a time


def random_frame(input_dim: int, num_directions: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal directions v_1, …, v_q, uniform over all such frames.

    They are the first columns of the Q in QR of a normal matrix, with the signs of R's diagonal (Mezzadri 2007).

    Args:
        input_dim: d0.
        num_directions: q; at most d0 are returned, as there are no more.
        generator: draws them, on the CPU.

    Returns:
        float64 (min(q, d0), d0).

    >>> frame = random_frame(5, 3, torch.Generator().manual_seed(0))
    >>> torch.allclose(frame @ frame.T, torch.eye(3, dtype=torch.float64))
    True
    """
    normal = torch.randn(input_dim, min(num_directions, input_dim), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    frame: Tensor = (q * r.diagonal().sign()).mT
    return frame


def local_complexity(vertices: Iterable[Mapping[str, PackedPattern]]) -> dict[str, Tensor]:
    """Local complexity of each layer: mean over the samples of the number of units with a kink among the vertices.

    The vertices around a sample x are x ± r v_j, for a radius r and an orthonormal frame v_1, …, v_q (see
    :func:`random_frame`). A unit counts if its pre-activation takes both signs on them; a unit of more than two pieces,
    if it is on more than one. The sum over the layers is the local complexity of the network.

    Args:
        vertices: the patterns of the layers, by name, on one vertex of all samples at a time: all on x + r v_1, then
            all on x − r v_1, and so on. Two patterns are in memory beside the current one.

    Returns:
        float64 (...) by layer, on the CPU.

    Raises:
        ValueError: there are no vertices, or their patterns differ in shape.

    Source: Humayun, Balestriero and Baraniuk, "Deep networks always grok and here is why", 2024.

    >>> from lightning_mnn.landscape import ActivationPattern
    >>> on = [torch.tensor([[True, False]]), torch.tensor([[True, True]])]
    >>> local_complexity([{"1": ActivationPattern(active).pack()} for active in on])
    {'1': tensor(1., dtype=torch.float64)}
    """
    first: dict[str, PackedPattern] = {}
    crossing: dict[str, Tensor] = {}
    for patterns in vertices:
        for name, pattern in patterns.items():
            if name not in first:
                first[name], crossing[name] = pattern, torch.zeros_like(pattern.bits)
                continue
            if not pattern.is_comparable(first[name]):
                raise ValueError(f"the patterns of {name} have different shapes on two vertices: give the same samples")
            crossing[name] |= first[name].bits ^ pattern.bits
    if not first:
        raise ValueError("vertices must not be empty: give the patterns on x + r v and x - r v for some v")
    found = {}
    for (name, pattern), bits in zip(first.items(), to_host(list(crossing.values())), strict=True):
        counts = count_packed(bits, pattern.num_pieces)
        found[name] = counts.to(torch.float64) / pattern.bits.shape[-2]
    return found


def dormant_units(activations: Tensor) -> Tensor:
    """Which units are dormant: mean_n |a_ni| is at most τ = 0.025 of the layer's mean of it.

    If all activations of a layer are zero, all of its units are dormant.

    Args:
        activations: the outputs a of a layer, (..., N, d1).

    Returns:
        bool (..., d1).

    Source: Sokar, Agarwal, Castro and Evci, "The dormant neuron phenomenon in deep reinforcement learning", 2023.

    >>> dormant_units(torch.tensor([[1.0, 0.01, -2.0], [1.0, 0.0, 2.0]]))
    tensor([False,  True, False])
    """
    sizes = activations.abs().mean(-2, dtype=torch.promote_types(activations.dtype, torch.float32))
    return sizes <= tolerances.MAX_DORMANT_RATIO * sizes.mean(-1, keepdim=True)


def dormant_fraction(activations: Tensor) -> Tensor:
    """Fraction of the units of a layer that are dormant (see :func:`dormant_units`).

    Args:
        activations: the outputs of a layer, (..., N, d1).

    Returns:
        float32 (...), on their device.

    >>> float(dormant_fraction(torch.tensor([[1.0, 0.01, -2.0, 1.0], [1.0, 0.0, 2.0, 1.0]])))
    0.25
    """
    return dormant_units(activations).float().mean(-1)


def effective_rank(activations: Tensor) -> Tensor:
    """Effective rank of activations: exp of the entropy of p_k = σ_k / Σσ, with their singular values σ.

    It lies between 1 and min(N, d1), and is the number of nonzero singular values if these are equal. It is 0 if all
    activations are zero.

    Args:
        activations: the outputs of a layer, (..., N, d1).

    Returns:
        (...), in the widest float of their device.

    Source: Roy and Vetterli, "The effective rank", 2007.

    >>> f"{float(effective_rank(torch.eye(3))):.4f}"
    '3.0000'
    """
    return effective_rank_of_gram(sample_gram(activations))


def sample_gram(activations: Tensor) -> Tensor:
    """A Aᵀ of activations A (..., N, d1): (..., N, N), in the widest float of their device.

    The Gram matrix of several layers side by side is the sum of theirs.
    """
    dtype = widest_dtype(activations.device)
    rows = activations.shape[:-1].numel()
    gram = torch.zeros(*activations.shape[:-1], activations.shape[-2], dtype=dtype, device=activations.device)
    for block in torch.split(activations, max(1, _BLOCK_NUMBERS // max(rows, 1)), dim=-1):
        wide = block.to(dtype)
        gram += wide @ wide.mT
    return gram


def effective_rank_of_gram(gram: Tensor) -> Tensor:
    """Effective rank of the matrix whose Gram matrix this is (see :func:`effective_rank`).

    Args:
        gram: (..., N, N), without NaN.

    >>> f"{float(effective_rank_of_gram(torch.diag(torch.tensor([4.0, 4.0, 0.0])))):.4f}"
    '2.0000'
    """
    eigenvalues = torch.linalg.eigvalsh(gram)
    rounding = gram.shape[-1] * torch.finfo(gram.dtype).eps * eigenvalues[..., -1:]
    singular = torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()  # the root would magnify what is rounding
    total = singular.sum(-1, keepdim=True)
    p = singular / torch.where(total > 0, total, torch.ones_like(total))
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, torch.zeros_like(rank))
