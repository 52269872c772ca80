"""What a certificate of a general network costs: seconds, peak memory, and how they grow with the size.

The reference is what second-order evidence needs at least: the Hessian of the module's own loss by automatic
differentiation, and its eigenvalues. Both are run in turns. Peak memory is that of a process of its own, above what it
holds once the inputs are there, in matrices of P × P doubles.
"""

import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from lightning_mnn.landscape import certify_model, planted_model_kink_minimum
from tests.benchmarks.bench_rank import resident

SIZES = {250: (12, 8, 8, 6), 500: (12, 14, 14, 6), 1000: (20, 20, 20, 6), 3000: (40, 36, 36, 6)}  # near P: widths
SAMPLES = {250: 150, 500: 200, 1000: 300, 3000: 800}
KINKS = 50
EQUATIONS = {500: (20, 30, 30, 5), 1500: (30, 50, 50, 5), 6000: (60, 90, 90, 5)}  # N·K: widths
DECAY = 1e-3


def main():
    torch.set_num_threads(1)
    for name, sizes, make in (("minimum", SIZES, minimum), ("zero error", EQUATIONS, fit)):
        times = []
        for size in sizes:
            problem = make(size)
            seconds, found = timed(lambda problem=problem: certify_model(*problem[:3], **problem[3]))
            unknowns = sum(p.numel() for p in problem[0].parameters())
            times.append((size, seconds))
            words = f"{name} {size}: P = {unknowns}, {found.kind}, {found.kinks} kinks, {seconds:.2f} s"
            if name == "minimum":
                plain, _ = timed(lambda problem=problem: reference(*problem))
                words += f", plain Hessian and eigenvalues {plain:.2f} s, ratio {seconds / plain:.1f}"
            if size < 3000:
                words += f", peak {peak(make.__name__, size)} P²"
            print(words, flush=True)
        (a, first), (b, last) = times[-2:]
        print(f"{name}: seconds grow like size^{math.log(last / first) / math.log(b / a):.1f}", flush=True)


def minimum(size):
    """A kink minimum, and the options of its certificate."""
    torch.manual_seed(0)
    planted = planted_model_kink_minimum(SAMPLES[size], SIZES[size], 0.1, kinks=KINKS, weight_decay=DECAY)
    return planted.module, planted.inputs, planted.targets, {"weight_decay": DECAY, "max_distance": 1e-6}


def fit(size):
    """A network whose outputs are nearly its targets, with more parameters than equations."""
    torch.manual_seed(0)
    net = module(EQUATIONS[size])
    x = torch.randn(size // 5, EQUATIONS[size][0]).double()
    y = net(x).detach()
    return net, x, y + 1e-8 * torch.randn_like(y), {}


def module(widths):
    layers = []
    for a, b in pairwise(widths):
        linear = nn.Linear(a, b).double()
        nn.init.normal_(linear.weight, std=(2 / a) ** 0.5)
        layers += [linear, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])


def reference(net, x, y, options):
    """The Hessian of the module's loss and its eigenvalues."""
    names = dict(net.named_parameters())
    sizes = [p.numel() for p in names.values()]
    flat = torch.cat([p.detach().flatten() for p in names.values()])

    def objective(theta):
        values = {n: v.reshape(p.shape) for (n, p), v in zip(names.items(), theta.split(sizes), strict=True)}
        error = (torch.func.functional_call(net, values, x) - y).square().sum(1).mean()
        return error + 0.5 * options["weight_decay"] * theta.square().sum()

    curvature = torch.func.jacrev(torch.func.grad(objective), chunk_size=64)(flat)
    return torch.linalg.eigvalsh(curvature)


def timed(function):
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def peak(make, size):
    """Peak memory of one call, measured by a process of its own."""
    command = [
        sys.executable,
        "-c",
        f"from tests.benchmarks.bench_models import print_peak; print_peak({make!r}, {size})",
    ]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout.strip()


def print_peak(make, size):
    net, x, y, options = {"minimum": minimum, "fit": fit}[make](size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start = resident("VmRSS")
    certify_model(net, x, y, **options)
    unknowns = sum(p.numel() for p in net.parameters())
    print(f"{(resident('VmHWM') - start) / (8 * unknowns**2):.1f}")


if __name__ == "__main__":
    main()
