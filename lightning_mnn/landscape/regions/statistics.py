"""Training-set statistics: the results of one exact pass over a data set at given weights.

The statistics of parts of the samples are merged, block by block and process by process. So one pass serves every
callback, and the result does not depend on how the samples were split.

Shapes: N samples, d_l units of layer l (d_0 inputs), ``...`` leading axes (replicas). Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.labels import wrong
from lightning_mnn.landscape.network import Network, smallest_sines
from lightning_mnn.landscape.pattern import ActivationPattern, PackedPattern
from lightning_mnn.landscape.regions.region import correlate, gram_rank
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.transfer import to_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


# How a field of the statistics of parts is merged into that of the whole.
_SUM = {"merge": lambda parts: reduce(torch.add, parts)}

_MIN = {"merge": lambda parts: reduce(torch.minimum, parts)}

_MAX = {"merge": lambda parts: reduce(torch.maximum, parts)}

_CONCATENATE = {"merge": lambda parts: torch.cat(parts, dim=-2)}


@dataclass(frozen=True)
class Layer:
    """Statistics of one hidden layer.

    Attributes:
        correlation: Cᵀ diag(e) H, (..., d_l, d_{l−1}), where H are the layer's inputs; with a hidden bias they are
            augmented: (..., d1, d0 + 1). In the last layer C is A, so this is G e. In earlier layers C_ni is the
            derivative of ŷ_n by the layer's pre-activation, so this is −N/2 times the gradient of the MSE.
        squared_norm: ‖G‖² = Σ_n ‖C_n‖² ‖H_n‖² (Frobenius), (...).
        smallest_preactivation: min |u| over samples and units, (...).
        smallest_sines: min over the samples of |u_ni| / (‖w_i‖ ‖h_n‖), (..., d_l).
        kinks: number of pre-activations that are zero up to the rounding of the weights' precision, int64 (...).
        active: number of samples on which each unit is active, int64 (..., d_l).
        unactivated: number of samples on which no unit is active, int64 (...).
        slopes_gram: AᵀA, (..., d_l, d_l).
        bits: the activation pattern at one bit per sample and unit, uint8 (..., N, ⌈d_l/8⌉).
    """

    correlation: Tensor = field(metadata=_SUM)
    squared_norm: Tensor = field(metadata=_SUM)
    smallest_preactivation: Tensor = field(metadata=_MIN)
    smallest_sines: Tensor = field(metadata=_MIN)
    kinks: Tensor = field(metadata=_SUM)
    active: Tensor = field(metadata=_SUM)
    unactivated: Tensor = field(metadata=_SUM)
    slopes_gram: Tensor = field(metadata=_SUM)
    bits: Tensor = field(metadata=_CONCATENATE)

    @property
    def pattern(self) -> PackedPattern:
        """The activation pattern of the samples of the pass, in their order."""
        return PackedPattern(self.bits, self.active.shape[-1])


@dataclass(frozen=True)
class NetworkStatistics:
    """Results of one exact pass over a data set at given weights.

    Attributes:
        num_samples: N.
        squared_error: ‖e‖² = Σ_n (y_n − ŷ_n)², (...).
        squared_target: ‖y‖², (...).
        wrong: number of misclassified samples, int64 (...); None where the targets are not two labels.
        error_excess: max_n |e_n| / (rounding-error bound of e_n), (...): at most 1 where e = 0 up to rounding.
        rounding_bound: the largest rounding-error bound of an e_n, (...).
        layers: one :class:`Layer` for each hidden layer.
        error_sum: Σ_n e_n, −N/2 times the gradient of the MSE by the output bias, (...); None without a bias.
    """

    num_samples: int
    squared_error: Tensor = field(metadata=_SUM)
    squared_target: Tensor = field(metadata=_SUM)
    wrong: Tensor | None = field(metadata=_SUM)
    error_excess: Tensor = field(metadata=_MAX)
    rounding_bound: Tensor = field(metadata=_MAX)
    layers: tuple[Layer, ...] = ()
    error_sum: Tensor | None = field(default=None, metadata=_SUM)

    @property
    def mse(self) -> Tensor:
        """‖e‖²/N, (...)."""
        return self.squared_error / self.num_samples

    @property
    def mce(self) -> Tensor | None:
        """Fraction of misclassified samples, (...)."""
        return None if self.wrong is None else self.wrong.to(torch.float64) / self.num_samples

    @property
    def zero_error(self) -> Tensor:
        """Whether e = 0 up to the rounding of the weights' precision, bool (...): the paper's global minimum."""
        return self.error_excess <= 1

    @property
    def stationarity(self) -> Tensor:
        """‖G e‖ / (‖G‖_F ‖y‖), (...), the largest over the layers; 0 if G e = 0, infinite if y = 0 and G e is not.

        An output bias counts as a layer with the G of a row of ones: |Σ_n e_n| / (√N ‖y‖).
        """
        parts = [(layer.correlation.norm(dim=(-2, -1)), layer.squared_norm) for layer in self.layers]
        if self.error_sum is not None:
            parts.append((self.error_sum.abs(), torch.full_like(self.error_sum, self.num_samples)))
        ratios = []
        for size, squared_norm in parts:
            scale = (squared_norm * self.squared_target).sqrt()
            ratios.append(torch.where(size == 0, 0.0, size / scale))
        return reduce(torch.maximum, ratios)

    @property
    def smallest_preactivation(self) -> Tensor:
        """Smallest |pre-activation| over samples, units and layers, (...)."""
        return reduce(torch.minimum, [layer.smallest_preactivation for layer in self.layers])

    @property
    def smallest_sine(self) -> Tensor:
        """Smallest |pre-activation| relative to ‖w‖‖x‖ over samples, units and layers, (...)."""
        return reduce(torch.minimum, [layer.smallest_sines.amin(-1) for layer in self.layers])

    @property
    def kinks(self) -> Tensor:
        """Number of pre-activations that are zero up to rounding, int64 (...)."""
        return reduce(torch.add, [layer.kinks for layer in self.layers])


def network_statistics(
    network: Network, inputs: Tensor, targets: Tensor, threshold: float | None = None
) -> NetworkStatistics:
    """The statistics of a network on one block of samples.

    The rounding-error bound of e_n is γ (|y_n| + |b₂| + s^L ‖x_n‖ |z| |W_L| … |W_2| r), where r are the row norms of
    W_1 and s = max(1, |ρ|). γ is L + 2 unit roundoffs of the weights' precision, because each weight may have an error
    of one unit roundoff, plus d_0 + … + d_L + 4 unit roundoffs of float64, for the inner products of this pass. A
    hidden bias counts as one more column of W_1, with 1 as one more input.

    Args:
        network: the weights, one network or R side by side.
        inputs: (..., N, d0).
        targets: (..., N).
        threshold: decision threshold of the classification error; None: no classification error.

    Raises:
        ValueError: the inputs have another dimension than those of the network.

    >>> net = Network((torch.tensor([[1.0, 0.0], [0.0, 1.0]]),), torch.tensor([1.0, 1.0]), negative_slope=0.0)
    >>> found = network_statistics(net, torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.0]))
    >>> found.mse, found.layers[0].correlation.tolist()
    (tensor(24.5000, dtype=torch.float64), [[-21.0, -28.0], [-21.0, -28.0]])
    """
    if inputs.shape[-1] != network.input_dim:
        raise ValueError(f"inputs have {inputs.shape[-1]} features and the network takes {network.input_dim}")
    slope = network.negative_slope
    network = network.to(torch.float64)
    inputs, targets = inputs.to(torch.float64), targets.to(torch.float64)
    hidden, output = (network.rows, *network.hidden_weights[1:]), network.output_weights

    preactivations = network.preactivations(inputs)
    slopes = [ActivationPattern(u > 0).slopes(slope) for u in preactivations]
    layer_inputs = [network.augment(inputs), *(a * u for a, u in zip(slopes, preactivations, strict=True))]
    predictions = (layer_inputs[-1] @ output[..., None])[..., 0]
    if network.output_bias is not None:
        predictions = predictions + network.output_bias[..., None]
    residual = targets - predictions

    coefficients = [slopes[-1]]
    if len(hidden) > 1:
        derivative = slopes[-1] * output[..., None, :]
        for a, weights in zip(slopes[-2::-1], hidden[:0:-1], strict=True):
            derivative = (derivative @ weights) * a
            coefficients.insert(0, derivative)

    bound = _rounding_bound(network, layer_inputs[0], targets)
    return NetworkStatistics(
        num_samples=inputs.shape[-2],
        squared_error=residual.square().sum(-1),
        squared_target=targets.square().sum(-1).expand(residual.shape[:-1]),
        wrong=None if threshold is None else wrong(predictions, targets, threshold).sum(-1),
        error_excess=torch.where(residual == 0, 0.0, residual.abs() / bound).amax(-1),
        rounding_bound=bound.amax(-1),
        layers=tuple(
            _layer_statistics(weights, u, c, h, residual=residual, network=network)
            for weights, u, c, h in zip(hidden, preactivations, coefficients, layer_inputs, strict=False)
        ),
        error_sum=None if network.output_bias is None else residual.sum(-1),
    )


def exact_patterns(network: Network, inputs: Tensor) -> tuple[ActivationPattern, ...]:
    """Activation patterns of every layer, equal to those of :func:`network_statistics`, without the other statistics.

    With one hidden layer the products are computed in the full precision of the weights (reduced-precision settings of
    torch are ignored). Only those with a doubtful sign, no larger than their rounding-error bound
    2 (d0 + 4) eps ‖w‖‖x‖, are computed again in float64.

    Args:
        network: the weights.
        inputs: (..., N, d0), in the precision of the weights.
    """
    if len(network.hidden_weights) > 1 or inputs.dtype == torch.float64:
        wide = network.to(torch.float64)
        return tuple(ActivationPattern.from_preactivations(u) for u in wide.preactivations(inputs.double()))
    weights, inputs = network.rows, network.augment(inputs)
    with full_precision():
        preactivations = inputs @ weights.mT
    bound = 2 * (inputs.shape[-1] + 4) * torch.finfo(inputs.dtype).eps * inputs.norm(dim=-1)[..., None]
    active = ActivationPattern.from_preactivations(preactivations).active
    doubtful = (preactivations.abs() <= bound * weights.norm(dim=-1)[..., None, :]).nonzero(as_tuple=True)
    *replica, sample, unit = doubtful
    rows = inputs[(*replica, sample)] if inputs.ndim == 3 else inputs[sample]
    active[doubtful] = (rows.double() * weights[(*replica, unit)].double()).sum(-1) > 0
    return (ActivationPattern(active),)


def merge_statistics(parts: Sequence[NetworkStatistics]) -> NetworkStatistics:
    """The statistics of all samples from those of parts of them, in the order of the samples.

    Sums are computed in the given order, so the same parts give the same bits.
    """
    if len(parts) == 1:
        return parts[0]
    layers = tuple(Layer(**_merged(layer)) for layer in zip(*(part.layers for part in parts), strict=True))
    return NetworkStatistics(
        **_merged(parts) | {"num_samples": sum(part.num_samples for part in parts), "layers": layers}
    )


def on_cpu(statistics: NetworkStatistics) -> NetworkStatistics:
    """The same statistics with their tensors on the CPU, where those of several processes can be merged."""
    measured: list[NetworkStatistics | Layer] = [statistics, *statistics.layers]
    parts = [_measures(part) for part in measured]
    moved = iter(to_host([value for part in parts for value in part.values() if value is not None]))
    found: list[dict[str, Any]] = [
        {name: None if value is None else next(moved) for name, value in part.items()} for part in parts
    ]
    layers = tuple(Layer(**layer) for layer in found[1:])
    return NetworkStatistics(**found[0] | {"num_samples": statistics.num_samples, "layers": layers})


def rank_cap(statistics: NetworkStatistics, input_rank: Tensor, negative_slope: float) -> Tensor:
    """Upper bound on rank(A∘X) of a two-layer network: min(N − #samples without an active unit, rank A · rank X).

    A sample on which no unit is active is a zero column for the ReLU, and is not subtracted for other slopes. With a
    hidden bias X is the augmented matrix; an output bias is not part of A∘X.

    Args:
        statistics: the result of an exact pass, for one network or R.
        input_rank: rank of X, int64 (...).
        negative_slope: ρ.

    Returns:
        int64 (...).
    """
    layer = statistics.layers[-1]
    unactivated = layer.unactivated if negative_slope == 0 else torch.zeros_like(layer.unactivated)
    products = gram_rank(layer.slopes_gram) * input_rank.to(layer.slopes_gram.device)
    return torch.minimum(statistics.num_samples - unactivated, products)


def _layer_statistics(
    weights: Tensor, u: Tensor, coefficients: Tensor, inputs: Tensor, *, residual: Tensor, network: Network
) -> Layer:
    pattern = ActivationPattern.from_preactivations(u)
    slopes = pattern.slopes(network.negative_slope)
    sample_norms, weight_norms = inputs.norm(dim=-1), weights.norm(dim=-1)
    sizes = torch.where(sample_norms[..., None] > 0, u.abs(), torch.inf)
    roundoff = (
        network.unit_roundoff + (weights.shape[-1] + 2) * tolerances.UNIT_ROUNDOFF
    )  # of a weight, and of this product
    tolerance = roundoff * sample_norms[..., None] * weight_norms[..., None, :]
    return Layer(
        correlation=correlate(coefficients, inputs, residual),
        squared_norm=(coefficients.norm(dim=-1) * sample_norms).square().sum(-1),
        smallest_preactivation=sizes.amin((-2, -1)),
        smallest_sines=smallest_sines(u, sample_norms, weight_norms),
        kinks=(sizes <= tolerance).sum((-2, -1)),
        active=pattern.active.sum(-2),
        unactivated=(~pattern.active.any(-1)).sum(-1),
        slopes_gram=slopes.mT @ slopes,
        bits=pattern.pack().bits,
    )


def _rounding_bound(network: Network, inputs: Tensor, targets: Tensor) -> Tensor:
    """Bounds on the rounding errors of the residual, (..., N), for augmented inputs."""
    slope = max(1.0, abs(network.negative_slope))
    reach = slope * network.rows.norm(dim=-1)  # of each unit's output, relative to ‖x_n‖
    for weights in network.hidden_weights[1:]:
        reach = slope * (weights.abs() @ reach[..., None])[..., 0]
    largest = (network.output_weights.abs() * reach).sum(-1)
    products = (inputs.shape[-1] + sum(network.hidden_dims) + 4) * tolerances.UNIT_ROUNDOFF
    gamma = (len(network.hidden_weights) + 2) * network.unit_roundoff + products
    size: Tensor = targets.abs() + inputs.norm(dim=-1) * largest[..., None]
    if network.output_bias is not None:
        size = size + network.output_bias.abs()[..., None]
    return gamma * size


def _measures(part: NetworkStatistics | Layer) -> dict[str, Tensor | None]:
    return {item.name: getattr(part, item.name) for item in fields(part) if "merge" in item.metadata}


def _merged(parts: Sequence[NetworkStatistics] | Sequence[Layer]) -> dict[str, Any]:
    rules = {item.name: item.metadata["merge"] for item in fields(parts[0]) if "merge" in item.metadata}
    values = {name: [getattr(part, name) for part in parts] for name in rules}
    return {name: None if values[name][0] is None else rule(values[name]) for name, rule in rules.items()}
