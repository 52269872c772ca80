"""Draw the loss of a finished run on a plane and a line of weight space, and its regions on a plane of inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lightning_mnn.figures.slices.input_space import input_space_animation, input_space_figure
from lightning_mnn.figures.slices.weight_space import line_figure, slice_figure
from lightning_mnn.landscape import (
    LossSurface,
    certify,
    curvature_directions,
    infer_threshold,
    input_regions,
    landscape_slice,
    principal_directions,
    random_directions,
)
from lightning_mnn.landscape.slices.directions import flat_point
from lightning_mnn.runs.checkpoints import read_checkpoint
from lightning_mnn.runs.folders import remove_job_folder
from lightning_mnn.runs.saved import load_run
from lightning_mnn.tasks.evaluate import samples_of
from lightning_mnn.utilities.files import relative
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import one_of
from lightning_mnn.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig
    from torch import Tensor, nn

    from lightning_mnn.landscape import InputRegions, LandscapeSlice
    from lightning_mnn.landscape.network import Network
    from lightning_mnn.model.mnn import MNN
    from lightning_mnn.runs.saved import Run

PLANES = ("trajectory", "random", "curvature")
_KINKS_NEAR = 12  # kinks that pass the centre in the pictures nearby
_POINTS = {1: 241, 2: 121}  # along a direction, by the number of directions
_POINTS_OF_DEEP_PLANES = 41  # with several hidden layers each takes a pass of its own
_FRAMES = 50  # of the animation, at most, and the end
_BEYOND = 0.25  # of the way from the start, on both ends of the line


@dataclass(frozen=True)
class _Drawn:
    """What is drawn of a run: the first of its networks.

    Attributes:
        module: the network at the centre, float64.
        kind: of the centre.
        inputs: all samples.
        targets: of them.
        states: the networks of the trajectory, the start first; without the centre.
        names: the step of each.
        title: in words.
        threshold: of the decision; None: of a regression.
    """

    module: nn.Sequential
    kind: Kind | None
    inputs: Tensor
    targets: Tensor
    states: list[dict[str, Tensor]]
    names: list[str]
    title: str
    threshold: float | None


def slice(cfg: DictConfig) -> None:  # noqa: A001 (the name of the task)
    """Draw ``slice.png`` and ``line.png`` in the folder of the finished run ``cfg.folder``.

    The plane goes through the weights of ``checkpoints/last.ckpt``, or through the minimum that certifies them. Its
    directions are, by ``cfg.plane``, the main components of the trajectory (the start and all checkpoints; with the
    start alone, the way there and a random direction), two random filter-normalised directions, or those of the
    largest and the smallest curvature. A second panel shows the surroundings of the centre, where a dozen kinks pass.
    The line goes from the start to the centre.

    ``inputs.png`` has the linear regions on the plane of the inputs, or through three random samples, and
    ``inputs.gif`` those of the whole trajectory, if there are checkpoints.

    Raises:
        ValueError: no folder is given, or an unknown plane.
        FileNotFoundError: the folder contains no finished run.
    """
    remove_job_folder(Path(cfg.run_dir))
    if cfg.folder is None:
        raise ValueError("task=slice needs a finished run: give folder=DIR")
    one_of("plane", cfg.plane, PLANES)
    folder, console = Path(cfg.folder).absolute(), Console(soft_wrap=True, highlight=False)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={cfg.folder}: there is no such folder")
    drawn = _drawn(load_run(folder))
    paths = [
        _draw_plane(drawn, cfg.plane, folder / "slice.png"),
        _draw_line(drawn, folder / "line.png"),
        *_draw_inputs(drawn, folder),
    ]
    for path in paths:
        console.print(f"[bold]drawn:[/] {relative(path)}")


def _drawn(run: Run) -> _Drawn:
    module = run.module()
    inputs, targets = samples_of(run.data(), replicated=module.replicas > 1)
    if module.replicas > 1:
        inputs, targets = (inputs[0] if inputs.ndim > 2 else inputs), (targets[0] if targets.ndim > 1 else targets)
    network = _first(module)
    kind = _kind(run.summary.get("kind"))
    if len(network.hidden_weights) == 1 and run.summary.get("objective") in (None, "mse") and kind is not None:
        found: Any = certify(
            network.hidden_weights[0], network.output_weights, inputs, targets, network.negative_slope,
            threshold=module.threshold,
        )  # fmt: skip
        kind = found.kind
        if found.is_minimum:
            network = _with_weights(network, found.hidden_weights, found.output_weights)
    sizes = "–".join(map(str, (network.input_dim, *network.hidden_dims, 1)))
    title = f"{sizes}, ρ = {network.negative_slope:g}, N = {len(inputs):,}"
    if module.replicas > 1:
        title += f", the first of {module.replicas} networks"
    threshold = None if module.hparams["regression"] else module.threshold
    if threshold is None and not module.hparams["regression"]:
        threshold = infer_threshold(targets)
    states = _states(run, module)
    return _Drawn(network.to_sequential(), kind, inputs, targets, list(states.values()), list(states), title, threshold)


def _kind(found: Any) -> Kind | None:
    first = found[0] if isinstance(found, list) else found
    return None if first is None else Kind(first)


def _first(module: MNN) -> Network:
    """The first network of a module, float64."""
    network = module.network().to(torch.float64)
    if module.replicas == 1:
        return network
    return _with_weights(network, *[weights[0] for weights in network.tensors])


def _with_weights(network: Network, *weights: Tensor) -> Network:
    return type(network)(tuple(weights[:-1]), weights[-1], network.negative_slope, network.unit_roundoff)


def _states(run: Run, module: MNN) -> dict[str, dict[str, Tensor]]:
    """The first networks of the checkpoints in the order of their steps, from the weights that training started from.

    A run that started from a checkpoint has an unknown start.
    """
    modules: dict[int, MNN] = {} if run.config.get("ckpt_path") else {0: type(module)(**module.hparams)}
    for path in sorted((run.folder / "checkpoints").glob("*.ckpt")):
        step = int(read_checkpoint(path, "remove it")["global_step"])
        if path.name != "last.ckpt" and step > 0:
            modules[step] = run.module(path)
    return {f"step {step:,}": _first(modules[step]).to_sequential().state_dict() for step in sorted(modules)}


def _directions(drawn: _Drawn, plane: str) -> tuple[Tensor, tuple[str, str]]:
    module, states = drawn.module, drawn.states
    if plane == "curvature":
        return curvature_directions(_surface(drawn)), ("largest curvature", "smallest curvature")
    scattered = random_directions(module)
    if plane == "random" or not states:
        return scattered, ("first random direction, in lengths of the filters", "second random direction")
    if len(states) > 1:
        found = principal_directions(module, states)
        return found, ("first main component of the trajectory", "second main component")
    (way,) = principal_directions(module, states, count=1)
    across = scattered[0] - (scattered[0] @ way) * way
    return torch.stack([way, across / across.norm()]), ("towards the start", "a random direction")


def _surface(drawn: _Drawn) -> LossSurface:
    def loss() -> Tensor:
        predictions: Tensor = drawn.module(drawn.inputs)[:, 0]
        return (predictions - drawn.targets).square().mean()

    return LossSurface(list(drawn.module.parameters()), lambda: [(1.0, loss)])


def _slice(
    drawn: _Drawn, moves: Tensor | Sequence[Tensor], ranges: Sequence[tuple[float, float]] | None
) -> LandscapeSlice:
    deep = len(moves) > 1 and len(drawn.module) > 3
    points = _POINTS_OF_DEEP_PLANES if deep else _POINTS[len(moves)]
    return landscape_slice(
        drawn.module, drawn.inputs, drawn.targets, moves,
        trajectory=drawn.states, ranges=ranges, resolution=points, kind=drawn.kind,
    )  # fmt: skip


def _draw_plane(drawn: _Drawn, plane: str, path: Path) -> Path:
    moves, labels = _directions(drawn, plane)
    wide = _slice(drawn, moves, None if plane == "trajectory" else [(-1.0, 1.0)] * 2)
    panels = {"whole plane": wide}
    radius = wide.kink_radius(_KINKS_NEAR)
    if radius < float(wide.axes[0][-1] - wide.axes[0][0]) / 4:
        panels["around the centre"] = _slice(drawn, moves, [(-radius, radius)] * 2)
    return slice_figure(panels, path, drawn.title, labels)


def _draw_line(drawn: _Drawn, path: Path) -> Path:
    away = flat_point(drawn.module, drawn.states[0] if drawn.states else None) - flat_point(drawn.module)
    length = float(away.norm())
    if length > 0:
        way = (away / length)[None]
        ranges, label = [(-_BEYOND * length, (1 + _BEYOND) * length)], "distance from the centre, towards the start"
    else:
        way, ranges, label = random_directions(drawn.module, count=1), [(-1.0, 1.0)], "along a random direction"
    wide = _slice(drawn, way, ranges)
    panels = {"whole line": wide}
    radius = wide.kink_radius(_KINKS_NEAR)
    if radius < (ranges[0][1] - ranges[0][0]) / 4:
        panels["around the centre"] = _slice(drawn, way, [(-radius, radius)])
    return line_figure(panels, path, drawn.title, label)


def _draw_inputs(drawn: _Drawn, folder: Path) -> list[Path]:
    """The regions on a plane of inputs: the inputs themselves if there are two, else through three samples."""
    inputs, rows = drawn.inputs, torch.arange(len(drawn.inputs))
    moves, center, labels = torch.eye(2, dtype=inputs.dtype), torch.zeros_like(inputs[0]), ("x₁", "x₂")
    if inputs.shape[1] != 2:
        rows = torch.randperm(len(inputs), generator=generator(0, "input plane"))[:3]
        if len(rows) < 3 or int(torch.linalg.matrix_rank(inputs[rows[1:]] - inputs[rows[0]])) < 2:
            return []  # no plane
        center = inputs[rows].mean(0)
        moves = torch.linalg.qr((inputs[rows[1:]] - inputs[rows[0]]).T).Q.T
        labels = ("distance in the plane through three samples", "")
    places = (inputs[rows] - center) @ moves.T
    half = 0.7 * float((places.amax(0) - places.amin(0)).max()) or 1.0
    ranges = [(float(middle) - half, float(middle) + half) for middle in (places.amax(0) + places.amin(0)) / 2]
    samples = places.numpy(), drawn.targets[rows].numpy()
    options: dict[str, Any] = {"threshold": drawn.threshold, "labels": labels}

    def regions_of(module: nn.Sequential) -> InputRegions:
        return input_regions(module, moves, center=center, ranges=ranges)

    last = regions_of(drawn.module)
    paths = [input_space_figure(last, folder / "inputs.png", samples, title=drawn.title, **options)]
    if len(drawn.states) > 1:
        frames, module = [], copy.deepcopy(drawn.module)
        for k in sorted({round(i * (len(drawn.states) - 1) / (_FRAMES - 1)) for i in range(_FRAMES)}):
            module.load_state_dict(drawn.states[k])
            frames.append((drawn.names[k], regions_of(module)))
        frames.append(("end", last))
        paths.append(input_space_animation(frames, folder / "inputs.gif", samples, **options))
    return paths
