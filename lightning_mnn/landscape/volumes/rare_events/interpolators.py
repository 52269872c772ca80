"""Random interpolators: networks with random weights, given that they make no error on the training set.

All weights θ are i.i.d. N(0, 1), in every layer, and a network classifies by the sign of its output. Two questions: how
probable is it that such a network makes no training error, and what is then the law of its error on a test set? (See
Buzaglo et al., How Uniform Random Weights Induce Non-uniform Bias, ICML 2024.) The answers depend on the data and the
architecture alone, so they show what training adds.

Shapes: N samples, d0 inputs, D weights, B networks, T test samples, R runs, P particles.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy import stats

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.intervals import Estimate, Proportion
from lightning_mnn.landscape.volumes.rare_events.paths import PathPopulation
from lightning_mnn.landscape.volumes.rare_events.splitting import (
    Population,
    Stage,
    estimate_of_levels,
    estimate_of_runs,
    splitting_stages,
)
from lightning_mnn.landscape.volumes.region_census import DataSet
from lightning_mnn.utilities.transfer import sent, widest_dtype
from lightning_mnn.utilities.validation import one_of, positive_integer, real_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_mnn.landscape.volumes.rare_events.splitting import Score

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_MAX_BINS = 50  # of the test error

_ENTRIES_PER_BATCH = 60_000  # pre-activations that are computed at once: they fit into a processor's cache

_MAX_LEAD = 1 - 1e-9  # below 1 by more than the rounding of the number of samples that it is added to

_MARGIN = 0.2  # of an output that counts as right in the score, relative to rms(f)

_PARTICLES_PER_STAGE = 200  # of each run, on which the test error is computed at the stages before the last


class Moves(StrEnum):
    """How particles move at a level.

    Attributes:
        WALK: by random walks, of all weights and of single units and layers; best up to about 100 weights.
        PATHS: along paths that bounce off the boundary of the event, all of whose states count.
    """

    WALK = auto()
    PATHS = auto()


class Architecture(NamedTuple):
    """A fully connected network with one output: f(x) = a·φ(… φ(W x + b) …), φ(z) = max(z, 0) + ρ min(z, 0).

    Its weights are one vector θ, (D,), layer by layer: the matrix (outputs, inputs), row by row, then its biases.

    Attributes:
        input_dim: d0.
        hidden_dims: widths of the hidden layers; () for a perceptron, f(x) = a·x.
        negative_slope: ρ.
        bias: whether every layer has biases, the last one included.

    >>> Architecture(3, (4,)).num_weights, Architecture(3, (4,), bias=True).num_weights
    (16, 21)
    """

    input_dim: int
    hidden_dims: tuple[int, ...]
    negative_slope: float = 0.0
    bias: bool = False

    @property
    def num_weights(self) -> int:
        """D."""
        return sum(outputs * (inputs + self.bias) for inputs, outputs in self._layers)

    def outputs(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """Outputs f(x_n) of B networks, (B, N), on the device of their weights.

        Args:
            weights: θ, (B, D).
            inputs: X, (N, d0), on the same device.

        >>> Architecture(1, (1,)).outputs(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-3.0]]))
        tensor([[6., 0.]])
        """
        columns = inputs.T.contiguous()
        batch = max(1, _ENTRIES_PER_BATCH // (len(inputs) * max(1, *self.hidden_dims, 1)))
        return torch.cat([self._outputs(part, columns) for part in torch.split(weights, batch)])

    def blocks(self) -> Tensor:
        """The weights of each hidden unit, incoming and outgoing, and of each layer, bool (number of blocks, D)."""
        blocks = []
        for number, start in enumerate(self._starts()):
            inputs, outputs = self._layers[number]
            layer = torch.zeros(self.num_weights, dtype=torch.bool)
            layer[start : start + outputs * (inputs + self.bias)] = True
            blocks.append(layer)
            if number == len(self._layers) - 1:
                continue
            following = start + outputs * (inputs + self.bias)
            for unit in range(outputs):
                block = torch.zeros(self.num_weights, dtype=torch.bool)
                block[start + unit * inputs : start + (unit + 1) * inputs] = True
                if self.bias:
                    block[start + outputs * inputs + unit] = True
                block[following + unit : following + outputs * self._layers[number + 1][1] : outputs] = True
                blocks.append(block)
        return torch.stack(blocks)

    @property
    def _layers(self) -> list[tuple[int, int]]:
        """Numbers of inputs and outputs of each layer."""
        return list(itertools.pairwise((self.input_dim, *self.hidden_dims, 1)))

    def _starts(self) -> list[int]:
        """Where the weights of each layer start."""
        sizes = [outputs * (inputs + self.bias) for inputs, outputs in self._layers]
        return [0, *itertools.accumulate(sizes[:-1])]

    def _outputs(self, weights: Tensor, columns: Tensor) -> Tensor:
        """Outputs (B, N) for inputs (d0, N)."""
        values = columns
        for start, (inputs, outputs) in zip(self._starts(), self._layers, strict=True):
            if start > 0:
                slope = self.negative_slope
                values = values.clamp(min=0) if slope == 0 else torch.where(values > 0, values, slope * values)
            end = start + outputs * inputs
            matrix = weights[:, start:end].reshape(-1, outputs, inputs)
            if start == 0:  # one product for all networks, because they have the same inputs
                values = (matrix.reshape(-1, inputs) @ values).reshape(-1, outputs, columns.shape[1])
            else:
                values = matrix @ values
            if self.bias:
                values = values + weights[:, end : end + outputs, None]
        return values[:, 0]


@dataclass(frozen=True)
class MeanError:
    """A mean error, a fraction of the samples, with its 95 % confidence interval.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RandomInterpolators:
    """What networks with random weights do on a training set and a test set.

    Attributes:
        probability: P(no training error), in natural logarithms, with its 95 % interval.
        test_error: mean test error of networks without training errors; the runs are the independent units of its
            interval. None without a test set, or if no run reached zero training error.
        quantiles: of the same test errors, by the probabilities of ``QUANTILES``; None as above.
        log_joint_runs: natural logarithms of each run's unbiased estimate of P(k training errors and a test error in
            bin b), for k = 0, …, N, (R, N + 1, number of bins) on the CPU; −inf where none was met. Bin b of K contains
            test errors from b/K to (b + 1)/K, the last one also 1. Without a test set there is one bin.
        log_runs: natural logarithm of each run's estimate of P(no training error), (R,) on the CPU.
        weights: networks without training errors, (R', P, D) on the CPU, for the R' runs that reached some (see
            :class:`Architecture`); they may contain equal copies.
        levels: number of levels of the splitting.
        evaluations: number of networks that were tried.
    """

    probability: Estimate
    test_error: MeanError | None
    quantiles: dict[float, float] | None
    log_joint_runs: Tensor
    log_runs: Tensor
    weights: Tensor
    levels: int
    evaluations: int

    @property
    def log_joint(self) -> Tensor:
        """The mean of the runs' estimates: log P(k training errors, test error in bin b), (N + 1, number of bins)."""
        return self.log_joint_runs.logsumexp(0) - math.log(len(self.log_joint_runs))

    def training_errors(self, count: int) -> Estimate:
        """The probability of exactly so many training errors, with its interval from the spread of the runs."""
        log_runs = self.log_joint_runs[:, count].logsumexp(1)
        return estimate_of_runs(torch.zeros_like(log_runs), log_runs)


