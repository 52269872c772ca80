"""A campaign for sampled learning coefficients: known truths, certified minima, and settings that must be refused.

Run it as ``python -m tests.benchmarks.campaign_learning_coefficients [part …] [--count N] [--seconds S]``. Parts:
regression (reduced-rank, true map 0), crossings (w1^a w2^b)², minima (of two-layer networks, whose coefficient is
certified), sgld (the same, by SGLD), trained (of networks that Adam trained), volumes (coverage of the intervals of
loss_volume), broken (steps 100 times too large, chains too short), devinterp (the same cases by devinterp, if it is
installed). It prints a line for each. ``campaign_exact_coefficients`` has more certified minima.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter

import torch

from lightning_mnn.landscape import (
    certify,
    closed_form_log_volume,
    estimate_learning_coefficient,
    learning_coefficient,
    loss_volume,
    planted_kink_minimum,
    planted_minimum,
    polish,
)
from lightning_mnn.utilities.validation import ArgumentError
from tests.landscape.curvature.singular_losses import crossing, expected_crossing, reduced_rank

SIZES = [(5, 3, 5), (5, 4, 5), (4, 3, 8), (8, 3, 4), (3, 8, 4)]
# Moves between the ranks of the two factors need a way of 1 in steps of about 0.02.
REGRESSIONS = {"inverse_temperature": 1e3, "steps": 500, "burn_in": 300, "leapfrog_steps": 64}
POWERS = [((1, 2), 1e12, 4000), ((2, 2), 1e40, 12_000), ((3, 1), 1e12, 4000)]  # a and b, nβ, steps
# A trained network has kinks near its minimum, and flat directions of it, so γ is larger, and γ/nβ smaller.
TRAINED = {"inverse_temperature": 1e14, "localisation": 1e8, "chains": 32, "steps": 200, "burn_in": 150}
NETWORKS = {"inverse_temperature": 1e11, "localisation": 1e6, "chains": 32, "steps": 600, "burn_in": 600}
MIN_CURVATURE = 1e-4  # of minima of trained networks: γ/nβ is a hundredth of it
MAX_TRIALS = 4  # a minimum whose chains are refused is sampled again, with twice the moves


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["regression", "crossings", "minima", "sgld", "trained", "broken"])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--first", type=int, default=0, help="first seed, or case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        if part == "regression":
            regressions()
        elif part == "crossings":
            crossings()
        elif part in ("minima", "sgld", "trained"):
            minima(
                options.count,
                options.seconds,
                adjusted=part != "sgld",
                of_seed=trained if part == "trained" else certified,
                first=options.first,
            )
        elif part == "volumes":
            volumes(options.count, options.seconds)
        elif part == "devinterp":
            devinterp_table(options.first)
        else:
            broken(options.count, options.seconds)


def told(name, found, truth, seconds):
    error = found.mean / truth - 1
    print(f"{name}: truth {truth:g}, found {found.mean:.4f} ({error:+.1%})", end=" ")
    print(f"± {found.standard_error or float('nan'):.4f}, R-hat {found.r_hat:.3f}, {found.reason_code}", end=" ")
    print(f"in {seconds:.0f} s and {found.gradient_evaluations} gradients", flush=True)


def regressions():
    for sizes in SIZES:
        loss, point, truth = reduced_rank(*sizes)
        began = time.monotonic()
        found = estimate_learning_coefficient(loss, point, **REGRESSIONS)
        told(f"reduced-rank regression {sizes}", found, truth, time.monotonic() - began)


def crossings():
    for powers, beta, steps in POWERS:
        loss, point, truth = crossing(*powers)
        began = time.monotonic()
        found = estimate_learning_coefficient(
            loss, point, inverse_temperature=beta, chains=128, steps=steps, leapfrog_steps=1
        )
        told(f"normal crossing {powers}", found, truth, time.monotonic() - began)
        print(f"  the exact mean at nβ = {beta:g} is {expected_crossing(*powers, beta):.4f}", flush=True)


def certified(seed):
    """The loss around a certified minimum, the minimum as a vector, and its coefficient; None where there is none."""
    num, dim, width = 12 + 2 * (seed % 3), 2 + seed % 2, 2 + seed // 2 % 2
    try:
        if seed % 3 == 0:
            found = planted_minimum(num, dim, width, seed=seed)
        elif seed % 3 == 1:
            found = planted_kink_minimum(num, dim, width, seed=seed)
        else:
            stream = torch.Generator().manual_seed(seed)
            x = torch.randn(num, dim, generator=stream, dtype=torch.float64)
            y = torch.randint(2, (num,), generator=stream).double()
            start = torch.randn(width, dim, generator=stream, dtype=torch.float64)
            end = polish(start, torch.randn(width, generator=stream, dtype=torch.float64), x, y).certificate
            return around(end, x, y)
        given = found.hidden_weights, found.output_weights, found.inputs, found.targets
        return around(certify(*given), found.inputs, found.targets)
    except (ValueError, ArgumentError):
        return None


def trained(seed):
    """The same for the minimum at which descent ends that goes on where Adam stopped."""
    stream = torch.Generator().manual_seed(seed)
    num, dim, width = 12 + 2 * (seed % 5), 2 + seed % 2, 2 + seed // 2 % 3
    x = torch.randn(num, dim, generator=stream, dtype=torch.float64)
    y = torch.randint(2, (num,), generator=stream).double()
    weights = torch.randn(width, dim, generator=stream, dtype=torch.float64).requires_grad_()
    z = torch.randn(width, generator=stream, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([weights, z], lr=1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        ((x @ weights.T).relu() @ z - y).square().mean().backward()
        optimizer.step()
    try:
        end = polish(weights.detach(), z.detach(), x, y).certificate
        return around(end, x, y) if smallest_curvature(end, x) >= MIN_CURVATURE else None
    except ArgumentError:
        return None


def smallest_curvature(certificate, x):
    """The smallest positive curvature on the face of the kinks."""
    hidden, output = certificate.hidden_weights, certificate.output_weights
    u = x @ hidden.T
    on_kink = u.abs() <= 1e-12 * x.norm(dim=1)[:, None] * hidden.norm(dim=1)
    gates = ((u > 0) & ~on_kink).to(u)
    jacobian = torch.cat([((gates * output)[:, :, None] * x[:, None, :]).flatten(1), gates * u], 1)
    samples, units = on_kink.nonzero(as_tuple=True)
    normals = torch.zeros(len(samples), jacobian.shape[1], dtype=u.dtype)
    for row, sample, unit in zip(normals, samples, units, strict=True):
        row[: hidden.numel()].view_as(hidden)[unit] = x[sample]
    face = (
        torch.linalg.svd(normals).Vh[torch.linalg.matrix_rank(normals) :]
        if len(normals)
        else torch.eye(len(jacobian.T)).to(u)
    )
    values = torch.linalg.svdvals(jacobian @ face.T)[: certificate.positive_directions or 0]
    return float(2 / len(x) * values.square().min()) if len(values) else float("inf")


def around(certificate, x, y):
    truth = learning_coefficient(certificate).value
    weights, z = certificate.hidden_weights, certificate.output_weights

    def loss(points):
        hidden, out = points[:, : weights.numel()].reshape(-1, *weights.shape), points[:, weights.numel() :]
        return (((hidden @ x.T).relu() * out[..., None]).sum(1) - y).square().mean(-1)

    return (loss, torch.cat([weights.flatten(), z]), truth) if truth else None


def each_minimum(count, seconds, of_seed=certified, first=0):
    began, seed = time.monotonic(), first
    while count and time.monotonic() - began < seconds:
        found = of_seed(seed)
        if found is not None:
            count -= 1
            yield seed, *found
        seed += 1


def minima(count, seconds, *, adjusted, of_seed, first=0):
    tally, worst, gradients = Counter(), 0.0, 0
    for seed, loss, point, truth in each_minimum(count, seconds, of_seed, first):
        settings = TRAINED if of_seed is trained else NETWORKS
        found, trials = sampled(loss, point, settings | {"adjusted": adjusted, "seed": seed})
        covered = found.is_reliable and abs(found.value - truth) <= 1.96 * found.standard_error
        tally["covered" if covered else "missed" if found.is_reliable else str(found.reason_code)] += 1
        tally[f"trial {trials}"] += 1
        gradients += found.gradient_evaluations
        if found.is_reliable:
            worst = max(worst, abs(found.value / truth - 1))
        told(f"  minimum {seed}, trial {trials}, {'held' if covered else 'NOT HELD'}", found, truth, 0)
    name = f"{of_seed.__name__} minima, {'Metropolis' if adjusted else 'SGLD'}"
    print(f"{name}: {dict(tally)}, largest error {worst:.1%}, {gradients} gradients of last trials", flush=True)


def sampled(loss, point, settings):
    """The estimate, with twice the moves as long as it is refused; and the number of trials."""
    for trial in range(MAX_TRIALS):
        more = {name: settings[name] << trial for name in ("steps", "burn_in")}
        found = estimate_learning_coefficient(loss, point, **settings | more)
        if found.is_reliable:
            break
    return found, trial + 1


VOLUMES = {  # slopes of kinks, curvatures
    "two curvatures": ([], [2.0, 0.2]),
    "two kinks": ([1.0, 3.0], []),
    "a kink and two curvatures": ([2.0], [2.0, 0.2]),
}


def volumes(count, seconds):
    """How often the intervals of volumes and slopes hold the closed form, a line for each case."""
    levels, began = [1e-2, 1e-3, 1e-4], time.monotonic()
    for name, (slopes, curvatures) in VOLUMES.items():
        tally = Counter()
        bends, heights = torch.tensor(slopes).double(), torch.tensor(curvatures).double()

        def loss(points, bends=bends, heights=heights):
            kinked, curved = points[:, : len(bends)].abs(), points[:, len(bends) : len(bends) + len(heights)].square()
            return kinked @ bends + curved @ heights / 2

        truth = closed_form_log_volume(levels, curvatures, slopes)
        exact_slopes = [(a - b) / math.log(10) for a, b in zip(truth.high, truth.high[1:], strict=False)]
        point = torch.zeros(len(bends) + len(heights) + 1, dtype=torch.float64)  # and a flat direction
        for seed in range(count):
            if time.monotonic() - began > seconds:
                break
            found = loss_volume(loss, point, levels, particles=16, steps=16, seed=seed)
            for low, high, least, most in zip(found.log_lows, found.log_highs, truth.low, truth.high, strict=True):
                tally["volume held" if low <= most and least <= high else "volume missed"] += 1
            for slope, error, exact in zip(found.slopes, found.slope_errors, exact_slopes, strict=True):
                tally["slope held" if abs(slope - exact) <= 1.96 * error else "slope missed"] += 1
            tally["seeds"] += 1
        print(f"volumes of {name}: {dict(tally)}", flush=True)


def devinterp_cases():
    """Name, loss, point, coefficient."""
    curvatures = torch.tensor([1.0, 0.01, 100.0, 0.0, 0.0], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    yield "quadratic, curvatures 0.02 to 200", lambda w: (w.square() * curvatures).sum(-1), zero, 1.5
    yield "two kinks and a quadratic", lambda w: w[:, :2].abs().sum(-1) + w[:, 2].square(), zero, 2.5
    yield "reduced-rank regression 2–1–4", *reduced_rank(2, 1, 4)
    yield "reduced-rank regression 5–3–5", *reduced_rank(5, 3, 5)
    for seed in (0, 1):  # a differentiable minimum, and one with kinks
        yield f"certified minimum {seed}", *certified(seed)


class AtPoint(torch.nn.Module):
    """A loss of points as a module whose parameter is the point."""

    def __init__(self, loss, point):
        super().__init__()
        self.point, self.loss = torch.nn.Parameter(point.clone()), loss

    def forward(self, x):
        return self.loss(self.point[None])[0]


def devinterp_table(first=0):
    """λ by devinterp's SGLD at its defaults, and at two step sizes, beside ours at the same nβ and γ."""
    from devinterp.optim.sgld import SGLD
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

    beta, chains, draws = 1e5, 4, 500
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(12, 1)), batch_size=12)
    for name, loss, point, truth in list(devinterp_cases())[first:]:
        gamma = 1e3 if name.startswith("certified") else 1.0  # other minima of networks are near
        ours = estimate_learning_coefficient(
            loss, point, inverse_temperature=beta, localisation=gamma, chains=16, steps=500
        )
        line = f"{name}: truth {truth:g}, ours {ours.mean:.3f} ± {ours.standard_error or float('nan'):.3f}"
        line += f" ({ours.reason_code}, {ours.gradient_evaluations} gradients)"
        for label, options, sizes in (
            ("defaults", {}, {"num_draws": 100, "num_burnin_steps": 0}),
            ("same nβ and γ, lr 1e-7", {"lr": 1e-7, "nbeta": beta, "localization": gamma}, {}),
            ("same nβ and γ, lr 1e-5", {"lr": 1e-5, "nbeta": beta, "localization": gamma}, {}),
        ):
            try:
                found = estimate_learning_coeff_with_summary(
                    AtPoint(loss, point), loader, evaluate=lambda model, batch: model(batch[0]), sampling_method=SGLD,
                    optimizer_kwargs=options, num_chains=chains, seed=0, verbose=False,
                    **{"num_draws": draws, "num_burnin_steps": draws} | sizes,
                )  # fmt: skip
                line += f"; {label}: {found['llc/mean']:.3f} ± {found['llc/std'] / chains**0.5:.3f}"
            except (RuntimeError, ValueError) as error:
                line += f"; {label}: {type(error).__name__} {str(error)[:40]}"
        print(line, flush=True)


