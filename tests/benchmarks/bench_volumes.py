"""What the measure of a cone costs: beside two plain references, against N and d, and against the machine's limit.

The references are compared at equal error: the cost of independent repeats, scaled to a standard error of 0.1 by their
spread. Of a reference that has not mixed this is only a guide: its repeats are off the value, by the deviation beside.
Costs are processor seconds of one thread, so that others on the machine disturb little; single jobs take wall seconds.
"""

import contextlib
import math
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import logsumexp, ndtr, ndtri

from lightning_mnn.landscape import ActivationPattern, Region, polish, region_log_volume
from lightning_mnn.landscape.intervals import SampleCount
from lightning_mnn.landscape.volumes import annealing, cone
from lightning_mnn.landscape.volumes.annealing import analytic_centre
from lightning_mnn.landscape.volumes.closed_forms import ConeGroup
from lightning_mnn.landscape.volumes.cone import log_cone_measure
from lightning_mnn.landscape.volumes.ep_sampling import SharedCones
from tests.landscape.volumes.cones import orthant, random_cone

REPEATS = 8  # of a reference
OURS = 24  # repeats of ours, half of them before the references and half after
CHAINS = 16  # of each repeat
TARGET = 0.1
PLOT = Path(__file__).parents[2] / "outputs" / "benchmarks" / "volumes.png"


def main():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (build, *moves) in CASES.items():
            beside_references(name, build, *moves)
        growth()
        for num in (320, 2000):
            beside_the_limit(num, 40)
    finally:
        torch.set_num_threads(threads)
    beside_expectation_propagation()
    single_jobs()


# --- beside references

CASES = {  # moves of a chain: in each nested domain, and at each temperature
    "orthant, d = 20": (lambda rng: orthant(20, rng), 2500, 10000),
    "orthant, d = 50": (lambda rng: orthant(50, rng), 600, 5000),
    "random, N = 200, d = 20": (lambda rng: (*random_cone(200, 20, rng), None), 700, 9000),
    "random, N = 320, d = 40": (lambda rng: (*random_cone(320, 40, rng), None), 100, 1500),
}


