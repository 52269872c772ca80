"""LossSlice: what does the loss look like on a plane through the final weights?"""

from __future__ import annotations

import math
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from lightning_mnn.callbacks.evaluation.isolation import isolated
from lightning_mnn.callbacks.evaluation.kink_probe import chosen_samples
from lightning_mnn.callbacks.evaluation.run_module import as_in_training, batch_size, loss_on, precision_context
from lightning_mnn.callbacks.evaluation.snapshots import seed_generators
from lightning_mnn.callbacks.schedule import Schedule
from lightning_mnn.callbacks.scheduled import ScheduledCallback
from lightning_mnn.callbacks.trainer.findings_file import folders_of_findings
from lightning_mnn.callbacks.volumes.probe import are_plain
from lightning_mnn.data.loaders.shards import exact_shard, num_samples
from lightning_mnn.findings import Fact
from lightning_mnn.landscape.slices.directions import flat_point, random_directions
from lightning_mnn.landscape.slices.landscape_slice import LandscapeSlice
from lightning_mnn.loggers.media import log_image, shows_images
from lightning_mnn.utilities.distributed import gather
from lightning_mnn.utilities.files import whole_file
from lightning_mnn.utilities.transfer import widest_dtype
from lightning_mnn.utilities.validation import one_of, positive_integer, real_number, seed_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.isolation import Restart
    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction

DIRECTIONS = ("random", "start")

_MIN_RESOLUTION = 5
_LABELS = {
    "random": ("first random direction, in lengths of the filters", "second random direction"),
    "start": ("towards the start, which is at 1", "a random direction, as long"),
}


