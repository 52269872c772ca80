"""Draws the pictures of the page on slices: ``python docs/slices.py`` writes them to ``outputs/reference/slices``.

The digits for LeNet are those of the folder ``LIGHTNING_MNN_DATA``; a name as an argument draws only that picture.
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from lightning_mnn.app import main as run_command
from lightning_mnn.figures import input_space_figure, slice_figure
from lightning_mnn.landscape import (
    certify_model,
    input_regions,
    landscape_slice,
    planted_model_kink_minimum,
    principal_directions,
    random_directions,
)

FOLDER = Path(__file__).parent.parent / "outputs" / "reference" / "slices"
NAMES = ("quickstart", "kink_minimum", "lenet", "inputs")


def main() -> None:
    """Draw the pictures that the arguments name, or all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        globals()[name]()


def reduce_colors(path: Path) -> None:
    """Write a picture again with 256 colours: hundreds of thin lines compress badly in more."""
    with Image.open(path) as picture:
        reduced = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def quickstart() -> None:
    """The plane and the line of the quickstart, by the command."""
    with tempfile.TemporaryDirectory() as folder:
        off = ["~logger.wandb", "callbacks.angular_volume_monitor=null", "callbacks=snapshots", "figure=false"]
        for words in ([*off, f"hydra.run.dir={folder}"], ["task=slice", f"folder={folder}"]):
            sys.argv[1:] = words
            run_command()
        for name in ("slice", "line"):
            (FOLDER / f"quickstart_{name}.png").write_bytes(Path(folder, f"{name}.png").read_bytes())


def kink_minimum() -> None:
    """A certified minimum on two kinks, from far and near."""
    planted = planted_model_kink_minimum(40, (3, 4, 1), kinks=2, seed=1)
    found = certify_model(planted.module, planted.inputs, planted.targets)
    if found.kind != "kink_minimum":
        raise RuntimeError(f"the planted minimum is certified as {found.kind}")
    data, center = (planted.inputs, planted.targets), found.state_dict
    moves = random_directions(planted.module, center, seed=2)
    panels = {
        f"{2 * size:g} lengths of the filters wide": landscape_slice(
            planted.module, *data, moves, center=center, ranges=[(-size, size)] * 2, resolution=161, kind=found.kind
        )
        for size in (1.0, 0.15)
    }
    labels = "first random direction", "second random direction"
    slice_figure(panels, FOLDER / "kink_minimum.png", "3–4–1 with biases, N = 40", labels)


def lenet() -> None:
    """A LeNet on digits: the plane nearest to its trajectory."""
    inputs = digits("train-images-idx3-ubyte.gz", 16, 100 * 784).view(100, 1, 28, 28) / 255
    labels = digits("train-labels-idx1-ubyte.gz", 8, 100).long()
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    states = []
    for step in range(101):
        if step % 5 == 0:
            states.append({name: value.clone() for name, value in module.state_dict().items()})
        loss = functional.cross_entropy(module(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options = {"loss": "cross_entropy", "kink_samples": 8, "kink_pairs": 300}
    moves = principal_directions(module, states)
    wide = landscape_slice(module, inputs, labels, moves, trajectory=states, resolution=25, **options)
    radius = wide.kink_radius(12)
    near = landscape_slice(
        module, inputs, labels, moves, trajectory=states, ranges=[(-radius, radius)] * 2, resolution=25, **options
    )
    names = "first main component of the trajectory", "second main component"
    panels = {"whole plane": wide, "around the centre": near}
    reduce_colors(slice_figure(panels, FOLDER / "lenet_slice.png", "LeNet, 100 digits, 100 steps of Adam", names))


def digits(name: str, header: int, size: int) -> torch.Tensor:
    """The first numbers of a file of MNIST."""
    with gzip.open(Path(os.environ["LIGHTNING_MNN_DATA"], "MNIST", "raw", name)) as file:
        file.read(header)
        return torch.tensor(list(file.read(size)), dtype=torch.float32)


def inputs() -> None:
    """The linear regions of a trained network with two inputs and biases."""
    torch.manual_seed(1)
    points = 2 * torch.rand(160, 2, dtype=torch.float64) - 1
    targets = ((points[:, 0] * points[:, 1] > 0) ^ (points.norm(dim=1) > 0.8)).double()
    module = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(1500):
        loss = (module(points)[:, 0] - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    regions = input_regions(module, ranges=[(-1.1, 1.1)] * 2)
    samples = points.numpy(), targets.numpy()
    input_space_figure(regions, FOLDER / "inputs.png", samples, threshold=0.5, title="2–16–12–1 with biases")


if __name__ == "__main__":
    main()
