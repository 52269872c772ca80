"""Is the loss that a module trains one of those that certificates of models cover, of its ``nn.Sequential``?

The loss of the module's own step and that of the ``nn.Sequential`` as a certificate reads it are compared on the whole
training set, in float64, with their gradients. So a penalty, weights of classes or samples, label smoothing and a
second term of the loss are found.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_mnn.callbacks.evidence.models.objective import ModelObjective, multiplications
from lightning_mnn.callbacks.evidence.models.reading import ModelAt, ModelPass, NotModelLossError, read_model
from lightning_mnn.callbacks.evidence.models.sequential import found_sequential
from lightning_mnn.callbacks.evidence.models.training_mode import reason_in_settings, reason_in_steps, samples_change
from lightning_mnn.callbacks.trainer.weight_decay import weight_decays
from lightning_mnn.landscape import tolerances
from lightning_mnn.utilities.compat.torch_internals import as_evaluated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytorch_lightning as pl

    from lightning_mnn.callbacks.evaluation.run_module import ModelFunction
    from lightning_mnn.landscape.minima.models.equations.layers import LossName

_NAMES: dict[LossName, str] = {
    "squared_error": "the mean squared error",
    "cross_entropy": "the cross-entropy",
    "logistic": "the logistic loss",
}


@dataclass(frozen=True)
class ModelLoss:
    """A module's loss that is a loss of its model's outputs up to constants: L = factor · ℓ + offset.

    Attributes:
        name: ℓ, the mean over samples.
        target: which tensor of a batch has the targets.
        one_hot: whether they are classes of which ℓ takes the one-hot vectors.
        factor: positive.
        offset: a constant.
        scale: size of the losses seen, for comparison.
        gradient_scale: size of their gradients.
        products: multiplications of a forward pass on one sample.
    """

    name: LossName
    target: int
    one_hot: bool
    factor: float
    offset: float
    scale: float
    gradient_scale: float
    products: int

    def targets(self, tensors: Sequence[Tensor], outputs: int) -> Tensor | None:
        """The targets of the loss in the tensors of a batch; None if there are none."""
        if self.target >= len(tensors):
            return None
        return dict(_forms(self.name, tensors[self.target], outputs)).get(self.one_hot)

    def expected(self, model: ModelAt) -> tuple[Tensor, float, float] | None:
        """A model's outputs on a batch, the loss L there, and the size of losses; None: its targets do not fit."""
        targets = self.targets(model.samples.tensors, model.outputs())
        found = None if targets is None else model.loss(self.name, targets)
        if found is None:
            return None
        part = self.factor * float(found[1])
        return found[0], part + self.offset, self.scale


def model_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None = None
) -> ModelLoss | str | None:
    """The loss of a module's model and its constants, or the reason why certificates do not cover what it trains.

    None: it has no ``nn.Sequential`` with all its trained weights.

    Only the first batches are read, which are enough to reject most other losses: :func:`whole_model_loss` has the last
    word, before the first certificate.

    Raises:
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    if found_sequential(trainer, pl_module) is None:
        return None
    if (reason := reason_in_settings(trainer, pl_module, loss_fn)) is not None:
        return reason
    try:
        read = read_model(trainer, pl_module, loss_fn, tolerances.FAR_STEP_RATIO, first=True)
        if not read.gradient.any():  # for example of one sample without an active unit
            read = read_model(trainer, pl_module, loss_fn, tolerances.FAR_STEP_RATIO)
        return _matched(read)
    except NotModelLossError as error:
        return str(error)


def whole_model_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: ModelFunction | None = None
) -> ModelLoss:
    """The loss of a module's model on the whole training set, whose samples must be the same each time.

    Losses and gradients are compared at the weights plus noise of a tenth of their size, since at a minimum all
    gradients vanish.

    Raises:
        NotModelLossError: certificates do not cover what it trains.
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    if samples_change(trainer):
        raise NotModelLossError("the samples of the training set differ each time that they are read")
    return _matched(read_model(trainer, pl_module, loss_fn, tolerances.FAR_STEP_RATIO))


