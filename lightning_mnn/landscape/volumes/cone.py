"""Gaussian measure of polyhedral cones, in logarithms and with a standard error.

Shapes: K cones, N constraints, d dimensions.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import t as student

from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.intervals import LogEstimate, SampleCount, Stop
from lightning_mnn.landscape.volumes.annealing import (
    PILOT_STATES,
    Centred,
    centre,
    log_measures,
    schedule,
)
from lightning_mnn.landscape.volumes.closed_forms import ConeGroup, take_apart
from lightning_mnn.landscape.volumes.expectation_propagation import (
    approximate,
    distinct_constraints,
    third_order_correction,
)
from lightning_mnn.utilities.seeding import generator as seeded
from lightning_mnn.utilities.validation import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Array = NDArray[np.float64]


METHODS = ("sampling", "ep")

_ISLANDS = 32  # independent populations; their spread is the standard error

_CHAINS = 4  # Markov chains of each

_MIN_CHAIN_STATES = 8  # fewest states of a chain

MIN_SAMPLES = _ISLANDS * _CHAINS * _MIN_CHAIN_STATES  # fewest that ``max_samples`` may allow

_STATES_PER_SQUARED_STEP = 0.0009  # usual states of a chain for a standard error of 1, over (number of steps)²

_MAX_PILOT_GROWTH = 8  # largest ratio of the lengths of successive pilots

_TARGET_FRACTION = 0.85  # the standard error is known to 1/8 after the pilot, and again to 1/8 at the end

# Constraint values in one chunk: a size for the CPU cache, and one that keeps a GPU busy, 128 MiB per array.
_ENTRIES_PER_CHUNK = {"cpu": 2**18, "cuda": 2**24}

_STUDENT_FACTOR = float(student.ppf(0.975, _ISLANDS - 1)) / 1.96  # few islands: their spread is itself uncertain


def log_cone_measure(
    normals: Tensor | ArrayLike,
    interior_point: Tensor | ArrayLike | None = None,
    *,
    method: str = "sampling",
    target_standard_error: float = 0.1,
    max_samples: int = 2**20,
    seed: int = 0,
) -> LogEstimate:
    """Log of the Gaussian measure of a cone: log P(b_n·w > 0 for all n), w ~ N(0, I).

    First the cone is split: orthogonal groups of constraints are independent, and directions orthogonal to all normals
    do not matter. A group of rank 1, 2 or 3 (a half-space, an arc, a spherical polygon) has a closed form. Up to rank 5
    a convex hull removes redundant constraints. The remaining groups use annealed sampling from the analytic centre
    (see :mod:`~lightning_mnn.landscape.volumes.annealing`) on 32 independent islands. Their estimates of the measure
    are unbiased, and their spread gives the standard error. Pilots set the number of samples in advance. The sampling
    does not stop early when the error happens to be small, so the intervals have their stated coverage.

    Cost: a sample is one sweep, N·d multiplications of about 1 ns each on a CPU core (2 to 3 ns below about a hundred
    constraints, where overhead dominates). Random cones need about 4,000 √d + 3 d^1.3/s² samples for a standard error
    of s (N = 8 d, d = 10 to 80), and at fixed d the samples grow as N^⅓. So the time grows about as d^2.4/s² with N
    proportional to d, and as N^1.3 at fixed d, even for thin cones. At equal error, nested domains with elliptical
    slice sampling and Gaussian cooling from a small ball cost 8 and 12 times as much on an orthant in 20 dimensions, 20
    and 35 times in 50, and more than 100 times on a random cone of N = 200, d = 20 (``make bench ARGS="volumes"``).

    With ``method="ep"``, the remaining groups use expectation propagation instead (see
    :mod:`~lightning_mnn.landscape.volumes.expectation_propagation`). It is some hundred times faster, but approximate:
    for random cones and cones of trained networks it is low by 0.1 to 0.3 nats, and it cannot tell its own error. The
    standard error is then NaN (null in JSON). A cone on which it fails, such as a thin one or one with many nearly
    parallel constraints, is sampled: a standard error that is a number says so.

    Args:
        normals: b_n, (..., N, d), of any lengths; CPU or GPU.
        interior_point: a point of each open cone, (..., d); None: it is computed by non-negative least squares.
        method: "sampling" or "ep".
        target_standard_error: in nats. The number of samples aims at 85 % of it, by the pilot: about one in ten
            estimates ends a little above the target, and all do if ``max_samples`` is too small for it.
        max_samples: largest number of samples of a group of constraints. Two pilots and a short estimate, about 2,000
            samples for each of about 3 √d steps, are always computed.
        seed: seed of the random numbers.

    Returns:
        The estimate; with leading axes, tensors of their shape, on the CPU.

    Raises:
        ValueError: an argument is out of range, not finite or of the wrong shape, a normal is zero, the cone is empty,
            or the interior point is not inside it.
        ArithmeticError: the cone is too thin for float64.

    >>> estimate = log_cone_measure(torch.eye(3))  # an orthant
    >>> round(math.exp(estimate.value), 6)
    0.125
    >>> estimate = log_cone_measure(torch.eye(5) + 1.0)
    >>> estimate.standard_error < 0.1
    True
    """
    check_precision(target_standard_error, max_samples)
    if method not in METHODS:
        raise ArgumentError("method", method, f"must be one of {', '.join(METHODS)}")
    unit = _unit_normals(normals)
    leading = unit.shape[:-2]
    points = None if interior_point is None else _interior_points(interior_point, unit)
    unit = unit.flatten(0, -3) if leading else unit[None]
    interiors = [None] * len(unit) if points is None else list(points.reshape(-1, unit.shape[-1]).cpu().numpy())
    cones = zip(unit.cpu().numpy(), interiors, strict=True)
    parts = [take_apart(b, u, k if leading else None) for k, (b, u) in enumerate(cones)]
    values = np.array([part.value for part in parts])
    squares = np.array([part.standard_error**2 for part in parts])
    device = unit.device if unit.device.type in _ENTRIES_PER_CHUNK else torch.device("cpu")
    groups, count = [], SampleCount()
    for k, part in enumerate(parts):
        approximation = _by_ep(part.groups, device) if method == "ep" and part.groups else None
        if approximation is None:
            groups += [(k, group) for group in part.groups]
        else:
            values[k], squares[k] = values[k] + approximation, math.nan
            count.add(0, Stop.APPROXIMATED)
    generator = torch.Generator(device).manual_seed(seeded(seed, "cone").initial_seed())
    for chunk in _chunks(groups, device):
        owners = [k for k, _ in chunk]
        targets = np.array([target_standard_error / math.sqrt(len(parts[k].groups)) for k in owners])
        with one_thread():
            found, errors = _sample([group for _, group in chunk], targets, max_samples, generator, count)
        np.add.at(values, owners, found)
        np.add.at(squares, owners, errors**2)
    if not leading:
        return LogEstimate(float(values[0]), math.sqrt(squares[0]), count.samples, count.stopped)
    value, error = (torch.from_numpy(part).reshape(leading) for part in (values, np.sqrt(squares)))
    return LogEstimate(value, error, count.samples, count.stopped)


def _by_ep(groups: tuple[ConeGroup, ...], device: torch.device) -> float | None:
    """Sum of the log measures of groups by expectation propagation; None if it fails for one of them."""
    total = 0.0
    for group in groups:
        rows = torch.from_numpy(group.normals).to(device)
        rows = rows[distinct_constraints(rows)]
        with one_thread():
            sides = torch.ones_like(rows[None, :, 0])
            found = approximate(rows, sides)
            if not bool(found.valid):
                return None
            if float(third_order_correction(found, rows, sides)) > tolerances.MAX_THIRD_ORDER_CORRECTION:
                return None
        total += float(found.log_measures)
    return total


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the steps are too short for several threads, which would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_precision(target_standard_error: float, max_samples: int) -> None:
    """Check the precision and the number of samples that are asked for.

    Raises:
        ValueError: one is out of range.
    """
    if not target_standard_error > 0:
        raise ValueError(f"target_standard_error must be positive, got {target_standard_error}")
    if max_samples < MIN_SAMPLES:
        raise ValueError(f"max_samples must be at least {MIN_SAMPLES}, got {max_samples}")


def _unit_normals(normals: Tensor | ArrayLike) -> Tensor:
    rows = _tensor(normals)
    rows = (rows.cpu() if rows.device.type not in _ENTRIES_PER_CHUNK else rows).to(torch.float64)
    if rows.ndim < 2 or 0 in rows.shape:
        raise ValueError(f"normals must have shape (..., N, d) with N and d at least 1, got {tuple(rows.shape)}")
    if not bool(rows.isfinite().all()):
        raise ValueError("normals must be finite: they have NaN or infinite entries")
    largest = rows.abs().amax(-1, keepdim=True)  # scaling by it keeps the squares of small entries from underflow
    if not bool((largest > 0).all()):
        where = (largest[..., 0] == 0).nonzero()[0].tolist()
        raise ValueError(f"normals must not be zero, row {where} is: a sample x_n = 0 constrains nothing, leave it out")
    rows = rows / largest
    return torch.nn.functional.normalize(rows, dim=-1)


def _interior_points(interior_point: Tensor | ArrayLike, unit: Tensor) -> Tensor:
    points = _tensor(interior_point).to(unit)
    shape = (*unit.shape[:-2], unit.shape[-1])
    if points.shape != shape:
        raise ValueError(f"interior_point must have shape {shape} to go with the normals, got {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("interior_point must be finite: it has NaN or infinite entries")
    largest = points.abs().amax(-1, keepdim=True)
    return points / torch.where(largest > 0, largest, 1.0)


def _tensor(values: Tensor | ArrayLike) -> Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    return torch.from_numpy(np.array(values, dtype=np.float64))  # torch.tensor would make float32


def _chunks(groups: list[tuple[int, ConeGroup]], device: torch.device) -> list[list[tuple[int, ConeGroup]]]:
    """Groups of equal rank and similar size, as many as fit into one chunk."""
    chunks: list[list[tuple[int, ConeGroup]]] = []
    for item in sorted(groups, key=lambda item: item[1].normals.shape[::-1]):
        num, rank = item[1].normals.shape
        together = chunks[-1] if chunks and chunks[-1][0][1].normals.shape[1] == rank else []
        if together and (len(together) + 1) * num * _ISLANDS * _CHAINS <= _ENTRIES_PER_CHUNK[device.type]:
            together.append(item)
        else:
            chunks.append([item])
    return chunks


def _sample(
    groups: list[ConeGroup], targets: Array, max_samples: int, generator: torch.Generator, count: SampleCount
) -> tuple[Array, Array]:
    """Log measures and standard errors of groups of one rank, (K,), by annealed sampling."""
    max_constraints, rank = len(groups[-1].normals), groups[0].normals.shape[1]
    normals = np.zeros((len(groups), max_constraints, rank))
    for padded, group in zip(normals, groups, strict=True):
        padded[: len(group.normals)] = group.normals
    interior = np.stack([group.interior for group in groups])
    try:
        return _sample_padded(normals, interior, targets, max_samples, generator, count)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # it is public, but for torch's stubs
        raise ArithmeticError(f"a cone is too thin for float64: {error}") from None


def _sample_padded(
    normals: Array, interior: Array, targets: Array, max_samples: int, generator: torch.Generator, count: SampleCount
) -> tuple[Array, Array]:
    """The same for unit normals (K, N, d), padded with rows of zeros for smaller groups, and points (K, d)."""
    on_device = (torch.from_numpy(part).to(generator.device) for part in (normals, interior))
    cones = centre(next(on_device), next(on_device), generator)
    thinnest = float(cones.margins.min())
    if not thinnest >= tolerances.MIN_CENTRE_MARGIN:  # nor is NaN
        raise ArithmeticError(f"a cone is too thin for float64: at its centre the smallest margin is {thinnest:.1e}")
    steps = schedule(cones, generator)
    max_states = max_samples // (_ISLANDS * _CHAINS * len(steps)) - PILOT_STATES
    lengths = _lengths(cones, steps, targets, max_states, generator, count)
    count.add(int(lengths.sum()) * _samples_per_state(steps), Stop.CLOSED_FORM)
    values, errors = np.empty(len(normals)), np.empty(len(normals))
    for length in np.unique(lengths):
        equal = np.flatnonzero(lengths == length)
        values[equal], errors[equal] = _one_round(cones, steps, equal, int(length), generator)
    if not np.isfinite(values + errors).all():
        raise ArithmeticError("a cone is too thin for float64: its estimate is not finite")
    return values, errors


def _samples_per_state(steps: Tensor) -> int:
    """Samples of a cone if its chains have one state each."""
    return _ISLANDS * _CHAINS * len(steps)


def _lengths(
    cones: Centred, steps: Tensor, targets: Array, max_states: int, generator: torch.Generator, count: SampleCount
) -> NDArray[np.int64]:
    """Lengths of the chains of each cone, (K,), from pilots whose samples are used for nothing else.

    The length is set in advance. If an estimate stopped when its own standard error is small enough, it would stop too
    early when that is small by chance, and its intervals would cover too little. A short pilot gives too large lengths,
    so its length is limited to within a factor of 2 of the usual one for cones. If it is far larger than that, longer
    pilots follow, without this limit.

    Args:
        cones: K cones.
        steps: β_1 … β_T, (T, K).
        targets: standard errors, (K,).
        max_states: largest number of states of a chain.
        generator: generator of the random numbers.
        count: counts the samples of the pilots, and notes if the lengths are cut off.
    """
    rule = _STATES_PER_SQUARED_STEP * len(steps) ** 2 / targets**2
    lengths, pending = np.zeros(len(targets)), np.arange(len(targets))
    pilot = max(PILOT_STATES, int(min(rule.max(), max_states) / 4))
    smallest, largest = rule / 2, rule * 2
    while True:
        _, errors = _one_round(cones, steps, pending, pilot, generator)
        count.add(len(pending) * pilot * _samples_per_state(steps), Stop.TARGET)
        max_states -= pilot
        needed = np.nan_to_num(pilot * (errors / (_TARGET_FRACTION * targets[pending])) ** 2, nan=np.inf)
        lengths[pending] = np.clip(needed, smallest[pending], largest[pending])
        pending, needed = pending[needed > 2 * largest[pending]], needed[needed > 2 * largest[pending]]
        largest[pending] = np.inf
        following = int(min(needed.max(initial=0.0), max_states) / _MAX_PILOT_GROWTH)
        if following <= pilot:
            break
        pilot = min(following, _MAX_PILOT_GROWTH * pilot)
    max_states = max(max_states, _MIN_CHAIN_STATES)
    if (lengths > max_states).any():
        count.add(0, Stop.LIMIT)
    clipped = np.clip(lengths, _MIN_CHAIN_STATES, max_states)
    octaves = np.log2(clipped / _MIN_CHAIN_STATES)
    few = _MIN_CHAIN_STATES * 2 ** (np.ceil(8 * octaves) / 8) if len(targets) > 1 else clipped
    chosen: NDArray[np.int64] = np.minimum(np.ceil(few), max_states).astype(np.int64)
    return chosen


def _one_round(
    cones: Centred, steps: Tensor, pending: NDArray[np.int_], length: int, generator: torch.Generator
) -> tuple[Array, Array]:
    """Log of the mean over the islands, and its standard error, (K',)."""
    some = torch.from_numpy(pending).to(steps.device)
    logs = log_measures(cones[some], steps[:, some], _ISLANDS, _CHAINS, length, generator).cpu().numpy()
    largest = logs.max(1, keepdims=True)
    ratios = np.exp(logs - largest)
    means = ratios.mean(1)
    relative, spread = ratios.std(1, ddof=1) / means / math.sqrt(_ISLANDS), logs.std(1, ddof=1)
    values = largest[:, 0] + np.log(means) + relative**2 / 2  # the mean is unbiased, its logarithm is not
    # If the spread is large, the mean depends on the few largest: compare with the mean of a lognormal distribution.
    second = logs.mean(1) + spread**2 / 2
    error = np.hypot(np.maximum(relative, spread / math.sqrt(_ISLANDS)), np.minimum(spread, 1) * (values - second))
    return values, _STUDENT_FACTOR * error