def broken(count, seconds):
    """Which verdicts bad settings get, and whether an interval that is given all the same holds the coefficient."""
    tallies = {"step 100 times too large": Counter(), "the same, SGLD": Counter(), "chains of 20 moves": Counter()}
    for seed, loss, point, truth in each_minimum(count, seconds):
        good = estimate_learning_coefficient(loss, point, **NETWORKS | {"steps": 20, "burn_in": 100}, seed=seed)
        step = 100 / (NETWORKS["inverse_temperature"] * largest_curvature(loss, point)) ** 0.5
        sgld = {"adjusted": False, "preconditioned": False, "step_size": step}
        settings = [
            {"steps": 200, "burn_in": 100, "step_size": 100 * good.step_size},
            {"steps": 200, "burn_in": 100} | sgld,
            {"steps": 20, "burn_in": 5},
        ]
        for tally, setting in zip(tallies.values(), settings, strict=True):
            found = estimate_learning_coefficient(loss, point, **NETWORKS | setting, seed=seed)
            verdict = str(found.reason_code)
            if found.is_reliable:
                verdict += " and holds" if abs(found.value - truth) <= 1.96 * found.standard_error else " and misses"
            tally[verdict] += 1
    for name, tally in tallies.items():
        print(f"{name}: {dict(tally)}", flush=True)


def largest_curvature(loss, point):
    hessian = torch.autograd.functional.hessian(lambda w: loss(w[None])[0], point)
    return float(torch.linalg.eigvalsh(hessian)[-1])


if __name__ == "__main__":
    main()