class LossSlice(ScheduledCallback):
    """Draws the training loss on a plane through the final weights, when training ends; of any module.

    It writes ``slice.png`` and ``slice.npz`` (``axis_1``, ``axis_2``, ``losses``, ``center_loss``) where
    ``findings.json`` is, so that the page of the run shows the plane, and logs the picture as ``slice`` to W&B and
    TensorBoard. The loss is that of the module's ``training_step`` in eval mode, on a fixed random subset of the
    training set, at each point of a grid, one point after another; each process evaluates all of them. Kinks are not
    drawn: for them and for other planes see :func:`lightning_mnn.landscape.landscape_slice`.

    Args:
        directions: "random": two random directions with filter normalisation, from −1 to 1; "start": from the weights
            at the start of the fit, or of the resumed part of it, to the final ones and beyond, and a random direction.
        resolution: number of points along each direction; an even one is raised by one, so that the weights are one.
        samples: number of samples of the training set.
        max_seconds: about how long it may take: the grid gets fewer points if the first one takes too long, but at
            least 5 × 5. So with a slow loss two runs may have different grids.
        loss_fn: ``loss_fn(module, batch)``, the mean over the batch; None: the module's ``training_step``.
        seed: of the samples and the directions.
        strict: if true, an error in the callback ends the run; otherwise it warns once, and training goes on without
            the callback.

    Attributes:
        plane: the losses on the plane; None before the end.

    Raises:
        ValueError: an argument is out of range; (at the end) the loss is finite nowhere, or nothing was trained.
        TypeError: (at the end) the samples of the training set cannot be enumerated, the loss cannot be evaluated, or
            a process has only a part of the weights.

    >>> LossSlice("start", resolution=20).resolution
    21
    """

    missing = "no slice of the loss is drawn"
    remedy = "loss_fn(module, batch), if the module's training_step cannot be evaluated by itself"

    def __init__(
        self,
        directions: str = "random",
        *,
        resolution: int = 21,
        samples: int = 512,
        max_seconds: float = 60.0,
        loss_fn: ModelFunction | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(Schedule(every=sys.maxsize), strict=strict)
        self.directions = one_of("directions", directions, DIRECTIONS)
        self.resolution = whole_number("resolution", resolution, at_least=_MIN_RESOLUTION) // 2 * 2 + 1
        self.samples = positive_integer("samples", samples)
        self.max_seconds = real_number("max_seconds", max_seconds, above=0)
        self.loss_fn = loss_fn
        self.seed = seed_number("seed", seed)
        self.plane: LandscapeSlice | None = None
        self._start: Tensor | None = None

    @override
    def epochs_until_due(self, done: int) -> float:
        return math.inf

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.plane, self._start = None, None

    @override
    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights, if the plane goes through them."""
        if self.directions == "start":
            self._start = flat_point(pl_module).clone()

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folders = folders_of_findings(trainer)  # a collective
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.plane = self._evaluated(trainer, pl_module)
        if trainer.is_global_zero:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                self._write(self.plane, folder, f"{type(pl_module).__name__} after {trainer.global_step} steps")
            for logger in trainer.loggers if folders else ():
                if shows_images(logger):
                    log_image(logger, "slice", folders[0] / "slice.png", trainer.global_step)

    @override
    def recall(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.act(trainer, pl_module)

    @override
    def facts(self) -> list[Fact]:
        if self.plane is None:
            return []
        losses = self.plane.losses
        finite = torch.where(losses.isfinite(), losses, torch.inf)
        lowest = float(finite.min())
        if lowest >= self.plane.center_loss:
            text = f"no point of a plane with {self.directions} directions has a lower loss than the final weights"
        else:
            at = divmod(int(finite.argmin()), losses.shape[1])
            x, y = (float(axis[k]) for axis, k in zip(self.plane.axes, at, strict=True))
            text = (
                f"on a plane with {self.directions} directions the loss is lowest at ({x:.2g}, {y:.2g}): {lowest:.4g}, "
                f"and {self.plane.center_loss:.4g} at the final weights"
            )
        return [Fact("slice", text, value=lowest)]

    def _evaluated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LandscapeSlice:
        """The losses on the plane, the same on every process."""
        parameters = list(pl_module.parameters())
        moving = [parameter for parameter in parameters if parameter.requires_grad]
        if not moving or not are_plain(moving):
            raise TypeError("the trained parameters are not plain tensors, each whole on its device")
        chosen = chosen_samples(num_samples(trainer.train_dataloader), self.samples, self.seed)
        moves, sides = self._moves(pl_module)
        with isolated(trainer, pl_module) as restart:
            read = exact_shard(trainer.train_dataloader, chosen=chosen)
            batches = [as_in_training(trainer, pl_module, batch) for batch in read]
            loss = _Loss(trainer, pl_module, batches, self.loss_fn, restart)
            began = time.monotonic()
            center = float(loss())
            side = self._affordable_resolution(max(gather(time.monotonic() - began)))
            axes = tuple(torch.linspace(low, high, side, dtype=moves.dtype) for low, high in sides)
            with _moving(parameters, moving, moves) as move_to:
                losses = []
                for point in torch.cartesian_prod(*axes):
                    move_to(point.tolist())
                    losses.append(loss())
        values = torch.stack(losses).view(side, side).cpu()
        if not values.isfinite().any():
            raise ValueError("the loss is finite at no point of the plane")
        started = torch.tensor([[1.0, 0.0]] if self.directions == "start" else []).reshape(-1, 2)
        nowhere = torch.zeros(side, side, dtype=torch.bool)  # kinks are not traced, so no region is known
        off = torch.zeros(len(started))
        return LandscapeSlice(axes, values, center, moves.cpu(), (), nowhere, chosen, started, off, None)

    def _moves(self, pl_module: pl.LightningModule) -> tuple[Tensor, list[tuple[float, float]]]:
        """The directions (2, P), and the ranges along them."""
        scattered = random_directions(pl_module, seed=self.seed)
        if self._start is None:
            return scattered, [(-1.0, 1.0)] * 2
        way = self._start - flat_point(pl_module)
        length = way.norm()
        if float(length) == 0:
            raise ValueError("the weights are those of the start: there is no way between them")
        across = scattered[0] - (scattered[0] @ way) / length.square() * way
        return torch.stack([way, across * (length / across.norm())]), [(-0.5, 1.5), (-1.0, 1.0)]

    def _affordable_resolution(self, seconds: float) -> int:
        """The number of points along each direction, if one point takes some seconds."""
        affordable = int(math.sqrt(self.max_seconds / max(seconds, 1e-9)))
        return max(_MIN_RESOLUTION, min(self.resolution, (affordable - 1) // 2 * 2 + 1))

    def _write(self, plane: LandscapeSlice, folder: Path, title: str) -> None:
        from lightning_mnn.figures.slices.weight_space import slice_figure  # noqa: PLC0415 (matplotlib is slow)

        slice_figure({f"loss of {len(plane.samples):,} samples": plane}, folder / "slice.png", title, self._labels)
        first, second = plane.axes
        arrays = {"axis_1": first, "axis_2": second, "losses": plane.losses, "center_loss": plane.center_loss}
        with whole_file(folder / "slice.npz") as unfinished, unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})

    @property
    def _labels(self) -> tuple[str, str]:
        return _LABELS[self.directions]


class _Loss:
    """The mean loss over some batches, at the present weights of a module; within ``isolated``."""

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batches: list[Any],
        loss_fn: ModelFunction | None,
        restart: Restart,
    ) -> None:
        self._trainer, self._module, self._loss_fn, self._restart = trainer, pl_module, loss_fn, restart
        self._batches = [(batch, batch_size(batch)) for batch in batches]

    def __call__(self) -> Tensor:
        """The loss, on the module's device."""
        dtype = widest_dtype(self._module.device)
        total = torch.zeros((), dtype=dtype, device=self._module.device)
        for index, (batch, size) in enumerate(self._batches):
            self._restart.batch()
            seed_generators(index)
            copied = apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)
            with torch.enable_grad(), precision_context(self._trainer, autocast=True):
                loss = loss_on(self._module, copied, index, self._loss_fn)
            total += size * loss.detach().to(dtype)
        return total / sum(size for _, size in self._batches)


@contextmanager
def _moving(
    parameters: Sequence[Tensor], moving: Sequence[Tensor], moves: Tensor
) -> Iterator[Callable[[list[float]], None]]:
    """A context with a function that moves parameters along directions; they are as before afterwards.

    Args:
        parameters: all, in the order of the directions.
        moving: those that move.
        moves: the directions, (2, P).
    """
    before = [parameter.detach().clone() for parameter in parameters]
    ways = torch.split(moves, [parameter.numel() for parameter in parameters], dim=1)
    free = {id(parameter) for parameter in moving}

    def move_to(coordinates: list[float]) -> None:
        for parameter, old, way in zip(parameters, before, ways, strict=True):
            if id(parameter) in free:
                step = coordinates[0] * way[0] + coordinates[1] * way[1]
                parameter.copy_(old + step.view_as(old).to(old))

    with torch.no_grad():
        try:
            yield move_to
        finally:
            for parameter, old in zip(parameters, before, strict=True):
                if id(parameter) in free:
                    parameter.copy_(old)
