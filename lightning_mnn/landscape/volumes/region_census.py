"""Census of the regions of random weights: what they contain.

Weights W ~ N(0, I) lie in the region of their activation pattern. So the fraction of draws whose regions pass a test
estimates the angular volume V of the union of such regions, such as V(L_ε) and V(G) of the paper, without the volume of
any single region. Each draw depends only on a seed and its index, so any process can compute any part of a census, and
the counts of the parts can be added.

Shapes: N samples, d0 inputs, d1 hidden units.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from lightning_mnn.landscape.intervals import Proportion
from lightning_mnn.landscape.labels import infer_threshold
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.regions.existence import find_minimum
from lightning_mnn.landscape.regions.rank import khatri_rao_rank
from lightning_mnn.landscape.regions.region import Region
from lightning_mnn.utilities.resources import one_thread_each
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import (
    ArgumentError,
    one_of,
    positive_integer,
    real_number,
    seed_number,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from lightning_mnn.landscape.regions.existence import Existence


MAX_NODES = 20_000  # branches of one region's search for a minimum: about 1.5 ms each at N = 40

_TASKS_PER_PROCESS = 8  # tasks per process, because regions need unequal times

LABELS = {"plus_minus": (-1.0, 0.0), "zero_one": (0.0, 0.5)}  # the lower label and the threshold


class DataSet(NamedTuple):
    """Samples with two labels.

    Attributes:
        inputs: X, float64 (N, d0).
        targets: y, float64 (N,).
        threshold: between the labels.
    """

    inputs: Tensor
    targets: Tensor
    threshold: float

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, threshold: float | None = None) -> DataSet:
        """Check samples and find their threshold.

        Args:
            inputs: X, (N, d0).
            targets: y, (N,).
            threshold: decision threshold of the classification error; None infers it from the labels.

        Raises:
            ValueError: shapes are wrong, values are NaN or infinite, or the threshold is not given and cannot be
                inferred.

        >>> DataSet.of(torch.eye(2), torch.tensor([0, 1])).threshold
        0.5
        """
        inputs, targets = torch.as_tensor(inputs).detach(), torch.as_tensor(targets).detach()
        if inputs.ndim != 2 or 0 in inputs.shape:
            raise ValueError(f"inputs must have shape (N, d0), neither zero, got {tuple(inputs.shape)}")
        if targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"targets must have shape ({len(inputs)},), one for each sample, got {tuple(targets.shape)}"
            )
        for name, values in (("inputs", inputs), ("targets", targets)):
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"{name} must be finite, got {values[~values.isfinite()][0].item()}: drop such samples"
                )
        threshold = infer_threshold(targets) if threshold is None else threshold
        if threshold is None:
            raise ValueError(
                f"targets must be two labels, {{0, 1}} or ±1, to have a classification error, got "
                f"{sorted(set(targets.tolist()))[:5]}: map them to two labels, or give threshold="
            )
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold}: give the value between the two labels")
        return cls(inputs.cpu().double(), targets.cpu().double(), threshold)


@dataclass(frozen=True)
class GaussianSamples:
    """Gaussian inputs with random labels, drawn again for each region: volumes are averages over the data.

    Attributes:
        num_samples: N.
        input_dim: d0.
        labels: "plus_minus" for ±1 or "zero_one" for {0, 1}, each with probability ½.

    Raises:
        ValueError: a size is not a whole number of at least 1, or the labels have another name.

    >>> GaussianSamples(3, 2).draw(seed=0, index=7).inputs.shape
    torch.Size([3, 2])
    """

    num_samples: int
    input_dim: int
    labels: str = "plus_minus"

    def __post_init__(self) -> None:
        """Check the sizes and the labels."""
        positive_integer("num_samples", self.num_samples)
        positive_integer("input_dim", self.input_dim)
        one_of("labels", self.labels, sorted(LABELS))

    def draw(self, seed: int, index: int) -> DataSet:
        """The data set on which region number `index` of a seed is classified."""
        shape = (self.num_samples, self.input_dim)
        inputs = torch.randn(shape, generator=generator(seed, "census inputs", index), dtype=torch.float64)
        ones = torch.randint(0, 2, shape[:1], generator=generator(seed, "census labels", index)).double()
        low, threshold = LABELS[self.labels]
        return DataSet(inputs, low + (1 - low) * ones, threshold)


@dataclass(frozen=True)
class Case:
    """Everything that a census depends on except the number of regions; it can be pickled.

    Attributes:
        data: a data set, or Gaussian data drawn again for each region.
        width: d1.
        negative_slope: ρ.
        epsilon: ε, the classification error (a fraction) above which a region is sub-optimal.
        seed: seed of the draws.
        max_nodes: largest number of branches of a region's search for a minimum; with 0 there is no search, so all are
            undecided and only ranks and residuals are counted.

    Raises:
        ValueError: an argument is out of its range.

    >>> case = Case(GaussianSamples(4, 2), width=2)
    >>> case.outcome(0) == case.outcome(0)
    True
    """

    data: DataSet | GaussianSamples
    width: int
    negative_slope: float = 0.0
    epsilon: float = 0.0
    seed: int = 0
    max_nodes: int = MAX_NODES

    def __post_init__(self) -> None:
        """Check the arguments before a census starts."""
        positive_integer("width", self.width)
        real_number("negative_slope", self.negative_slope)
        if self.negative_slope == 1:
            raise ArgumentError("negative_slope", 1, "must not be 1: the network would be linear", "choose 0 for ReLU")
        real_number("epsilon", self.epsilon, at_least=0, below=1, remedy="it is a fraction of the samples")
        seed_number("seed", self.seed)
        whole_number("max_nodes", self.max_nodes, at_least=0)

    def draw(self, index: int) -> tuple[Tensor, DataSet]:
        """The weights W, float64 (d1, d0), and the data set, of region number `index`."""
        data = self.data.draw(self.seed, index) if isinstance(self.data, GaussianSamples) else self.data
        return draw_weights(self.width, data.inputs.shape[1], self.seed, index), data

    def outcome(self, index: int) -> Outcome:
        """The outcome of region number `index`."""
        return self.outcome_at(*self.draw(index))

    def outcome_at(self, weights: Tensor, data: DataSet) -> Outcome:
        """The outcome of the region of weights W, (d1, d0)."""
        pattern = ActivationPattern.from_preactivations(data.inputs @ weights.T)
        region = Region(data.inputs, pattern, self.negative_slope)
        return classify(region, data.targets, threshold=data.threshold, epsilon=self.epsilon, max_nodes=self.max_nodes)


class Outcome(NamedTuple):
    """Test results of one region.

    Attributes:
        rank_deficient: rank(A∘X) < N.
        suboptimal: the residual of the region's least-squares fit, which all its minima share, misclassifies more than
            a fraction ε of the samples.
        zero_error: this residual is zero, up to rounding.
        exists: whether the region contains a differentiable local minimum; None: undecided.
    """

    rank_deficient: bool
    suboptimal: bool
    zero_error: bool
    exists: bool | None

    def marks(self) -> dict[str, bool | None]:
        """Whether the region counts as a hit, by the names of :class:`Census`' attributes; None: undecided.

        If the search for a minimum is undecided, the residual can still exclude a hit.

        >>> Outcome(rank_deficient=False, suboptimal=False, zero_error=True, exists=None).marks()["suboptimal_minimum"]
        False
        """
        return {
            "rank_deficient": self.rank_deficient,
            "suboptimal_residual": self.suboptimal,
            "suboptimal_minimum": self.suboptimal and self.exists,
            "global_minimum": self.zero_error and self.exists,
            "any_minimum": self.exists,
            "undecided": self.exists is None,
        }


def classify(
    region: Region,
    targets: Tensor,
    *,
    threshold: float | None = None,
    epsilon: float = 0.0,
    max_nodes: int = MAX_NODES,
) -> Outcome:
    """Classify a region: whether it contains a minimum, and with which errors.

    Args:
        region: the region of one network.
        targets: y, (N,).
        threshold: decision threshold of the classification error; None infers it from the labels.
        epsilon: the classification error above which a region is sub-optimal.
        max_nodes: largest number of branches of the search for a minimum.

    Raises:
        ValueError: the targets do not fit the region, or have no classification error.

    >>> region = Region(torch.eye(2), ActivationPattern(torch.tensor([[True, False], [False, False]])))
    >>> classify(region, torch.tensor([1.0, -1.0]))  # no unit is active on the second sample
    Outcome(rank_deficient=True, suboptimal=True, zero_error=False, exists=True)
    """
    if max(region.inputs.ndim, region.pattern.active.ndim) > 2:
        raise ValueError("region must be that of one network: classify replicas one by one")
    found = cast("Existence", find_minimum(region, targets, threshold=threshold, max_nodes=max_nodes))
    if found.mce is None:
        raise ValueError("targets must be two labels, {0, 1} or ±1: map them to two labels, or give threshold=")
    return Outcome(
        khatri_rao_rank(region.inputs, region.slopes) < len(targets),
        found.mce > epsilon,
        found.zero_error,
        found.exists,
    )


def draw_weights(width: int, input_dim: int, seed: int, index: int) -> Tensor:
    """Weights W ~ N(0, I), float64 (d1, d0): always the same for a seed and an index.

    Raises:
        ValueError: the seed is negative.

    >>> bool((draw_weights(3, 2, seed=0, index=5) == draw_weights(3, 2, seed=0, index=5)).all())
    True
    """
    return torch.randn(width, input_dim, generator=generator(seed, "census weights", index), dtype=torch.float64)


def count(case: Case, start: int, stop: int) -> Counter[str]:
    """Counts of the outcomes of the regions `start`, …, `stop` − 1 of a case, which can be added over parts.

    A census in parts stores these counts (a dictionary of integers) and converts them to a :class:`Census` with
    :meth:`Census.from_counts`.

    >>> case = Case(GaussianSamples(4, 2), width=2)
    >>> Census.from_counts([count(case, 0, 2), count(case, 2, 6)]) == Census.from_counts([count(case, 0, 6)])
    True
    """
    return tally(case.outcome(index) for index in range(start, stop))


def tally(outcomes: Iterable[Outcome]) -> Counter[str]:
    """Number of "regions", and of hits and "undecided …" regions by the names of :class:`Census`' attributes.

    >>> sorted(tally([Outcome(False, False, True, None)]))
    ['regions', 'undecided', 'undecided any_minimum', 'undecided global_minimum']
    """
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        marks = outcome.marks()
        counts["regions"] += 1
        counts.update(name for name, mark in marks.items() if mark)
        counts.update(f"undecided {name}" for name, mark in marks.items() if mark is None)
    return counts


@dataclass(frozen=True)
class Census:
    """Proportions of the regions of random weights that pass each test; each estimates an angular volume.

    Attributes:
        rank_deficient: rank(A∘X) < N.
        suboptimal_residual: the residual e* of the region's least-squares fit, which all its minima share,
            misclassifies more than a fraction ε of the samples. This is necessary for L_ε, and Theorem 6 uses only
            this.
        suboptimal_minimum: V(L_ε): the region contains a differentiable local minimum, and e* is as above.
        global_minimum: V(G): the region contains one, and e* = 0.
        any_minimum: the region contains one.
        undecided: the allowed number of branches did not decide whether the region contains one.
    """

    rank_deficient: Proportion
    suboptimal_residual: Proportion
    suboptimal_minimum: Proportion
    global_minimum: Proportion
    any_minimum: Proportion
    undecided: Proportion

    @classmethod
    def from_counts(cls, parts: Iterable[Mapping[str, int]]) -> Census:
        """The census of all regions from the counts of parts of them (see :func:`count`), in any order.

        Raises:
            ValueError: there are no regions.
        """
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part)
        names = [item.name for item in fields(cls)]
        return cls(*(Proportion.of(total[name], total["regions"], total[f"undecided {name}"]) for name in names))


def census(
    inputs: Tensor,
    targets: Tensor,
    width: int,
    negative_slope: float = 0.0,
    *,
    threshold: float | None = None,
    epsilon: float = 0.0,
    num_regions: int = 1000,
    seed: int = 0,
    max_nodes: int = MAX_NODES,
    processes: int = 1,
) -> Census:
    """Draw weights W ~ N(0, I) and classify their regions.

    Args:
        inputs: X, (N, d0).
        targets: y, (N,), two labels.
        width: d1.
        negative_slope: ρ.
        threshold: decision threshold of the classification error; None infers it from the labels.
        epsilon: ε, the classification error (a fraction) above which a region is sub-optimal.
        num_regions: number of draws.
        seed: seed of the draws: equal seeds give equal regions, for any slope and ε.
        max_nodes: largest number of branches of a region's search for a minimum; above it the region is undecided.
        processes: number of worker processes; results do not depend on it. More than one are started as new
            interpreters, so a script must guard its entry point by ``if __name__ == "__main__"``.

    Raises:
        ValueError: shapes are wrong, values are NaN, the targets have no classification error, or a number is out of
            its range.

    >>> found = census(torch.eye(2), torch.tensor([1.0, -1.0]), width=2, num_regions=50)
    >>> found.rank_deficient.low < 1 - (1 - 1 / 4) ** 2 < found.rank_deficient.high
    True
    """
    data = DataSet.of(inputs, targets, threshold)
    case = Case(data, width, negative_slope, epsilon=epsilon, seed=seed, max_nodes=max_nodes)
    return _census(case, num_regions, processes)


def ensemble_census(
    num_samples: int,
    input_dim: int,
    width: int,
    negative_slope: float = 0.0,
    *,
    labels: str = "plus_minus",
    epsilon: float = 0.0,
    num_regions: int = 1000,
    seed: int = 0,
    max_nodes: int = MAX_NODES,
    processes: int = 1,
) -> Census:
    """Draw weights W ~ N(0, I), each with its own Gaussian data, and classify their regions.

    The proportions estimate volumes averaged over the data (see :class:`GaussianSamples` and :func:`census`).

    Raises:
        ValueError: a number is out of its range.

    >>> ensemble_census(6, 2, width=2, num_regions=20).rank_deficient.hits  # d0·d1 < N
    20
    """
    data = GaussianSamples(num_samples, input_dim, labels)
    case = Case(data, width, negative_slope, epsilon=epsilon, seed=seed, max_nodes=max_nodes)
    return _census(case, num_regions, processes)


def _census(case: Case, num_regions: int, processes: int) -> Census:
    """The census of a case's first regions."""
    regions, processes = positive_integer("num_regions", num_regions), positive_integer("processes", processes)
    if processes == 1:
        return Census.from_counts([count(case, 0, regions)])
    chunks = min(regions, processes * _TASKS_PER_PROCESS)
    edges = [regions * chunk // chunks for chunk in range(chunks + 1)]
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    workers = ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,))
    with one_thread_each(), workers as pool:
        return Census.from_counts(pool.map(count, [case] * chunks, edges[:-1], edges[1:]))