def beside_references(name, build, nested_moves, cooling_moves):
    normals, interior, truth = build(np.random.default_rng(0))
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    middle = analytic_centre(torch.from_numpy(normals)[None], torch.from_numpy(interior)[None])[0].numpy()
    ours = [run(sampled, normals, interior, seed) for seed in range(OURS // 2)]
    cooling, cooling_seconds = run(gaussian_cooling, normals, middle, cooling_moves, np.random.default_rng(1))
    nested, nested_seconds = run(nested_domains, normals, nested_moves, np.random.default_rng(2))
    ours += [run(sampled, normals, interior, seed) for seed in range(OURS // 2, OURS)]
    estimates = np.array([value for value, _ in ours])
    best = estimates[:, 0].mean() if truth is None else truth
    print(
        f"{name}: {'mean of ours' if truth is None else 'truth'} {best:.3f}; our own standard errors are "
        f"{math.sqrt((estimates[:, 1] ** 2).mean()):.3f}"
    )
    print("                        value  deviation  spread of a run  seconds a run  seconds to 0.1  times ours")
    seconds = np.array([second for _, second in ours])
    base = cost(estimates[:, 0], seconds.mean())
    rows = {
        "ours": (estimates[:, 0], seconds.mean()),
        "nested domains": (nested, nested_seconds / REPEATS),
        "Gaussian cooling": (cooling, cooling_seconds / REPEATS),
    }
    for label, (values, each) in rows.items():
        print(
            f"  {label:16} {values.mean():11.3f} {values.mean() - best:10.3f} {values.std(ddof=1):16.3f} {each:14.3f} "
            f"{cost(values, each):15.2f} {cost(values, each) / base:11.1f}"
        )


def run(function, *arguments):
    """What a function returns, and its processor seconds."""
    start = time.process_time()
    found = function(*arguments)
    return found, time.process_time() - start


def cost(values, seconds):
    """Seconds to a standard error of 0.1, from independent repeats that take `seconds` each."""
    return seconds * values.var(ddof=1) / TARGET**2


def sampled(normals, interior, seed):
    """Value and standard error by sampling, whether or not there is a closed form."""
    group = ConeGroup(normals, interior)
    value, error = cone._sample([group], np.array([TARGET]), 2**20, torch.Generator().manual_seed(seed), SampleCount())
    return value[0], error[0]


def nested_domains(normals, moves, rng):
    """Log measures, (R,), by the domains {w : b_n·w > −γ} from γ = ∞ to 0.

    Subset simulation sets the γ so that half of the points survive from one domain to the next; then the shares that
    survive are measured anew with chains of `moves` states in each domain (Holmes, Diaconis & Ross).
    """
    points = rng.standard_normal((REPEATS, CHAINS, normals.shape[1]))
    shifts, starts = [np.full(REPEATS, np.inf)], [points.copy()]
    while shifts[-1].any():
        margins = (points @ normals.T).min(-1)
        shifts.append(np.maximum(-np.median(margins, axis=1), 0))
        for some, alive in zip(points, margins > -shifts[-1][:, None], strict=True):
            some[:] = some[rng.choice(np.flatnonzero(alive), CHAINS)]
        for _ in slices(points, normals, shifts[-1], moves // 2, rng):
            pass
        starts.append(points.copy())
    values = np.zeros(REPEATS)
    for start, shift, following in zip(starts, shifts, shifts[1:], strict=False):
        inside = [(p.min(-1) > -following[:, None]).mean(1) for p in slices(start, normals, shift, moves, rng)]
        values += np.log(np.mean(inside, axis=0))
    return values


def slices(points, normals, shift, moves, rng):
    """Elliptical slice sampling of standard normals in b_n·w > −shift, (R,), without rejection: yields all b_n·w.

    On the ellipse w cos θ + v sin θ through a point w and a fresh normal v (Gessner, Kanjilal & Hennig 2020) a
    constraint reads r cos(θ − φ) > −shift: it forbids one arc, which never holds θ = 0. What is left between the arcs
    starts at the k-th end and ends at the (k + 1)-th start, wherever that comes later: both are sorted on their own.
    """
    products = points @ normals.T
    shift = shift[:, None, None]
    for _ in range(moves):
        others = rng.standard_normal(points.shape)
        across = others @ normals.T
        phases = np.arctan2(across, products)
        halves = np.arccos(-np.minimum(shift / np.sqrt(products**2 + across**2), 1))
        starts, ends = phases + halves, phases - halves + 2 * math.pi
        edge = np.zeros((*points.shape[:2], 1))
        begins = np.concatenate([edge, np.sort(ends)], -1)
        gaps = np.concatenate([np.sort(starts), edge + 2 * math.pi], -1) - begins
        sums = np.maximum(gaps, 0).cumsum(-1)
        drawn = rng.random(edge.shape) * sums[..., -1:]
        chosen = (sums <= drawn).sum(-1, keepdims=True).clip(max=gaps.shape[-1] - 1)
        back = np.take_along_axis(sums, chosen, -1) - drawn  # from the end of the chosen gap
        angle = np.take_along_axis(begins + gaps, chosen, -1) - back
        moved = np.cos(angle) * products + np.sin(angle) * across
        angle *= (moved > -shift).all(-1, keepdims=True)  # rounding may have put it on a wall
        products *= np.cos(angle)
        products += np.sin(angle) * across
        points *= np.cos(angle)
        points += np.sin(angle) * others
        yield products


def gaussian_cooling(normals, middle, moves, rng):
    """Log measures, (R,), by normals N(tu, σ²I) in the cone about its centre u, |u|² = d: σ from small to 1, t to 0.

    The first lies in the cone but for little, σ grows by 1 + 1/√d a step, and t falls by 1/√d. At each (σ, t) the
    chains take `moves` hit-and-run steps, and those after the first quarter are averaged over.
    """
    dim = normals.shape[1]
    middle = middle * math.sqrt(dim) / np.linalg.norm(middle)
    sigma = (normals @ middle).min() / math.sqrt(2 * math.log(len(normals)))
    growth = math.ceil(-math.log(sigma) / math.log1p(1 / math.sqrt(dim)))
    fall = math.ceil(math.sqrt(dim))
    sigmas = [*np.minimum(sigma * (1 + 1 / math.sqrt(dim)) ** np.arange(growth), 1), *np.ones(fall + 1)]
    tilts = [*np.ones(growth), *np.linspace(1, 0, fall + 1)]
    points = middle + sigma * rng.standard_normal((REPEATS, 16 * CHAINS, dim))
    inside = (points @ normals.T > 0).all(-1)
    values = dim * math.log(sigma) + np.log(inside.mean(1))
    points = np.concatenate([some[alive][:CHAINS] for some, alive in zip(points, inside, strict=True)])
    for k in range(len(sigmas) - 1):
        logs = []
        for step, _ in enumerate(hit_and_run(points, normals, tilts[k] * middle, sigmas[k], moves, rng)):
            if step >= moves // 4:
                now, then = (((points - tilts[i] * middle) ** 2).sum(1) / (2 * sigmas[i] ** 2) for i in (k, k + 1))
                logs.append((now - then).reshape(REPEATS, CHAINS))
        values += logsumexp(logs, axis=(0, 2)) - math.log(len(logs) * CHAINS)
    return values


def hit_and_run(points, normals, mean, sigma, moves, rng):
    """Moves the points (P, d), in place, along random lines of N(mean, σ²I) in the cone, drawing exactly on each."""
    products = points @ normals.T
    for _ in range(moves):
        lines = rng.standard_normal(points.shape)
        lines /= np.linalg.norm(lines, axis=1, keepdims=True)
        rates = lines @ normals.T
        ratios = rates / products
        nearest = ((mean - points) * lines).sum(1)
        low = (-1 / ratios.max(1).clip(min=1e-300) - nearest) / sigma
        high = (-1 / ratios.min(1).clip(max=-1e-300) - nearest) / sigma
        flip = low + high > 0  # the lower tail has the digits
        low, high = np.where(flip, -high, low), np.where(flip, -low, high)
        probability = ndtr(low) + rng.random(len(points)) * (ndtr(high) - ndtr(low))
        drawn = ndtri(probability.clip(min=1e-300)).clip(low, high)
        steps = (nearest + sigma * np.where(flip, -drawn, drawn))[:, None]
        steps *= (products + steps * rates > 0).all(1, keepdims=True)  # rounding may have put it on a wall
        products += steps * rates
        points += steps * lines
        yield


# --- growth


def growth():
    """Seconds and samples to a standard error of 0.1 against d and against N, as a table and as a plot."""
    log_cone_measure(*random_cone(40, 6, np.random.default_rng(0)))  # libraries
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axis, label, sizes, shape, fitted, title in (
        # up to d = 5 redundant constraints are dropped first: that is another law
        (figure.add_subplot(121), "d", (5, 10, 20, 40, 80), lambda d: (8 * d, d), slice(1, None), "N = 8 d"),
        (figure.add_subplot(122), "N", (40, 80, 200, 500, 2000, 8000), lambda n: (n, 20), slice(None), "d = 20"),
    ):
        found = np.array([cost_of_ours(*shape(size)) for size in sizes])
        print(f"{title}: to a standard error of {TARGET}")
        print(f"{label:>8}     samples  seconds  ns an update  log measure")
        for size, (samples, seconds, updates, value) in zip(sizes, found, strict=True):
            print(f"{size:8} {samples:11.0f} {seconds:8.3f} {1e9 * seconds / updates:13.2f} {value:12.1f}")
        for unit, colour, costs in (
            ("samples", "tab:orange", found[:, 0]),
            ("milliseconds", "tab:blue", 1e3 * found[:, 1]),
        ):
            slope, intercept = np.polyfit(np.log(sizes[fitted]), np.log(costs[fitted]), 1)
            line = math.exp(intercept) * np.array(sizes, dtype=float) ** slope
            print(f"  {unit} to a standard error s: {math.exp(intercept) * TARGET**2:.2g} {label}^{slope:.2f}/s²")
            axis.loglog(sizes, costs, "o", color=colour, label=unit)
            axis.loglog(sizes[fitted], line[fitted], color=colour, alpha=0.5, label=f"${label}^{{{slope:.2f}}}$")
        axis.set(xlabel=label, title=title, ylabel=f"cost at a standard error of {TARGET} nats")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=150)
    print(f"plot: {PLOT}")


def cost_of_ours(num, dim, cones=4):
    """Samples, seconds and constraint updates to a standard error of 0.1, and the log measure.

    Means over a few cones, geometric ones of the costs: the standard error of a single run is itself uncertain.
    """
    costs, values = [], []
    for seed in range(cones):
        normals, interior = random_cone(num, dim, np.random.default_rng(seed))
        with counted() as counts:
            found, seconds = run(log_cone_measure, normals, interior)
        costs.append(np.array([counts["samples"], seconds, counts["updates"]]) * (found.standard_error / TARGET) ** 2)
        values.append(found.value)
    return [*np.exp(np.log(costs).mean(0)), np.mean(values)]


@contextlib.contextmanager
def counted():
    """Counts the samples of all rounds, and the constraint updates of these and of the pilot."""
    counts = {"samples": 0, "updates": 0}
    measure, move = cone.log_measures, annealing._move_coordinates

    def measure_and_count(cones, steps, islands, chains, length, generator):
        counts["samples"] += steps.numel() * islands * chains * length
        return measure(cones, steps, islands, chains, length, generator)

    def move_and_count(points, distances, *others):
        counts["updates"] += len(points) * distances.numel()
        move(points, distances, *others)

    with (
        mock.patch.object(cone, "log_measures", measure_and_count),
        mock.patch.object(annealing, "_move_coordinates", move_and_count),
    ):
        yield counts


# --- beside the machine's limit


def beside_the_limit(num, dim, rounds=3):
    """Constraint updates a second, beside the four passes that an update needs at least, over arrays in cache."""
    normals, interior = random_cone(num, dim, np.random.default_rng(0))
    shape = (cone._ISLANDS * cone._CHAINS, num)
    distances = torch.rand(shape, dtype=torch.float64) + 1
    column, move = (
        torch.rand(num, dtype=torch.float64) - 0.5,
        torch.full((len(distances), 1), 1e-9, dtype=torch.float64),
    )
    ratios, times = torch.empty_like(distances), 2000 * 320 // num

    def passes():
        for _ in range(times):
            torch.div(column, distances, out=ratios)
            ratios.amax(-1)
            ratios.amin(-1)
            distances.addcmul_(move, column)

    fractions = []
    for seed in range(rounds):
        with counted() as counts:
            _, seconds = run(
                lambda seed=seed: log_cone_measure(normals, interior, seed=seed, target_standard_error=0.3)
            )
        ours = counts["updates"] / seconds
        limit = times * distances.numel() / run(passes)[1]
        fractions.append(ours / limit)
        print(f"N = {num}: {ours:.2e} updates a second, four passes {limit:.2e}: {fractions[-1]:.0%}")
    print(f"N = {num}: median {sorted(fractions)[rounds // 2]:.0%} of the limit")


# --- expectation propagation

SHAPES = ((100, 5), (1000, 5), (200, 20), (1000, 20), (320, 40))


def beside_expectation_propagation(cones=4):
    """Sampled log measures less those by EP, for random cones, and processor seconds of each."""
    print("       N    d  log measure  sampled - EP  seconds: EP  sampling")
    for num, dim in SHAPES:
        found = []
        for seed in range(cones):
            cell = random_cone(num, dim, np.random.default_rng(seed))
            fast, seconds = run(lambda cell=cell: log_cone_measure(*cell, method="ep"))
            sampled, other_seconds = run(log_cone_measure, *cell)
            if math.isnan(fast.standard_error):
                found.append((sampled.value, sampled.value - fast.value, seconds, other_seconds))
        value, missed, seconds, other_seconds = np.mean(found, axis=0)
        print(f"  {num:6} {dim:4} {value:12.1f} {missed:13.2f} {seconds:12.3f} {other_seconds:9.2f}")


# --- single jobs


def single_jobs():
    normals, interior = random_cone(200, 20, np.random.default_rng(0))
    for _ in range(3):
        timed("random cone, N = 200, d = 20, to 0.2", log_cone_measure, normals, interior, target_standard_error=0.2)
    region, weights = trained(320, 40)
    for _ in range(3):
        timed("region of a trained network, N = 320, d = 40, 40 units", region_log_volume, region, weights)
    timed("the same at the monitor's target", region_log_volume, region, weights, target_standard_error=0.5)
    timed("the same, EP alone", region_log_volume, region, weights, num_units=0)
    region, weights = trained(2000, 100)
    sides = (region.inputs @ weights[0]).sign()
    timed(
        "row of a trained network, N = 2000, d = 100, to 1",
        log_cone_measure,
        sides[:, None] * region.inputs,
        weights[0],
        target_standard_error=1.0,
    )
    timed(
        "region of a trained network, N = 2000, d = 100, 100 units, to 5 in all",
        region_log_volume,
        region,
        weights,
        target_standard_error=5 / math.sqrt(100),
    )
    generator = torch.Generator().manual_seed(0)
    inputs, row = (torch.randn(*shape, 784, generator=generator, dtype=torch.float64) for shape in ((70_000,), (1,)))
    sides = (inputs @ row.T).sign().T
    (_, seconds) = run(SharedCones.of, inputs, sides)
    print(f"EP for one unit, N = 70,000, d = 784: {seconds:.0f} s of processor time, all threads together")


def timed(name, function, *arguments, **options):
    start = time.perf_counter()
    found, processor = run(lambda: function(*arguments, **options))
    seconds = time.perf_counter() - start
    print(f"{name}: {found.value:.2f} ± {found.standard_error:.2f} nats", end=" ")
    print(f"in {seconds:.2f} s of wall time, {processor:.2f} s of processor time")


def trained(num, dim):
    """A region with zero error, and weights in it: as many units as dimensions, polished from random weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (num,), generator=generator).double() * 2 - 1
    w, z = (torch.randn(s, generator=generator, dtype=torch.float64) * math.sqrt(2 / dim) for s in ((dim, dim), (dim,)))
    start = time.perf_counter()
    found = polish(w, z, x, y, max_distance=math.inf)
    weights = found.certificate.hidden_weights
    print(f"polish to MSE {found.certificate.mse:.1e}: {time.perf_counter() - start:.1f} s")
    return Region(x, ActivationPattern.from_preactivations(x @ weights.T)), weights


if __name__ == "__main__":
    main()
