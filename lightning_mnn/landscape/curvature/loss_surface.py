"""LossSurface: a full-batch loss as a function of the parameters, with its gradient and Hessian–vector products."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from lightning_mnn.landscape.operators import LinearOperator
from lightning_mnn.utilities.compat.precision import full_precision
from lightning_mnn.utilities.compat.torch_internals import without_derivative
from lightning_mnn.utilities.distributed import ProcessGroup
from lightning_mnn.utilities.interruption import Interrupted, alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    Parts: TypeAlias = Callable[[], Iterable[tuple[float, Callable[[], Tensor]]]]


class NoDerivativeError(RuntimeError):
    """The loss cannot be differentiated once, or not twice; the message states where it failed."""


class LossSurface:
    """L(θ) = Σ_b c_b L_b(θ), the sum over the parts of all processes of a group, each sample once.

    A gradient or a product evaluates the parts one by one, so it needs the memory of one part. Sums over parts are
    computed in float64. Fields ``.grad`` are not changed. Attention and recurrent layers use implementations that can
    be differentiated twice, compiled modules run as they were written, and products of float32 use its full precision.
    Parameters that do not require a gradient, or that no part depends on, have the gradient 0 and rows of zeros in the
    Hessian.

    Non-reentrant checkpointing (``torch.utils.checkpoint``) can be differentiated twice. Reentrant checkpointing
    cannot, and neither can functions that torch can differentiate only once: :class:`NoDerivativeError`.

    Args:
        parameters: θ, of one dtype (float32 or float64) and on one device; flat vectors are in this order.
        parts: returns the pairs (c_b, L_b), where L_b() is the loss of a part, a tensor of one number. It is called
            again for each gradient and product, and must give the same loss each time.
        process_group: the processes; each calls the same methods in the same order.
        normalise: divide the c_b by their sum, which need not be known before a pass.

    Attributes:
        parameters: θ.
        size: n, the number of entries of θ.
        dtype: that of θ.
        device: that of θ.
        process_group: the processes.
        normalise: whether the c_b are divided by their sum.

    Raises:
        ValueError: there are no parameters, one occurs twice, or they have several dtypes or devices.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> surface = LossSurface([theta], lambda: [(0.5, lambda: theta.square().sum()), (1.0, lambda: theta[0] ** 3)])
    >>> surface.value_and_gradient()
    (3.5, tensor([4., 2.]))
    >>> surface.product(torch.tensor([1.0, 1.0]))
    tensor([7., 1.])
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        parts: Parts,
        process_group: ProcessGroup | None = None,
        *,
        normalise: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("parameters must not be empty")
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise ValueError("parameters must not contain a tensor twice")
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters}
        if len(kinds) > 1:
            raise ValueError(f"parameters must share one dtype and one device, got {sorted(map(str, kinds))}")
        self.dtype, self.device = kinds.pop()
        if self.dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"parameters must be float32 or float64, got {self.dtype}")
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.process_group = ProcessGroup() if process_group is None else process_group
        self._parts = parts
        self.normalise = normalise
        self._free = [parameter for parameter in self.parameters if parameter.requires_grad]

    def loss(self) -> float:
        """L(θ). Its parts may use gradients, for example with respect to the inputs."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)

        def add_local_parts() -> None:
            for weight, part in self._parts():
                total[0] += weight * _scalar(part()).detach()
                total[1] += weight

        self.on_all(add_local_parts)
        return float(self._over_all(total)[0])

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L(θ) and its gradient (n,), in the parameters' dtype.

        Raises:
            NoDerivativeError: the loss cannot be differentiated, or depends on none of the parameters.
        """
        value, gradient = self._sum(self._differentiate)
        return float(value), gradient

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian of L at θ times a vector (n,), in the parameters' dtype.

        If L has a kink at θ, it is the Hessian of the piece that torch's derivative belongs to.

        Raises:
            ValueError: the vector has another shape.
            NoDerivativeError: the loss cannot be differentiated twice, or depends on none of the parameters.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"vector must have the shape ({self.size},) of the parameters, got {tuple(vector.shape)}")
        pieces = self._split(vector.to(self.dtype))
        return self._sum(lambda loss: self._differentiate_twice(loss, pieces))[1]

    @property
    def hessian(self) -> Hessian:
        """The Hessian at θ, as a symmetric operator with :meth:`product`."""
        return Hessian(self)

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[None]:
        """A context in which parameters that require a gradient are moved by a step (n,); then they are restored."""
        originals = [parameter.detach().clone() for parameter in self._free]
        try:
            with torch.no_grad():
                for parameter, piece in zip(self._free, self._split(step), strict=True):
                    parameter.add_(piece)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self._free, originals, strict=True):
                    parameter.copy_(old)

    def _split(self, vector: Tensor) -> list[Tensor]:
        """The pieces of a flat vector for parameters that require a gradient, in their shapes."""
        pieces = vector.split_with_sizes([parameter.numel() for parameter in self.parameters])
        pairs = zip(pieces, self.parameters, strict=True)
        return [piece.view_as(parameter) for piece, parameter in pairs if parameter.requires_grad]

    def _sum(self, derivative: Callable[[Tensor], Sequence[Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Σ c_b L_b and Σ c_b derivative(L_b), flat, summed in float64 over all processes; the host reads no value."""
        total = torch.zeros(self.size + 2, dtype=torch.float64, device=self.device)
        slots, value, weights = self._split(total[:-2]), total[-2], total[-1]
        depends = False

        def add_local_parts() -> None:
            nonlocal depends
            for weight, part in self._parts():
                loss = _scalar(part())
                value.add_(weight * loss.detach())
                weights.add_(weight)
                if not loss.requires_grad:
                    continue
                for slot, gradient in zip(slots, derivative(loss), strict=True):
                    if gradient is not None:
                        depends = True
                        slot.add_(gradient.detach(), alpha=weight)

        self.on_all(add_local_parts)
        if not self.process_group.any([depends], self.device)[0]:
            raise NoDerivativeError(
                "the loss depends on none of the parameters: it must be returned with its graph, not detached"
            )
        total = self._over_all(total)
        return total[-1], total[:-1].to(self.dtype)

    def on_all(self, evaluate: Callable[[], None]) -> None:
        """Evaluate this process's parts, so that they can be differentiated twice.

        An error in one process is raised in all, because the others would wait.
        """
        failure: Exception | Interrupted | None = None
        try:
            with alone(), _evaluable(), torch.inference_mode(mode=False), torch.enable_grad():
                evaluate()
        except (Exception, Interrupted) as error:  # noqa: BLE001 (of any kind)
            failure = error
        (failed,) = self.process_group.any([failure is not None], self.device)
        if failed:
            self.process_group.raise_any(failure)

    def _over_all(self, total: Tensor) -> Tensor:
        """The sums over all processes, without the last one: the sum of the weights c_b, a divisor if ``normalise``."""
        total = self.process_group.sum(total)
        return total[:-1] / total[-1] if self.normalise else total[:-1]

    def _differentiate(self, loss: Tensor) -> Sequence[Tensor | None]:
        return gradient_of(loss, self._free, "the loss cannot be differentiated with respect to its parameters")

    def _differentiate_twice(self, loss: Tensor, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        reason = "the loss cannot be differentiated twice with respect to its parameters"
        first = gradient_of(loss, self._free, reason, create_graph=True)
        products = [
            (gradient * piece).sum()
            for gradient, piece in zip(first, pieces, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not products:  # a loss that is linear in the parameters
            return [None if gradient is None else torch.zeros_like(gradient) for gradient in first]
        total = torch.stack(products).sum()
        second = gradient_of(total, self._free, reason)
        return [
            torch.zeros_like(old) if new is None and old is not None else new
            for old, new in zip(first, second, strict=True)
        ]


@dataclass(frozen=True)
class Hessian(LinearOperator):
    """The Hessian of a loss at its parameters, which may move."""

    surface: LossSurface

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.surface.size, self.surface.size

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.surface.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.surface.device

    @override
    def apply(self, vector: Tensor) -> Tensor:
        return self.surface.product(vector)

    adjoint = apply


def gradient_of(
    output: Tensor,
    parameters: Sequence[Tensor],
    reason: str,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Sequence[Tensor | None]:
    """The gradient by each parameter, None where the output does not depend on it.

    Raises:
        NoDerivativeError: there is none; the message begins with the reason.
    """
    obstacle = without_derivative(output)
    if obstacle is not None:
        raise NoDerivativeError(f"{reason}: {obstacle}")
    try:
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            output, parameters, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoDerivativeError(f"{reason}: {error}") from error
    return gradients


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"the loss of a part must be one number, got the shape {tuple(loss.shape)}")
    return loss.reshape(())


@contextmanager
def _evaluable() -> Iterator[None]:
    """A context with the full precision of float32 and implementations that can be differentiated twice.

    That is attention by plain matrix products, modules as written, and no cuDNN (its recurrent layers can be
    differentiated only once).
    """
    enabled = torch.backends.cudnn.enabled
    with ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "enabled", enabled)
        torch.backends.cudnn.enabled = False
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(full_precision())
        yield
