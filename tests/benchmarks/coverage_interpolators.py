"""How often intervals of random interpolators cover the truth, and whether they agree with plain draws.

``python -m tests.benchmarks.coverage_interpolators [coverage] [agreement] [speed] [rare] [--repetitions R]``. Coverage:
95 % intervals of a small case, whose truth comes from many plain draws. Agreement: five data sets at N = 10 and 20,
each beside plain draws. Speed: processor seconds and widths of intervals at larger sizes. Rare: paths at ln P of about
−100, several seeds beside a closed form and random labels.
"""

import argparse
import math
import time

import torch

from lightning_mnn.landscape.intervals import Proportion
from lightning_mnn.landscape.volumes.rare_events.interpolators import Architecture, random_interpolators

_BATCH = 50_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["coverage", "agreement", "speed"])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--draws", type=int, default=2_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "coverage" in options.parts:
        coverage(options.repetitions, options.draws)
    if "agreement" in options.parts:
        agreement(options.draws)
    if "speed" in options.parts:
        speed()
    if "rare" in options.parts:
        rare()


def teacher_data(num_samples, input_dim, seed, num_test=1000):
    """Gaussian inputs with the signs of a linear teacher, of a training set and a test set."""
    draw = torch.Generator().manual_seed(seed)
    inputs, test, teacher = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((num_samples, input_dim), (num_test, input_dim), (input_dim,))
    )
    return inputs, (inputs @ teacher).sign(), test, (test @ teacher).sign()


def plain_draws(network, data, draws, seed=1):
    """Hits among independent draws, and the hits' mean test error with its standard error."""
    inputs, labels, test, test_labels = data
    draw, hits, errors = torch.Generator().manual_seed(seed), 0, []
    for _ in range(draws // _BATCH):
        weights = torch.randn(_BATCH, network.num_weights, generator=draw, dtype=torch.float64)
        found = weights[(network.outputs(weights, inputs) * labels > 0).all(1)]
        hits += len(found)
        if len(found):
            errors.append((network.outputs(found, test) * test_labels <= 0).double().mean(1))
    errors = torch.cat(errors)
    return Proportion.of(hits, draws), float(errors.mean()), float(errors.std()) / math.sqrt(hits)


def coverage(repetitions, draws):
    data, network = teacher_data(8, 2, seed=0, num_test=50), Architecture(2, (3,))
    truth, error, _ = plain_draws(network, data, draws)
    print(f"truth: {truth.value:.3e} [{truth.low:.3e}, {truth.high:.3e}], test error {error:.4f}", flush=True)
    inside, inside_error, ratios, means = 0, 0, [], []
    for seed in range(repetitions):
        found = random_interpolators(
            *data[:2], (3,), test_inputs=data[2], test_targets=data[3], particles=50, steps=3, seed=seed
        )
        inside += found.probability.low <= truth.value <= found.probability.high
        inside_error += found.test_error.low <= error <= found.test_error.high
        ratios.append(found.log_runs.exp().mean() / truth.value)
        means.append(found.test_error.value - error)
    print(
        f"{repetitions} repetitions, {found.levels} levels: P covered {inside}, mean ratio "
        f"{torch.stack(ratios).mean():.3f} ± {torch.stack(ratios).std() / math.sqrt(repetitions):.3f}; test error "
        f"covered {inside_error}, mean difference {torch.tensor(means).mean():.5f} ± "
        f"{torch.tensor(means).std() / math.sqrt(repetitions):.5f}",
        flush=True,
    )


def agreement(draws):
    network = Architecture(5, (10,))
    for num_samples in (10, 20):
        for seed in range(5):
            data = teacher_data(num_samples, 5, seed)
            share, error, deviation = plain_draws(network, data, draws)
            found = random_interpolators(
                *data[:2], (10,), test_inputs=data[2], test_targets=data[3], particles=300, seed=seed
            )
            p, e = found.probability, found.test_error
            print(
                f"N = {num_samples}, data {seed}: plain {share.value:.3e} [{share.low:.3e}, {share.high:.3e}], "
                f"splitting {p.value:.3e} [{p.low:.3e}, {p.high:.3e}]; test error {error:.4f} ± "
                f"{1.96 * deviation:.4f}, splitting {e.value:.4f} [{e.low:.4f}, {e.high:.4f}]; overlap "
                f"{max(share.low, p.low) <= min(share.high, p.high)}, "
                f"{max(error - 1.96 * deviation, e.low) <= min(error + 1.96 * deviation, e.high)}",
                flush=True,
            )


def speed():
    for num_samples, input_dim, particles in ((80, 5, 1500), (240, 20, 200)):
        data = teacher_data(num_samples, input_dim, seed=0)
        start = time.process_time()
        found = random_interpolators(*data[:2], (10,), particles=particles)
        p = found.probability
        print(
            f"N = {num_samples}, d0 = {input_dim}, {particles} particles: ln P = {p.log_value:.2f} [{p.log_low:.2f}, "
            f"{p.log_high:.2f}], {found.levels} levels, {time.process_time() - start:.1f} processor seconds",
            flush=True,
        )


def rare(seeds=8):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 20, generator=draw, dtype=torch.float64)
    random_labels = 2.0 * torch.randint(0, 2, (100,), generator=draw) - 1
    alternating = torch.ones(144).double()
    alternating[::2] = -1
    options = {"moves": "paths", "particles": 1600, "steps": 80, "runs": 6}
    for name, data, hidden_dims in (
        (f"perceptron, ln P = {-144 * math.log(2):.2f}", (torch.eye(144).double(), alternating), ()),
        ("random labels, N = 100, d0 = 20, width 10", (inputs, random_labels), (10,)),
    ):
        for seed in range(seeds):
            start = time.process_time()
            found = random_interpolators(*data, hidden_dims, threshold=0.0, seed=seed, **options)
            p, logs = found.probability, found.log_runs[found.log_runs.isfinite()]
            print(
                f"{name}, seed {seed}: {p.log_value:.2f} [{p.log_low:.2f}, {p.log_high:.2f}], {len(logs)} runs with "
                f"standard deviation {float(logs.std()):.2f}, {time.process_time() - start:.1f} processor seconds",
                flush=True,
            )


if __name__ == "__main__":
    main()
