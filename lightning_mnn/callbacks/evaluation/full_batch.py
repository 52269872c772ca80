"""FullBatch: any module's training loss over its whole training set, and its nearest kink."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_mnn.callbacks.evaluation.isolation import Restart, isolated, trained_parameters
from lightning_mnn.callbacks.evaluation.run_module import (
    SERIOUS,
    LossNotEvaluableError,
    StepFailedError,
    batch_size,
    forward_on,
    loss_on,
    model_batches,
    precision_context,
)
from lightning_mnn.callbacks.evaluation.snapshots import seed_generators
from lightning_mnn.callbacks.trainer.long_pass import count_batch
from lightning_mnn.callbacks.trainer.weight_decay import penalty_of, weight_decays
from lightning_mnn.data.loaders.shards import batch_size_of, draws, num_samples
from lightning_mnn.landscape import tolerances
from lightning_mnn.landscape.curvature.loss_surface import LossSurface
from lightning_mnn.landscape.kinks.distance import KinkDistance, KinkMeter
from lightning_mnn.landscape.kinks.layers import UnknownLayersError
from lightning_mnn.landscape.kinks.tracing import Kink, KinkTrace, Names
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.distributed import DistributedGroup, ProcessGroup, gather, gather_results, part_of
from lightning_mnn.utilities.interruption import safe_point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.callbacks.trainer.weight_decay import Decays
    from lightning_mnn.landscape.kinks.active import ActiveKinks

_MAX_CACHED = 1 << 28  # bytes of batches up to which they are cached for the next pass


class Reduction(StrEnum):
    """How the loss of a batch combines its samples."""

    MEAN = "mean"
    SUM = "sum"
    OTHER = "other"  # such as a mean over tokens, where a sample has several


@dataclass(frozen=True)
class Measures:
    """Results of one pass.

    Attributes:
        loss: L(θ).
        gradient: its gradient, (n,).
        kinks: how far θ is from the nearest kink.
        first: the weighted sum of the losses of each process's first batch.
    """

    loss: float
    gradient: Tensor
    kinks: KinkDistance
    first: float


class FullBatch:
    """L(θ) = Σ_b (n_b / N) L_b(θ) over the batches b of n_b samples, in eval mode, in full precision of the weights.

    L_b is the module's own loss of a batch, treated as the mean over its samples, plus the penalty of the
    optimisers' weight decay (see :mod:`lightning_mnn.callbacks.trainer.weight_decay`). Each pass reads
    the same batches with the same augmentations. Each batch starts from the state that the module had when it was
    opened, such as running means and counters, so that L is a function of the weights alone. Each process has its own
    part of the training set, or none, so a loss must not communicate with other processes (within :meth:`open`, metrics
    of torchmetrics do not). Use it within :meth:`open`.

    Args:
        trainer: the Trainer that trains the module.
        pl_module: the module.
        loss_fn: ``loss_fn(module, batch)``; None: the module's ``training_step``.
        modules: layers whose kinks count (see :class:`lightning_mnn.landscape.kinks.tracing.KinkTrace`).
        losses: False: the loss cannot be evaluated, and kinks are those of the module's forward pass, or of
            ``loss_fn``.
        read: called with each batch that is read, as it was collated; None: nothing is called.
        weight_decay: add the penalty of the optimisers' weight decay; None: unless there is a ``loss_fn``.

    Attributes:
        decays: parameters with weight decay that the loss includes, and its factors.
        met: layers whose kinks :meth:`nearest_kink` met, whether they depend on the weights or not.
        smooth: smooth nonlinear functions that :meth:`nearest_kink` met.
        opaque: calls whose kinks it could not detect.
        left_out: layers that ``modules`` excluded.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loss_fn: ModelFunction | None = None,
        modules: Names = None,
        *,
        losses: bool = True,
        read: Callable[[Any], object] | None = None,
        weight_decay: bool | None = None,
    ) -> None:
        self.met: list[str] = []
        self.smooth: list[str] = []
        self.opaque: list[str] = []
        self.left_out: list[str] = []
        decayed = loss_fn is None if weight_decay is None else weight_decay
        self.decays: Decays = weight_decays(trainer) if decayed else ()
        self._trainer = trainer
        self._module = pl_module
        self._loss_fn = loss_fn
        self._modules = modules
        self._read = read
        self._run: Callable[[int, Any], Any] = self._loss_or_none if losses else self._forward
        self._drawn = draws(trainer.train_dataloader) is not None
        self._dropped = 0
        self._counts: tuple[int, int] | None = None  # number of samples of all processes, and of this one
        if not self._drawn:
            total = num_samples(trainer.train_dataloader)
            low, high = part_of(total, trainer.global_rank, trainer.world_size)
            self._dropped = _dropped(trainer, total)
            self._counts = total - self._dropped, high - low
        self._cached: list[Any] | None = None
        self._first: tuple[int, Any, int] | None = None  # the first batch, if it can be copied
        self._restart: Restart | None = None
        self._moving: set[int] = set()  # ids of the parameters of surfaces
        self._failure: str | None = None
        metrics = [name for name, part in pl_module.named_modules() if isinstance(part, Metric)]
        self._metrics = tuple(f"{name}." for name in metrics)

    @contextmanager
    def open(self) -> Iterator[None]:
        """A context in which the module can run, isolated from its training."""
        trainer = self._trainer
        with (
            isolated(trainer, self._module) as restart,
            precision_context(trainer, autocast=False),
            full_precision(),
            torch.enable_grad(),
        ):
            self._restart = restart
            try:
                yield
            finally:
                self._cached, self._first, self._restart = None, None, None

    def reason_not_evaluable(self) -> str | None:
        """Why the module's loss cannot be evaluated, the same on every process; None if it can.

        Raises:
            StepFailedError: ``training_step`` fails on at least one process.
        """
        local_failure = None
        for index, batch, _ in self._first_batches():
            try:
                self._loss(index, batch)
            except LossNotEvaluableError as error:
                local_failure = isinstance(error, StepFailedError), str(error)
        failures = [failure for failure in gather(local_failure) if failure is not None]
        for in_step, reason in failures:
            if in_step:
                raise StepFailedError(reason)
        return failures[0][1] if failures else None

    def surface(self, parameters: Sequence[Tensor] | None = None) -> LossSurface:
        """The loss as a function of parameters; None: of all that the optimisers train.

        Raises:
            ValueError: they differ in precision or device, or have less than 32 bits.
        """
        chosen = self._trained() if parameters is None else parameters
        self._moving = {id(parameter) for parameter in chosen}
        return self._surface(chosen, self._parts)

    def first_surface(self, parameters: Sequence[Tensor]) -> LossSurface:
        """The loss of the first batch of each process as a function of parameters."""
        self._moving = {id(parameter) for parameter in parameters}
        return self._surface(parameters, lambda: self._weighted(self._first_batches()))

    def measure(self) -> Measures:
        """The loss, its gradient and the nearest kink, in one pass; in two where batches cannot be copied.

        Raises:
            NoDerivativeError: the loss cannot be differentiated.
            UnknownLayersError: there are kinks, and none that ``modules`` names.
            LossNotEvaluableError: a batch has no loss.
        """
        meter, trained, apart = KinkMeter(self._trained()), self._trained(), False
        first = torch.zeros(2, dtype=torch.float64, device=trained[0].device)

        def noted(weight: float, part: Callable[[], Tensor]) -> Tensor:
            loss = part()
            first[0] += weight * loss.detach().reshape(())
            first[1] += weight
            return loss

        def parts() -> Iterator[tuple[float, Callable[[], Tensor]]]:
            nonlocal apart
            for index, batch, size in self._batches():
                # a batch that cannot be copied needs a pass of its own: a step may change it
                apart = apart or not (_is_known(batch) or _copied(batch) is not batch)
                if not apart:
                    meter.take(partial(self._trace, index, batch))
                weight, part = self._weight(size), partial(self._part, index, batch)
                yield weight, part if index else partial(noted, weight, part)

        loss, gradient = self._surface(trained, parts).value_and_gradient()
        self.check()
        value, weight = self._process_group().sum(first).tolist()
        kinks = self.nearest_kink() if any(gather(apart)) else self._kinks_of(meter)
        return Measures(loss, gradient, kinks, value / weight if self._drawn else value)

    def is_kept(self) -> bool:
        """Whether the next pass reads batches from memory, on every process."""
        return all(gather(self._cached is not None))

    def check_repeats(self, first: float) -> None:
        """Check that the loss of the first batches is still ``first``, at the same weights, after other passes.

        Raises:
            LossNotEvaluableError: it differs, so the loss is not a function of the weights.
        """
        again = self.first_surface(self._trained()).loss()
        eps = torch.finfo(self._trained()[0].dtype).eps
        if abs(again - first) > eps**0.5 * max(abs(first), abs(again)) + eps**1.5:
            raise LossNotEvaluableError(
                f"the loss of the same batch at the same weights was {first:.6g} and, after a pass, {again:.6g}: it "
                "depends on a state outside the module. Give the callback a loss_fn(module, batch) that does not"
            )

    def nearest_kink(self) -> KinkDistance:
        """How far the weights are from the nearest kink of the forward passes and the loss.

        Raises:
            UnknownLayersError: there are kinks, and none that ``modules`` names.
            LossNotEvaluableError: a batch has no loss.
        """
        meter = KinkMeter(self._trained())

        def local_pass() -> None:
            for index, batch, _ in self._batches():
                meter.take(partial(self._trace, index, batch))

        gather_results(local_pass)
        return self._kinks_of(meter)

    def kink_passes(
        self,
    ) -> Iterator[tuple[float, Callable[[Callable[[Kink], None]], None], Callable[[ActiveKinks], Tensor]]]:
        """For each batch its weight, a traced pass, and a pass with active kinks that returns the loss.

        See :func:`lightning_mnn.landscape.curvature.kink_conditions.kink_conditions`.
        """
        for index, batch, size in self._batches():
            trace = partial(self._trace, index, batch)
            yield self._weight(size), trace, partial(self._part_on_kinks, index, batch)

    def _part_on_kinks(self, index: int, batch: Any, active: ActiveKinks) -> Tensor:
        self._restore()  # before the trace, whose hooks it would remove
        with KinkTrace(self._module, lambda _: None, self._modules, replace=active):
            loss = self._loss_or_none(index, _copied(batch))
        return loss + penalty_of(self.decays) if self.decays else loss

    def _kinks_of(self, meter: KinkMeter) -> KinkDistance:
        """The kinks that a pass recorded, over all processes."""
        found = meter.found(self._process_group())
        parts = gather((self.met, self.smooth, self.opaque, self.left_out))
        unions = (sorted(set().union(*names)) for names in zip(*parts, strict=True))
        self.met, self.smooth, self.opaque, self.left_out = unions
        self.check()
        if not self.met and self.left_out and self._modules is not None:
            raise UnknownLayersError(
                f"modules={self._modules!r} matches none of the layers that {type(self._module).__name__} met: "
                f"{', '.join(self.left_out)}"
            )
        return found

    def reduction(self) -> Reduction:
        """How the loss of a batch combines its samples, judged by the first batch.

        If the loss is a sum, a batch concatenated with itself has twice the loss. If it is a mean, the loss of a batch
        is the mean over its two halves, weighted by their numbers of samples. Only batches whose tensors have one entry
        or row for each sample are tested.
        """
        reduction, failure = Reduction.MEAN, self._failure
        for index, batch, size in self._first_batches():
            tensors: list[Tensor] = []
            apply_to_collection(batch, Tensor, tensors.append, allow_frozen=True)
            if tensors and all(tensor.ndim and len(tensor) == size for tensor in tensors):
                with suppress(Exception):  # a step may require a fixed batch size
                    reduction = self._reduction_of(index, batch, size)
        self._failure = failure
        found = gather(str(reduction))
        return next((kind for kind in (Reduction.SUM, Reduction.OTHER) if str(kind) in found), Reduction.MEAN)

    def _reduction_of(self, index: int, batch: Any, size: int) -> Reduction:
        def loss(change: Callable[[Tensor], Tensor]) -> float:
            changed = apply_to_collection(batch, Tensor, change, allow_frozen=True)
            return float(self._loss_part(index, changed).detach())

        one, two = loss(Tensor.clone), loss(lambda tensor: torch.cat([tensor, tensor]))
        within = tolerances.MAX_REDUCTION_ERROR_RATIO * abs(one)
        if abs(two - 2 * one) < within:
            return Reduction.SUM
        if abs(two - one) >= within or size < 2:  # for example a step that draws random numbers
            return Reduction.MEAN
        half = size // 2
        parts = half * loss(lambda tensor: tensor[:half]) + (size - half) * loss(lambda tensor: tensor[half:])
        return Reduction.MEAN if abs(parts / size - one) < within else Reduction.OTHER

    def notes(self) -> list[str]:
        """Notes on what :meth:`nearest_kink` could not measure."""
        templates = {
            "kinks of {} cannot be seen": self.opaque,
            "kinks of {} are left out": self.left_out,
            "of smooth functions, not piecewise linear: {}": self.smooth,
        }
        found = [text.format(", ".join(names)) for text, names in templates.items() if names]
        if self._dropped:
            found.append(f"the last {self._dropped} samples are left out, as many as drop_last drops from each epoch")
        return found

    def check(self) -> None:
        """Check that each batch has a loss; all processes must call this after a pass.

        Raises:
            LossNotEvaluableError: one has none.
        """
        reason = next((reason for reason in gather(self._failure) if reason is not None), None)
        if reason is not None:
            raise LossNotEvaluableError(reason)

    def _parts(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        return self._weighted(self._batches())

    def _weighted(self, batches: Iterator[tuple[int, Any, int]]) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        for index, batch, size in batches:
            yield self._weight(size), partial(self._part, index, batch)

    def _weight(self, size: int) -> float:
        """Weight of a batch; that of drawn batches is not normalised, since the sum is known only after a pass."""
        return float(size) if self._counts is None else size / self._counts[0]

    def _surface(
        self, parameters: Sequence[Tensor], parts: Callable[[], Iterator[tuple[float, Callable[[], Tensor]]]]
    ) -> LossSurface:
        return LossSurface(parameters, parts, self._process_group(), normalise=self._drawn)

    def _trained(self) -> list[Tensor]:
        return trained_parameters(self._trainer, self._module)

    def _part(self, index: int, batch: Any) -> Tensor:
        """The loss of a batch with the penalty of weight decay: their mean over the batches has the penalty once."""
        loss = self._loss_part(index, batch)
        return loss + penalty_of(self.decays) if self.decays else loss

    def _loss_part(self, index: int, batch: Any) -> Tensor:
        self._restore()
        return self._loss_or_none(index, batch)

    def _restore(self) -> None:
        assert self._restart is not None  # noqa: S101 (it is open)
        self._restart.batch(self._moving | {id(parameter) for parameter in self._trained()})

    def _loss(self, index: int, batch: Any) -> Tensor:
        seed_generators(index)
        return loss_on(self._module, batch, index, self._loss_fn)

    def _loss_or_none(self, index: int, batch: Any) -> Tensor:
        try:
            return self._loss(index, batch)
        except LossNotEvaluableError as error:  # the other processes continue; check raises the error on all
            self._failure = str(error)
            return 0.0 * self._trained()[0].reshape(-1)[:1].sum()  # differentiable like any loss

    def _forward(self, index: int, batch: Any) -> None:
        seed_generators(index)
        remedy = "loss_fn(module, batch)"
        try:
            forward_on(self._module, batch, self._loss_fn, remedy)
        except LossNotEvaluableError as error:
            self._failure = str(error)
        except SERIOUS:
            raise
        except Exception as error:
            if self._loss_fn is not None:
                raise
            self._failure = (
                f"{type(self._module).__name__}.forward fails on a batch of the training set: {type(error).__name__}: "
                f"{error}. Give the callback a {remedy}, which need not return a loss"
            )

    def _trace(self, index: int, batch: Any, on_kink: Callable[[Kink], None]) -> None:
        def without_metrics(kink: Kink) -> None:
            if not kink.name.startswith(self._metrics or "\0"):
                on_kink(kink)

        self._restore()
        with KinkTrace(self._module, without_metrics, self._modules) as trace:
            self._run(index, _copied(batch))
        self.met = sorted({*self.met, *trace.names})
        self.smooth, self.opaque = sorted({*self.smooth, *trace.smooth}), sorted({*self.opaque, *trace.opaque})
        self.left_out = sorted({*self.left_out, *trace.left_out})

    def _first_batches(self) -> Iterator[tuple[int, Any, int]]:
        """This process's first batch, as :meth:`_batches` yields it, without the others; none if it has none."""
        if self._first is None or self._cached is not None:
            yield from islice(self._batches(most=1), 1)
            return
        assert self._restart is not None  # noqa: S101 (it is open)
        self._restore()
        self._restart.data()
        seed_generators(0)
        index, batch, size = self._first
        yield index, _copied(batch), size

    def _batches(self, most: int | None = None) -> Iterator[tuple[int, Any, int]]:
        """Index, content and number of samples of this process's batches, or of at most ``most`` of them."""
        assert self._restart is not None  # noqa: S101 (it is open)
        self._restore()
        self._restart.data()
        loader = self._trainer.train_dataloader
        left = 0 if self._counts is None else self._counts[1]
        cache: list[Any] | None = []
        read = model_batches(self._trainer, self._module, most=most, read=self._read)
        for index, batch in enumerate(self._cached or read):
            # for a DataLoader the size is known, whatever the layout of the samples in the batch
            known = isinstance(loader, DataLoader) and not self._drawn
            size = min(batch_size_of(loader), left) if known else batch_size(batch)
            left -= size
            if self._dropped and isinstance(loader, DataLoader) and size < (loader.batch_size or 0):
                break  # the module may not support a smaller batch
            if index == 0 and self._first is None and _is_known(batch):
                self._first = index, _copied(batch), size
            if cache is not None and self._cached is None:
                cache.append(_copied(batch))
                cache = cache if _is_known(batch) and _bytes(cache) <= _MAX_CACHED else None
            safe_point()
            if most is None:  # else it is no pass
                count_batch()
            yield index, _copied(batch) if self._cached else batch, size
        if self._cached is None and most is None:
            self._cached = cache

    def _process_group(self) -> ProcessGroup:
        samples = 0 if self._counts is None else self._counts[1]  # surfaces and kinks do not use it
        return ProcessGroup() if self._trainer.world_size == 1 else DistributedGroup(samples)


def _dropped(trainer: pl.Trainer, total: int) -> int:
    """Number of samples in last batches that a loader drops; 0 if a process would have none left."""
    loader: Any = trainer.train_dataloader
    if not (isinstance(loader, DataLoader) and loader.drop_last and loader.batch_size):
        return 0
    parts = [part_of(total, rank, trainer.world_size) for rank in range(trainer.world_size)]
    sizes = [stop - start for start, stop in parts]
    return 0 if min(sizes) < loader.batch_size else sum(size % loader.batch_size for size in sizes)


def _copied(batch: Any) -> Any:
    """A copy, since a step may change its batch in place; an object of unknown type that cannot be copied itself."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, dict) and _is_known_container(batch):
        return type(batch)((key, _copied(part)) for key, part in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_copied, batch))
    if _is_known_container(batch):
        return type(batch)(map(_copied, batch))
    try:
        return deepcopy(batch)
    except Exception:  # noqa: BLE001 (its class can raise anything)
        return batch


def _is_known(batch: Any) -> bool:
    """Whether a batch has only parts that can certainly be copied: tensors, arrays, numbers, texts, in containers."""
    if _is_known_container(batch):
        return all(map(_is_known, _parts_of(batch)))
    return batch is None or isinstance(batch, Tensor | np.ndarray | np.generic | str | bytes | int | float | complex)


def _is_known_container(batch: Any) -> bool:
    named = isinstance(batch, tuple) and hasattr(batch, "_fields")
    return named or type(batch) in (dict, OrderedDict, list, tuple)


def _parts_of(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _bytes(batch: Any) -> int:
    if isinstance(batch, Tensor | np.ndarray):
        return int(batch.nbytes)
    return sum(map(_bytes, _parts_of(batch))) if _is_known_container(batch) else 0