def random_interpolators(
    inputs: Tensor,
    targets: Tensor,
    hidden_dims: Sequence[int],
    *,
    negative_slope: float = 0.0,
    bias: bool = False,
    threshold: float | None = None,
    test_inputs: Tensor | None = None,
    test_targets: Tensor | None = None,
    particles: int = 1000,
    runs: int = 10,
    steps: int = 5,
    moves: str = Moves.WALK,
    seed: int = 0,
) -> RandomInterpolators:
    """Estimate P(no training error) over random weights of all layers, and the law of the test error given that.

    All weights are i.i.d. N(0, 1). The scale of a layer does not matter without biases: f is positively homogeneous in
    each layer's matrix, and only the sign of f counts. An output of 0 is an error for both labels.

    The method is multilevel splitting (see :mod:`~lightning_mnn.landscape.volumes.rare_events.splitting`) on a score
    that does not change with the scale of f. With random walks it is the number of samples that are right, plus a
    fraction that is larger the less the others are violated: 1/(1 + Σ |f_n|/rms(f)) over the wrong samples. With paths
    (see :mod:`~lightning_mnn.landscape.volumes.rare_events.paths`) it is −Σ (0.2 − y_n f_n/rms(f))₊, and 0 where all
    samples are right.

    The time grows with −log P: see `docs/explanation/interpolators.md`.

    Args:
        inputs: X, (N, d0), on any device; the networks are computed there.
        targets: y, (N,), two labels.
        hidden_dims: widths of the hidden layers, () for a perceptron.
        negative_slope: ρ of the activations.
        bias: whether the layers have biases, i.i.d. N(0, 1) too.
        threshold: between the two labels; None infers it.
        test_inputs: (T, d0); None: no test error.
        test_targets: (T,), with the same labels.
        particles: P, of each run.
        runs: R, at least 2; the intervals come from their spread.
        steps: number of times that every particle makes its two moves at each level; with paths, states of each path.
        moves: a :class:`Moves`. For hundreds of weights take paths, with 20 to 80 steps.
        seed: seed of the draws.

    Raises:
        ValueError: shapes are wrong, values are NaN, the targets are not two labels, or a number is out of its range.

    >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
    >>> found = random_interpolators(x, y, hidden_dims=(), particles=500, test_inputs=-x, test_targets=-y)
    >>> found.probability.low < 1 / 4 < found.probability.high, found.test_error.value
    (True, 0.0)
    """
    network = Architecture(
        torch.as_tensor(inputs).shape[-1],
        tuple(positive_integer("hidden_dims", width) for width in hidden_dims),
        real_number("negative_slope", negative_slope),
        bool(bias),
    )
    train = _Samples.of(inputs, targets, threshold)
    test = _test_samples(test_inputs, test_targets, train)
    table = _JointTable(network, train, test, runs)
    options = {"particles": particles, "runs": runs, "steps": steps, "seed": seed}
    blocks: Tensor | None = None
    population: type[Population] = PathPopulation
    if one_of("moves", str(moves), [str(each) for each in Moves]) == Moves.WALK:
        score, level = _count_score(network, train), float(len(train.signs))
        blocks, population = network.blocks(), Population
    else:
        score, level = _margin_score(network, train), 0.0
    stages = splitting_stages(
        score,
        (network.num_weights,),
        level,
        **options,
        blocks=blocks,
        device=train.inputs.device,
        population=population,
    )
    last = next(stages)
    history = [last.log_runs]
    for stage in stages:
        table.add(last, below=stage.level)
        history.append(stage.log_runs)
        last = stage
    errors = table.add_all(last)
    return RandomInterpolators(
        probability=estimate_of_levels(history, particles),
        test_error=None if errors is None else mean_over_runs(errors.mean(1), last.log_runs),
        quantiles=None if errors is None else _quantiles(errors, last.log_runs),
        log_joint_runs=table.logs,
        log_runs=last.log_runs,
        weights=last.weights.cpu(),
        levels=len(history) - 1,
        evaluations=last.evaluations,
    )


