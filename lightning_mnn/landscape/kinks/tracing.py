"""KinkTrace: every piecewise-linear function that a module calls in a forward pass, whoever wrote the module.

A *kink call* is one call of such a function: an ``nn.ReLU``, ``F.relu``, ``clamp``, ``maximum``, max-pooling and their
kin. Each of its units (an entry of its output) lies on one of a few *pieces*, on each of which the function is affine.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_mnn.landscape.kinks.functions import function_of, has_kinks, has_unseen_kinks, is_smooth
from lightning_mnn.utilities.compat.torch_internals import is_functorch_tensor, named_modules_as_written
from lightning_mnn.utilities.transfer import fetched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from torch import Tensor

    from lightning_mnn.landscape.kinks.pieces import Function

Names: TypeAlias = "str | Sequence[str] | None"

# Modules that are one function: their name is the layer's.
KINK_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Threshold,
    nn.ELU,
    nn.SELU,
    nn.L1Loss,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)


class PatternError(ValueError):
    """A pass gave no pattern, or one that is not comparable with the others: of NaN, or of other layers than before."""


class Kink:
    """One kink call, at the moment before the function runs.

    It is to be used at once: a function that works in place overwrites the input.

    Attributes:
        name: the layer: the path of a kink module (``features.3``), or that of the innermost module in whose forward a
            function is called, ``.F.`` and the function (``block.F.relu``); a second call of a name in one pass is
            ``….call_2``.
        function: name of the function, such as ``relu`` or ``max_pool2d``.
        num_pieces: pieces that a unit can be on.
        active_pieces: those that count as active (ReLU: the upper one; ReLU6: the middle one), or None where none is
            set apart, as in a maximum.
        input: the tensor that the function is called on.
        depends_on_weights: whether the input requires a gradient, so that it can change with the weights.
        source: the module whose output the input is, None where it is nobody's.
        source_input: what that module was called on; None where that is not one tensor.
    """

    def __init__(self, name: str, function: str, call: Function, source: tuple[nn.Module, Any] | None) -> None:
        self.name = name
        self.function = function
        self.num_pieces = call.num_pieces
        self.active_pieces = call.active_pieces
        self.input = call.input
        self.depends_on_weights = call.requires_grad
        self.source: nn.Module | None = source[0] if source else None
        self.source_input: Any = source[1] if source else None
        self._call = call

    def pieces(self) -> Tensor:
        """Piece of each unit, integers from 0 to ``num_pieces`` − 1, of the shape of the function's output.

        Of an elementwise function the pieces are counted from below, a value on a breakpoint to the lower one, as in
        torch's ``relu``. Of a maximum over k numbers the piece is the index of the largest.

        Raises:
            PatternError: an input is NaN.
        """
        pieces, is_nan = self.pieces_or_nan()
        check_numbers([self.name], [is_nan])
        return pieces

    def pieces_or_nan(self) -> tuple[Tensor, Tensor]:
        """The same, and whether an input is NaN, bool (), so that they say nothing: no GPU is waited for."""
        # amax is 20 times faster than isnan().any()
        is_nan = self.input.amax().isnan() if self.input.numel() else torch.zeros((), dtype=torch.bool)
        return self._call.pieces(), is_nan

    def distance(self) -> Tensor:
        """Distance of each unit to the nearest kink, in units of the function's input, of the shape of its output.

        |x − b| to the nearest breakpoint b; of a maximum the difference of the largest number and the second.
        """
        return self._call.distance()


def check_numbers(names: Sequence[str], are_nan: Sequence[Tensor]) -> None:
    """Check that no layer has met NaN; a GPU is waited for once.

    Args:
        names: of the layers.
        are_nan: whether each has, bool ().

    Raises:
        PatternError: one has.
    """
    for name, is_nan in zip(names, fetched(*are_nan), strict=True):
        if is_nan:
            raise PatternError(f"the input of {name} contains NaN: a pattern is defined for numbers only")


class KinkTrace:
    """Hands each kink call of a forward pass to a function: ``with trace: module(inputs)``, once for each pass.

    Calls are met in whatever way they are written: as modules, as functions, as methods of tensors (by a
    ``TorchFunctionMode``); modules that ``torch.compile`` made faster run as they were written. Nothing stays
    behind on the module. What cannot be seen is what torch does in one piece (``nn.RNN`` with ReLU), scripted
    modules, custom autograd functions, what runs within ``torch.vmap``, and kinks that are made of comparisons.
    What metrics of torchmetrics call is passed over.

    Args:
        module: its submodules' names are those of the layers.
        on_kink: what is called with each :class:`Kink`, without a gradient, before the function runs.
        modules: names or patterns (``*``, ``?``) of the layers to hand on, or of modules whose layers are; None: all.

    Attributes:
        names: layers met so far, in the order of the forward pass, those that ``modules`` leaves out excepted.
        left_out: layers met that ``modules`` leaves out.
        smooth: smooth nonlinear functions met: between the kinks the module is not linear where it has them.
        opaque: what was met whose kinks cannot be seen.

    >>> found = []
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Tanh())
    >>> with KinkTrace(net, lambda kink: found.append(kink.pieces().shape)) as trace:
    ...     _ = net(torch.randn(5, 2))
    >>> trace.names, found, trace.smooth
    (['1'], [torch.Size([5, 3])], {'tanh'})
    """

    def __init__(self, module: nn.Module, on_kink: Callable[[Kink], None], modules: Names = None) -> None:
        self.names: list[str] = []
        self.left_out: list[str] = []
        self.smooth: set[str] = set()
        self.opaque: set[str] = set()
        self._on_kink = on_kink
        self._patterns = (modules,) if isinstance(modules, str) else None if modules is None else tuple(modules)
        self._parts: list[nn.Module] = []  # the hash of a metric is not that of an object
        self._paths: dict[int, str] = {}
        for path, part in named_modules_as_written(module):
            if isinstance(part, torch.jit.ScriptModule):
                self.opaque.add(f"{path or type(part).__name__} (scripted)")
            else:
                self._parts.append(part)
                self._paths[id(part)] = path
        self._metrics = {id(part) for part in module.modules() if _is_metric(part)}
        self._within: list[nn.Module] = []
        self._output: tuple[nn.Module, Any, Any] | None = None  # the last module that ended, its input, its output
        self._calls: Counter[str] = Counter()
        self._stack: ExitStack | None = None

    def __enter__(self) -> Self:
        """Begin a pass."""
        self._within, self._output = [], None
        self._calls.clear()
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for part in self._parts:
                stack.callback(part.register_forward_pre_hook(self._enter_module).remove)
                stack.callback(part.register_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(_Mode(self._met))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the pass, and take everything back."""
        stack, self._stack, self._output = self._stack, None, None
        if stack is not None:
            stack.close()

    def _enter_module(self, module: nn.Module, _inputs: Any) -> None:
        self._within.append(module)

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        while self._within and self._within.pop() is not module:  # what an exception left there
            pass
        self._output = (module, inputs[0] if len(inputs) == 1 else None, output)

    @torch.no_grad()
    def _met(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Look at a call of torch, and hand it on if it has kinks."""
        if self._metrics and any(id(part) in self._metrics for part in self._within):
            return
        if is_smooth(name, args, kwargs):
            self.smooth.add(name)
        if has_unseen_kinks(name, args, kwargs):
            self.opaque.add(name)
        if has_kinks(name) and any(map(_is_wrapped, (*args, *kwargs.values()))):
            self.opaque.add(f"{self._layer(name)} (within torch.vmap or torch.func)")
            return
        call = function_of(name, args, kwargs)
        if call is None:
            return
        layer = self._layer(name)
        if not self._wanted(layer):
            _note(self.left_out, layer)
            return
        _note(self.names, layer)
        source = None
        if self._output is not None and self._output[2] is call.input:
            source = self._output[:2]
        self._on_kink(Kink(layer, name, call, source))

    def _layer(self, function: str) -> str:
        path = self._paths[id(self._within[-1])] if self._within else ""
        own = bool(path) and isinstance(self._within[-1], KINK_MODULES)
        name = path if own else f"{path}.F.{function}".removeprefix(".")
        self._calls[name] += 1
        return name if self._calls[name] == 1 else f"{name}.call_{self._calls[name]}"

    def _wanted(self, layer: str) -> bool:
        if self._patterns is None:
            return True
        names = {layer, layer.rpartition(".call_")[0] or layer}
        return any(
            layer.startswith(f"{pattern}.") or any(fnmatchcase(name, pattern) for name in names)
            for pattern in self._patterns
        )


class _Mode(TorchFunctionMode):
    """Tells of each call of torch before it happens."""

    def __init__(self, met: Callable[[str, Sequence[Any], dict[str, Any]], None]) -> None:
        super().__init__()
        self._met = met

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._met(getattr(func, "__name__", "").strip("_"), args, kwargs)
        return func(*args, **kwargs)


def _is_wrapped(value: Any) -> bool:
    """Whether a tensor stands for others, as within ``torch.vmap``, so that its numbers cannot be looked at."""
    return isinstance(value, torch.Tensor) and is_functorch_tensor(value)


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, which need not be imported for that."""
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(module).__mro__)


def _note(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
