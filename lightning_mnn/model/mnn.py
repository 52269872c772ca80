"""MNN: the multilayer piecewise-linear network of Soudry & Hoffer (2017) as a LightningModule.

Shapes: B samples of a batch, d0 inputs, d1 (d2, …) hidden units, R replicas.
"""

from __future__ import annotations

import fnmatch
import math
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mnn.data.checks import check_batch, check_training_set
from lightning_mnn.data.error_sums import ErrorSums
from lightning_mnn.data.loaders.exact import ExactData, ExactLoader, NoLoaders
from lightning_mnn.data.loaders.shards import flat_batch
from lightning_mnn.landscape.labels import wrong
from lightning_mnn.landscape.network import Network
from lightning_mnn.loggers.media import log_rows, log_scalars
from lightning_mnn.model.batched_steps import Steps
from lightning_mnn.model.bundling import Bundle, epochs_at_a_time, may_bundle
from lightning_mnn.model.gradients import SquaredErrorGradient
from lightning_mnn.model.lockstep import Member, lockstep
from lightning_mnn.model.optim import OPTIMIZERS, build_optimizer, build_schedule, is_elementwise, needs_closure
from lightning_mnn.model.sizes import check_size, checked_widths
from lightning_mnn.utilities.compat.lightning_internals import (
    StepCount,
    count_batches,
    load_training_data,
    share_saved_step_count,
    share_step_count,
    training_data_source,
)
from lightning_mnn.utilities.compat.torch_internals import have_hooks
from lightning_mnn.utilities.errors import DivergenceError
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.transfer import fetched, widest_dtype
from lightning_mnn.utilities.validation import (
    ArgumentError,
    dtype_named,
    is_real_number,
    positive_integer,
    real_number,
    seed_number,
    truth_value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytorch_lightning.utilities.types import OptimizerLRScheduler


Row = tuple[dict[str, float], int]  # errors of a batch, and the number of steps before it


class MNN(pl.LightningModule):
    """ŷ = z · f(W x), or deeper, z · f(W₂ f(W₁ x)), …, without biases, trained on MSE = ‖y − ŷ‖²/N.

    f(u) = u where u > 0 and ρ u elsewhere. Weights are drawn by He's rule: N(0, 2 / ((1 + ρ²) fan-in)) in every layer,
    including the output layer. ``replicas=R`` trains R independent networks side by side as batched products. Replica r
    starts like a single network with seed ``seed + r``. The loss is the sum of the replicas' MSEs, so that they do not
    affect one another. Targets of shape (B, 1) are treated as (B,), and images as flat inputs.

    Inputs are (B, d0), shared by all replicas, or (R, B, d0); outputs are (B,), with R > 1 replicas (R, B).

    Args:
        input_dim: d0.
        hidden_dims: widths (d1,), (d1, d2), … of the hidden layers.
        negative_slope: ρ, any real but 1 (0: ReLU, between 0 and 1: leaky ReLU, −1: absolute value).
        replicas: R.
        optimizer: ``name`` of any optimiser of ``torch.optim``, as "adam" or "RMSprop", and its arguments. With
            replicas it must act on each weight by itself, which LBFGS, Adafactor and Muon do not.
        schedule: ``name`` (constant, exponential_tail, one_cycle, or a class of ``torch.optim.lr_scheduler``) and its
            arguments (see :func:`lightning_mnn.model.optim.build_schedule`).
        frozen: names or patterns of the parameters that are not trained: "output_weights", "hidden_weights.0",
            "hidden_weights.*".
        threshold: decision threshold of the classification error; None: 0.5 for labels {0, 1}, 0 for ±1.
        regression: targets are any real numbers, and there is no classification error.
        dtype: "float64" or "float32"; in float32 a minimum can hardly be distinguished from a point near it.
            (``Trainer(precision=...)`` overrides it.)
        seed: seed of the weights.
        default_callbacks: add LocalMinimumDetector, ActivationPatternRecorder and AngularVolumeMonitor to a Trainer,
            except those that it already has.

    Raises:
        ValueError: ρ = 1, a size that is not positive, an unknown dtype, optimiser, schedule or frozen parameter; an
            optimiser that couples replicas, with several of them; LBFGS with several processes. Before training starts:
            inputs of another dimension, NaN or infinity in the data, labels that are not binary.
        DivergenceError: (in training) the loss or a weight of any replica is no longer finite.

    >>> MNN(input_dim=3, hidden_dims=(5,), replicas=4)(torch.zeros(7, 3)).shape
    torch.Size([4, 7])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        negative_slope: float = 0.0,
        replicas: int = 1,
        *,
        optimizer: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        frozen: Sequence[str] = (),
        threshold: float | None = None,
        regression: bool = False,
        dtype: str = "float64",
        seed: int = 0,
        default_callbacks: bool = True,
    ) -> None:
        super().__init__()
        optimizer = dict(optimizer or {"name": "adam", "lr": 1e-3})
        schedule = dict(schedule or {"name": "constant"})
        frozen = [frozen] if isinstance(frozen, str) else list(frozen)
        input_dim = positive_integer("input_dim", input_dim)
        hidden_dims = checked_widths(hidden_dims)
        replicas = positive_integer("replicas", replicas)
        if not is_real_number(negative_slope) or negative_slope == 1:
            problem = "must be a real number other than 1 (the network would be linear)"
            raise ArgumentError("negative_slope", negative_slope, problem, "choose 0 for ReLU, 0.1 for leaky ReLU")
        if threshold is not None:
            real_number("threshold", threshold, remedy="or choose null, which infers it from the labels")
        truth_value("regression", regression)
        truth_value("default_callbacks", default_callbacks)
        seed_number("seed", seed)
        dtype_named(dtype)
        name = str(optimizer.get("name"))
        if replicas > 1 and name.lower() in OPTIMIZERS and not is_elementwise(name):
            how = "whose line search couples them" if needs_closure(name) else "which couples the weights of a matrix"
            problem = f"must be 1 with the optimizer {name}, {how}"
            raise ArgumentError("replicas", replicas, problem, "or choose adam or sgd")
        check_size(input_dim, hidden_dims, replicas)
        self.save_hyperparameters()  # plain values only, so that checkpoints load without executing code

        self.hidden_weights = nn.ParameterList()
        self.activation = nn.ReLU() if negative_slope == 0 else nn.LeakyReLU(negative_slope)
        generators = [generator(seed + replica, "weights") for replica in range(replicas)]
        for fan_in, width in zip([input_dim, *hidden_dims], hidden_dims, strict=False):
            self.hidden_weights.append(self._draw(generators, (width, fan_in), fan_in))
        self.output_weights = self._draw(generators, (hidden_dims[-1],), hidden_dims[-1])
        self._freeze(frozen)
        build_optimizer(self.parameters(), optimizer)  # invalid options must fail here, not in fit
        build_schedule(build_optimizer(self.parameters(), optimizer), schedule, total_steps=1000)
        self.threshold = threshold
        self._gradient: SquaredErrorGradient | None = None
        self._errors: dict[int, ErrorSums] = {}  # by loader, during validation or a test
        self._total_steps: float = math.inf  # of the schedule
        self._saved_steps_per_batch: int | None = None  # of the checkpoint that training is resumed from

    def _draw(self, generators: Sequence[torch.Generator], shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
        std = math.sqrt(2 / ((1 + self.hparams["negative_slope"] ** 2) * fan_in))
        drawn = torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) * std for g in generators])
        return nn.Parameter((drawn if len(generators) > 1 else drawn[0]).to(dtype_named(self.hparams["dtype"])))

    def _freeze(self, frozen: Sequence[str]) -> None:
        """Train no parameter that a pattern names; at least one must be left."""
        names = [name for name, _ in self.named_parameters()]
        for pattern in frozen:
            if not fnmatch.filter(names, str(pattern)):
                raise ArgumentError("frozen", pattern, "names no parameter", f"choose from {', '.join(names)}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen))
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ArgumentError(
                "frozen", frozen, "must leave a parameter to train", f"choose some of {', '.join(names)}"
            )

    @property
    def replicas(self) -> int:
        """R."""
        return int(self.hparams["replicas"])

    def network(self) -> Network:
        """The weights in the form that :mod:`lightning_mnn.landscape` uses (detached, not copied)."""
        return Network(
            hidden_weights=tuple(weights.detach() for weights in self.hidden_weights),
            output_weights=self.output_weights.detach(),
            negative_slope=float(self.hparams["negative_slope"]),
            unit_roundoff=torch.finfo(self.output_weights.dtype).eps / 2,
        )

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.to(self.output_weights.dtype)
        for weights in self.hidden_weights:
            hidden = self.activation(hidden @ weights.mT)
        return (hidden @ self.output_weights[..., None])[..., 0]

    @override
    def setup(self, stage: str) -> None:
        """Bundle several steps in one Lightning batch if that changes only the time."""
        if stage != "fit":
            return
        data = training_data_source(self.trainer)
        bundled = (
            isinstance(data, ExactData)
            and type(self) is MNN
            and not needs_closure(self.hparams["optimizer"]["name"])
            and may_bundle(self.trainer)
        )
        share_step_count(self.trainer)
        self.automatic_optimization = not bundled
        if isinstance(data, ExactData):
            operations = 6.0 * sum(weights.numel() for weights in self.parameters())
            data.operations_per_sample = operations if bundled else None

    @override
    def teardown(self, stage: str) -> None:
        """Prepare the data for any module again, and drop what only training needs."""
        self._gradient = None
        if stage != "fit":
            return
        share_step_count(self.trainer)  # another module may ask for the count
        data = training_data_source(self.trainer)
        if isinstance(data, ExactData):
            data.operations_per_sample = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self._loss(batch)
        before = self.trainer.global_step
        loader, further = self._exact_loader, 0
        if batch_idx + 1 == self.trainer.num_training_batches:  # also the epochs up to one at whose end a callback acts
            further = min(epochs_at_a_time(self.trainer), loader.steps_per_batch // loader.num_steps) - 1
        self._descend(Bundle(self.trainer, batch, further))
        count_batches(self.trainer, self.trainer.global_step - before - 1)  # Lightning counts one
        return None

    @property
    def _exact_loader(self) -> ExactLoader:
        return cast("ExactLoader", self.trainer.train_dataloader)

    def _descend(self, bundle: Bundle) -> None:
        """Do one optimiser step per batch."""
        if (member := lockstep()) is not None and self._may_wait():
            self._descend_together(member, bundle)
            return
        gradient = None if self._is_watched() else self._in_place_gradient()
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        schedule: Any = self.lr_schedulers()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        count = StepCount(self.trainer)  # 1 µs per step; Lightning's own optimiser counts, too, but needs 30 µs
        rows: list[Row] = []
        try:
            for step, batch in enumerate(bundle, start=self.trainer.global_step + 1):
                if gradient is None:
                    optimizer.zero_grad()
                    self._loss(batch).backward()  # type: ignore[no-untyped-call]
                else:
                    inputs, targets = batch
                    predictions, residual = gradient(inputs, targets)
                    if every and step % every == 0:
                        mse = residual.square().sum(-1) / targets.shape[-1]
                        rows.append((self._errors_of(mse, predictions, targets, targets.shape[-1]), step - 1))
                optimizer.step()
                count.add()
                if schedule is not None:
                    schedule.step()
        finally:
            self._log_rows(rows)

    def _may_wait(self) -> bool:
        """Whether the steps can be computed together with those of other networks."""
        return self.replicas == 1 and is_elementwise(self.hparams["optimizer"]["name"]) and not self._is_watched()

    def _descend_together(self, member: Member, bundle: Bundle) -> None:
        """Have the steps computed together with those of other networks."""
        full_batch, before = bundle.full_batch(), self.trainer.global_step
        steps = Steps(
            hidden_weights=list(self.hidden_weights),
            output_weights=self.output_weights,
            negative_slope=float(self.hparams["negative_slope"]),
            optimizer=cast("torch.optim.Optimizer", self.optimizers(use_pl_optimizer=False)),
            options=self.hparams["optimizer"],
            schedule=self.lr_schedulers(),
            schedule_key=f"{self.hparams['schedule']} {self._total_steps}",
            full_batch=full_batch,
            batches=iter(bundle),
            left=bundle.num_steps,
            done=before,
            log_every=self.trainer.log_every_n_steps,  # type: ignore[attr-defined]
            threshold=self.threshold,
        )
        member.wait_for(steps)
        if steps.failure is not None:
            raise steps.failure
        finite = [(step, values) for step, values in steps.errors if math.isfinite(values[0])]
        diverged = [step for step, values in steps.errors if not math.isfinite(values[0])]
        done = (diverged or [steps.done])[0]
        StepCount(self.trainer).add(done - before)
        if full_batch is not None:
            bundle.count_repetitions(done - before - (not diverged))
        self._log_rows(
            [
                (dict(zip(("train/mse", "train/mce"), values, strict=False)), step)
                for step, values in finite
                if step <= done
            ]
        )
        if diverged:
            raise self._divergence([])

    def _is_watched(self) -> bool:
        """Whether something observes autograd: hooks of modules or weights, or anomaly detection."""
        return have_hooks(self.modules(), self.parameters()) or torch.is_anomaly_enabled()

    def _in_place_gradient(self) -> SquaredErrorGradient:
        hidden, output = list(self.hidden_weights), self.output_weights
        if self._gradient is None or not self._gradient.is_of(hidden, output):
            self._gradient = SquaredErrorGradient(hidden, output, float(self.hparams["negative_slope"]))
        return self._gradient

    def _loss(self, batch: Any) -> Tensor:
        """The sum of the replicas' MSEs on a batch; logged every ``log_every_n_steps`` steps."""
        inputs, targets = flat_batch(batch, replicated=self.replicas > 1)
        predictions = self(inputs)
        scale = self._samples_per_process(targets)
        squared_errors = (predictions - targets).square().sum(-1) / scale
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            errors = self._errors_of(squared_errors.detach(), predictions.detach(), targets, scale)
            self._log_rows([(errors, self.trainer.global_step)])
        loss: Tensor = squared_errors.sum()
        return loss

    def _samples_per_process(self, targets: Tensor) -> Tensor | float:
        """Number of samples of the batch over all processes, divided by the number of processes.

        Squared errors divided by it give a loss whose mean over the processes is the batch's MSE, whatever part of the
        batch each process has.
        """
        if self.trainer.world_size == 1:
            return targets.shape[-1]
        loader = self.trainer.train_dataloader
        if isinstance(loader, ExactLoader):  # it knows the size without communication
            return loader.size_of_batch / self.trainer.world_size
        count = self.output_weights.new_tensor(targets.shape[-1])
        return self.trainer.strategy.reduce(count, reduce_op="mean")

    def _errors_of(self, mse: Tensor, predictions: Tensor, targets: Tensor, scale: Tensor | float) -> dict[str, float]:
        """A batch's MSE and MCE, the means over replicas and processes, with one synchronisation with a GPU.

        Raises:
            DivergenceError: the MSE is not finite.
        """
        errors = {"train/mse": mse.mean()}
        if self.threshold is not None:
            mistakes = wrong(predictions, targets, self.threshold).sum(-1).to(mse.dtype) / scale
            errors["train/mce"] = mistakes.mean()
        if self.trainer.world_size > 1:
            errors = {name: self.trainer.strategy.reduce(value, reduce_op="mean") for name, value in errors.items()}
        values = dict(zip(errors, fetched(*errors.values()), strict=True))
        if not math.isfinite(values["train/mse"]):
            diverged = [replica for replica, value in enumerate(mse.reshape(-1).tolist()) if not math.isfinite(value)]
            raise self._divergence(diverged)
        return values

    def _divergence(self, replicas: Sequence[int]) -> DivergenceError:
        which = f" of replicas {replicas}" if self.replicas > 1 and replicas else ""
        return DivergenceError(
            f"training diverged: the MSE{which} is not finite after {self.trainer.global_step} steps. "
            "Lower the learning rate"
        )

    def _log_rows(self, rows: Sequence[Row]) -> None:
        """Log the errors of some steps, each with its number of steps; to Lightning, the last ones."""
        if rows:
            last = {name: torch.tensor(value, dtype=self.output_weights.dtype) for name, value in rows[-1][0].items()}
            self.log_dict(last, prog_bar=True, logger=False)
            log_rows(self.trainer, rows)

    @override
    def val_dataloader(self) -> NoLoaders:
        """What a fit uses that is given no samples for validation."""
        return NoLoaders()

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add_errors(batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add_errors(batch, dataloader_idx)

    @override
    def on_validation_epoch_start(self) -> None:
        self._errors = {}

    @override
    def on_test_epoch_start(self) -> None:
        self._errors = {}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_errors("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_errors("test")

    def _add_errors(self, batch: Any, loader: int) -> None:
        inputs, targets = flat_batch(batch, replicated=self.replicas > 1)
        check_batch(inputs, targets, int(self.hparams["input_dim"]), self.replicas)
        if loader not in self._errors:
            self._errors[loader] = ErrorSums(self.threshold, regression=bool(self.hparams["regression"]))
        self._errors[loader].add(self(inputs), targets)

    def _log_errors(self, stage: str) -> None:
        """Log the MSE and MCE of all samples of each loader, the means over replicas."""
        errors, self._errors = self._errors, {}
        means = {}
        for loader, sums in sorted(errors.items()):
            suffix = f"/dataloader_idx_{loader}" if len(errors) > 1 else ""
            for name, value in sums.means(self.trainer.strategy).items():
                means[f"{stage}/{name}{suffix}"] = value.mean().to(self.device, widest_dtype(self.device))
        fits = self.trainer.state.fn == "fit"
        options: dict[str, Any] = {"batch_size": 1, "sync_dist": True, "add_dataloader_idx": False}
        self.log_dict(means, prog_bar=True, logger=False if fits else None, **options)
        if fits and not self.trainer.sanity_checking:
            log_scalars(self.trainer, dict(means))  # with the number of this step, as all other values

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.parameters(), self.hparams["optimizer"])
        total_steps = self.trainer.estimated_stepping_batches
        if not self.automatic_optimization and math.isfinite(total_steps):
            total_steps = (self.trainer.max_epochs or 0) * cast("ExactLoader", self.trainer.train_dataloader).num_steps
        self._total_steps = total_steps
        schedule = build_schedule(optimizer, self.hparams["schedule"], total_steps)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """Those of the three callbacks of this package that the Trainer does not have yet."""
        if not self.hparams["default_callbacks"]:
            return []
        from lightning_mnn import callbacks  # noqa: PLC0415 (a floor up: Lightning asks the module for its callbacks)

        kinds = (callbacks.LocalMinimumDetector, callbacks.ActivationPatternRecorder, callbacks.AngularVolumeMonitor)
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in present)]

    @override
    def on_fit_start(self) -> None:
        """Check the training set before any work is done on it."""
        if self.trainer.world_size > 1 and needs_closure(self.hparams["optimizer"]["name"]):
            raise ValueError(
                "optimizer lbfgs runs on one process only, since its line search needs the whole loss: use devices=1"
            )
        load_training_data(self.trainer)  # now, not after on_train_start: the callbacks' first pass runs there
        if isinstance(loader := self.trainer.train_dataloader, ExactLoader):
            loader.trainer = self.trainer  # a loader without its data module does not know the Trainer
        self.threshold = check_training_set(
            self.trainer,
            input_dim=int(self.hparams["input_dim"]),
            replicas=self.replicas,
            threshold=self.hparams["threshold"],
            regression=bool(self.hparams["regression"]),
        )

    @override
    def on_train_start(self) -> None:
        """Check that a run that is resumed within an epoch counts its batches as before."""
        saved, self._saved_steps_per_batch = self._saved_steps_per_batch, None
        present = getattr(self.trainer.train_dataloader, "steps_per_batch", None)
        if saved is not None and saved != present:
            raise ValueError(
                f"the checkpoint was saved within an epoch by a run with {saved} steps per batch, and this one has "
                f"{present}: resume with the same callbacks and Trainer flags, or from the end of an epoch"
            )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the number of steps, whether or not steps are bundled now, and with the labels' threshold."""
        self._saved_steps_per_batch = checkpoint.get("steps_per_batch")
        if self.threshold is None:
            self.threshold = checkpoint.get("threshold")
        if "loops" in checkpoint:
            share_saved_step_count(checkpoint)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what training has found out; refuse weights that are not finite, which would replace valid ones."""
        checkpoint["threshold"] = self.threshold
        loader = self.trainer.train_dataloader
        if isinstance(loader, ExactLoader) and loader.state_dict()["next_batch"]:  # within an epoch
            checkpoint["steps_per_batch"] = loader.steps_per_batch
        finite = fetched(*(weights.isfinite().all() for weights in self.parameters()))
        for (name, _), is_finite in zip(self.named_parameters(), finite, strict=True):
            if not is_finite:
                raise DivergenceError(
                    f"training diverged: {name} is no longer finite after {self.trainer.global_step} steps, "
                    "no checkpoint was written. Lower the learning rate"
                )