def mean_over_runs(means: Tensor, log_runs: Tensor) -> MeanError:
    """The mean of a function of the weights given the event, from the runs' means and probabilities.

    It is Σ p_r m_r / Σ p_r. The interval is the jackknife's, with quantiles of Student's t. If all means are equal, the
    next run could still differ, with a probability whose upper limit is the half width.

    Args:
        means: m_r, (R',), of the runs that reached the event.
        log_runs: log p_r, (R,), R' of them finite.
    """
    weights = (log_runs[log_runs.isfinite()] - log_runs.max()).exp()
    count = len(means)
    total, weighted = weights.sum(), (weights * means).sum()
    value = float(weighted / total)
    if count == 1:
        return MeanError(value, 0.0, 1.0)
    without = (weighted - weights * means) / (total - weights)
    error = math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))
    half = float(stats.t.ppf((1 + tolerances.INTERVAL_CONFIDENCE) / 2, count - 1)) * error
    if error == 0:
        half = Proportion.of(0, count).high
    return MeanError(value, max(0.0, value - half), min(1.0, value + half))


class _Samples(NamedTuple):
    """Samples with their labels as signs, on the device of the inputs.

    Attributes:
        inputs: X, (N, d0).
        signs: ±1, (N,).
        threshold: between the labels.
    """

    inputs: Tensor
    signs: Tensor
    threshold: float

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, threshold: float | None) -> _Samples:
        data = DataSet.of(inputs, targets, threshold)
        device = torch.as_tensor(inputs).device
        signs = torch.where(data.targets > data.threshold, 1.0, -1.0)
        dtype = widest_dtype(device)
        return cls(sent(data.inputs.to(dtype), device), sent(signs.to(dtype), device), data.threshold)


def _test_samples(inputs: Tensor | None, targets: Tensor | None, train: _Samples) -> _Samples | None:
    if (inputs is None) != (targets is None):
        missing = "test_inputs" if inputs is None else "test_targets"
        raise ValueError(f"{missing} must be given too, got None: a test set has inputs and targets")
    if inputs is None or targets is None:
        return None
    try:
        test = _Samples.of(inputs, targets, train.threshold)
    except ValueError as error:
        raise ValueError(f"test_{error}") from None
    if test.inputs.shape[1] != train.inputs.shape[1]:
        raise ValueError(
            f"test_inputs must have d0 = {train.inputs.shape[1]} columns, as inputs, got {test.inputs.shape[1]}"
        )
    device = train.inputs.device
    return _Samples(test.inputs.to(device), test.signs.to(device), test.threshold)