def objective_of(
    trainer: pl.Trainer, pl_module: pl.LightningModule, fitted: ModelLoss, loss_fn: ModelFunction | None = None
) -> ModelObjective:
    """The objective at the present weights, after a test that the loss is still the one that was found.

    They are compared at a relative distance of 1e-6 from the weights, where torch's gradients are not those of one side
    of a kink.

    Raises:
        NotModelLossError: it is not.
        LossNotEvaluableError: the loss cannot be evaluated.
    """
    if (reason := reason_in_settings(trainer, pl_module, loss_fn)) is not None:
        raise NotModelLossError(reason)
    read = read_model(trainer, pl_module, loss_fn, tolerances.NEAR_STEP_RATIO)
    targets = fitted.targets(read.model.samples.tensors, read.model.outputs())
    if targets is None or not _agrees(fitted, read, targets):
        raise NotModelLossError(
            f"the loss that it trains is {_NAMES[fitted.name]} of its model at some weights only, and not here"
        )
    if (reason := reason_in_steps(trainer, pl_module, fitted.expected, loss_fn)) is not None:
        raise NotModelLossError(reason)
    sequential = found_sequential(trainer, pl_module)
    assert isinstance(sequential, nn.Sequential)  # noqa: S101 (it was just read)
    names = {id(parameter): name for name, parameter in sequential.named_parameters()}
    decays = weight_decays(trainer) if loss_fn is None else []
    return ModelObjective(
        module=deepcopy(as_evaluated(sequential)).cpu(),  # type: ignore[arg-type]
        inputs=read.model.samples.inputs,
        targets=targets,
        loss=fitted.name,
        weight_decay={names[id(p)]: decay / fitted.factor for p, decay in decays if id(p) in names},
        frozen=read.model.frozen,
        factor=fitted.factor,
        offset=fitted.offset,
    )


def _matched(read: ModelPass) -> ModelLoss:
    """The loss whose gradient is parallel to the module's.

    Raises:
        NotModelLossError: there is none.
    """
    closest, norm = torch.inf, float(read.gradient.norm())
    for name, target, one_hot, targets in _candidates(read.model):
        found = read.model.loss(name, targets)
        if found is None:
            continue
        _, loss, gradient = found
        factor = float(read.gradient @ gradient / gradient.square().sum().clamp(min=1e-300))
        distance = float((read.gradient - factor * gradient).norm()) / max(norm, 1e-300)
        if factor > 0 and distance <= tolerances.MAX_EQUAL_DIFFERENCE_RATIO:
            factor = _simple(factor)
            part = factor * float(loss)
            offset = read.loss - part
            if abs(offset) <= tolerances.MAX_EQUAL_DIFFERENCE_RATIO * abs(part):
                offset = 0.0
            products = multiplications(read.model.module, read.model.samples.inputs[:1])
            return ModelLoss(
                *(name, target, one_hot, factor, offset),
                scale=max(abs(read.loss), abs(part)),
                gradient_scale=norm,
                products=products,
            )
        closest = min(closest, distance) if factor > 0 else closest
    raise NotModelLossError(
        "the loss that it trains is not the mean squared error, the cross-entropy or the logistic loss of its model: "
        f"none of their gradients is parallel to its own (the closest differs by {closest:.1e}), as with a penalty in "
        "the loss, several losses, weights of samples or classes, label smoothing, predictions (N, 1) with targets "
        "(N,), which broadcast to (N, N), or a sum instead of the mean over batches of several sizes"
    )


def _simple(factor: float) -> float:
    """The simple fraction that a factor is up to rounding, as 1/K of a mean over outputs; else the factor."""
    simple = float(Fraction(factor).limit_denominator(10_000))
    return simple if abs(simple - factor) <= tolerances.MAX_EQUAL_DIFFERENCE_RATIO * factor else factor


def _candidates(model: ModelAt) -> Iterator[tuple[LossName, int, bool, Tensor]]:
    outputs = model.outputs()
    for name in _NAMES:
        for target, tensor in enumerate(model.samples.tensors):
            for one_hot, targets in _forms(name, tensor, outputs):
                yield name, target, one_hot, targets


def _forms(name: LossName, tensor: Tensor, outputs: int) -> Iterator[tuple[bool, Tensor]]:
    """What a tensor of a batch can be as targets, (N, K) or classes (N,), and whether it is a one-hot vector."""
    flat = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    if flat.shape[1] == outputs and (name != "cross_entropy" or outputs > 1):
        yield False, flat.double()
    elif flat.shape[1] == 1 and outputs > 1 and name != "logistic":
        classes = flat[:, 0].long()
        if bool((classes == flat[:, 0]).all()) and int(classes.min()) >= 0 and int(classes.max()) < outputs:
            one_hot = name == "squared_error"
            yield one_hot, nn.functional.one_hot(classes, outputs).double() if one_hot else classes


def _agrees(fitted: ModelLoss, read: ModelPass, targets: Tensor) -> bool:
    found = read.model.loss(fitted.name, targets)
    if found is None:
        return False
    expected = fitted.factor * float(found[1]) + fitted.offset
    scale, equal = max(fitted.scale, abs(read.loss), abs(expected)), tolerances.MAX_EQUAL_DIFFERENCE_RATIO
    off = float((read.gradient - fitted.factor * found[2]).norm())
    return abs(read.loss - expected) <= equal * scale and off <= equal * fitted.gradient_scale