def _count_score(network: Architecture, train: _Samples) -> Score:
    """The number of samples that are right, plus a fraction that is larger the less the others are violated."""

    def score(weights: Tensor) -> Tensor:
        margins = network.outputs(weights, train.inputs) * train.signs
        scale = margins.square().mean(1).sqrt()
        violation = (-margins).clamp(min=0).sum(1) / torch.where(scale > 0, scale, 1.0)
        right = (margins > 0).sum(1)
        lead = (1 / (1 + violation)).clamp(max=_MAX_LEAD)
        return right + torch.where(right < margins.shape[1], lead, 0.0)

    return score


def _margin_score(network: Architecture, train: _Samples) -> Score:
    """−Σ (μ − margin)₊ with margins relative to rms(f) and μ = 0.2; 0 where all samples are right.

    So the score falls before a ReLU network's output becomes 0, where it has no gradient.
    """

    def score(weights: Tensor) -> Tensor:
        margins = network.outputs(weights, train.inputs) * train.signs
        scale = margins.square().mean(1).sqrt()
        shortfall = (_MARGIN - margins / torch.where(scale > 0, scale, 1.0)[:, None]).clamp(min=0).sum(1)
        return torch.where((margins > 0).all(1), 0.0, -shortfall)

    return score


class _JointTable:
    """Estimates of P(k training errors, test error in bin b) of each run, from the stages of splitting.

    Networks with scores between the levels of two stages are counted at the first of them.

    Attributes:
        logs: natural logarithms of the estimates, (R, N + 1, number of bins).
    """

    def __init__(self, network: Architecture, train: _Samples, test: _Samples | None, runs: int) -> None:
        self._network, self._train, self._test, self._num_samples = network, train, test, len(train.signs)
        self._bins = 1 if test is None else min(_MAX_BINS, len(test.signs))
        self.logs = torch.full((runs, self._num_samples + 1, self._bins), -math.inf, dtype=torch.float64)

    def add(self, stage: Stage, below: float = math.inf) -> None:
        """Add the particles of a stage whose scores are below a level; of each run only some, for speed."""
        every = math.ceil(stage.scores.shape[1] / _PARTICLES_PER_STAGE)
        self._add(stage.log_runs, stage.weights[:, ::every], stage.scores[:, ::every], below)

    def add_all(self, stage: Stage) -> Tensor | None:
        """Add all particles of the last stage, and return their test errors, (R', P) on the CPU; None without any."""
        if len(stage.scores) == 0:
            return None
        errors = self._add(stage.log_runs, stage.weights, stage.scores, math.inf)
        return None if self._test is None else errors.cpu()

    def _wrong(self, samples: _Samples, weights: Tensor) -> Tensor:
        """Numbers of wrong samples, (R', P)."""
        right = (self._network.outputs(weights.flatten(0, 1), samples.inputs) * samples.signs > 0).sum(1)
        return len(samples.signs) - right.reshape(weights.shape[:2])

    def _add(self, log_runs: Tensor, weights: Tensor, scores: Tensor, below: float) -> Tensor:
        """Add particles whose scores are below a level, and return the test errors of all, (R', P)."""
        wrong = self._wrong(self._train, weights)
        errors = torch.zeros_like(scores)
        if self._test is not None:
            errors = self._wrong(self._test, weights).to(scores.dtype) / len(self._test.signs)
        # The smallest number keeps a multiple of 1/K in its own bin, although it is rounded.
        bins = (errors * self._bins + 1e-9).floor().to(torch.int64).clamp(max=self._bins - 1)
        shares = torch.zeros(len(scores), (self._num_samples + 1) * self._bins, device=scores.device)
        shares.scatter_add_(1, wrong * self._bins + bins, (scores < below).to(shares.dtype))
        logs = (shares.cpu().double() / scores.shape[1]).log().reshape(-1, *self.logs.shape[1:])
        alive = log_runs.isfinite()
        self.logs[alive] = torch.logaddexp(self.logs[alive], logs + log_runs[alive][:, None, None])
        return errors


def _quantiles(errors: Tensor, log_runs: Tensor) -> dict[float, float]:
    """Quantiles of test errors (R', P), each run weighted by its probability."""
    weights = (log_runs[log_runs.isfinite()] - log_runs.max()).exp()[:, None].expand_as(errors).flatten()
    values, order = errors.flatten().sort()
    cumulated = weights[order].cumsum(0) / weights.sum()
    places = torch.searchsorted(cumulated, torch.tensor(QUANTILES, dtype=cumulated.dtype)).clamp(max=len(values) - 1)
    return dict(zip(QUANTILES, values[places].tolist(), strict=True))
