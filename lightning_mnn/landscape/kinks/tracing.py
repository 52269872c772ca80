"""KinkTrace: every piecewise-linear function that any module calls in a forward pass.

A *kink call* is one call of such a function: an ``nn.ReLU``, ``F.relu``, ``clamp``, ``maximum``, max-pooling and
similar functions. Each of its units (an entry of its output) lies on one of a few *pieces*. The function is affine on
each piece.
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

    Replace: TypeAlias = Callable[["Kink", Callable[..., Any], Sequence[Any], dict[str, Any]], Any]

Names: TypeAlias = "str | Sequence[str] | None"

# Modules that are a single function: the layer has the name of the module.
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
    """A pass gave no pattern, because of NaN, or one that cannot be compared, because the layers differ from before."""


class Kink:
    """One kink call, at the moment before the function runs.

    Use it immediately: an in-place function overwrites the input.

    Attributes:
        name: the layer: the path of a kink module (``features.3``), or that of the innermost module in whose forward a
            function is called, ``.F.`` and the function (``block.F.relu``); a second call of a name in one pass is
            ``….call_2``.
        function: name of the function, such as ``relu`` or ``max_pool2d``.
        num_pieces: number of pieces that a unit can be on.
        active_pieces: the pieces that count as active (ReLU: the upper one; ReLU6: the middle one), or None where the
            function has no active pieces, such as a maximum.
        input: the tensor that the function is called on.
        depends_on_weights: whether the input requires a gradient, so that it can change with the weights.
        source: the module that returned the input, None where no module did.
        source_input: the argument of that module; None unless it had exactly one positional argument.
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

        For an elementwise function the pieces are counted from below; a value on a breakpoint belongs to the lower
        piece, as in torch's ``relu``. For a maximum over k numbers the piece is the index of the largest.

        Raises:
            PatternError: an input is NaN.
        """
        pieces, is_nan = self.pieces_or_nan()
        check_numbers([self.name], [is_nan])
        return pieces

    def pieces_or_nan(self) -> tuple[Tensor, Tensor]:
        """The pieces, and whether an input is NaN, bool (), so that they are invalid; without a wait for a GPU."""
        # amax is 20 times faster than isnan().any()
        is_nan = self.input.amax().isnan() if self.input.numel() else torch.zeros((), dtype=torch.bool)
        return self._call.pieces(), is_nan

    def distance(self) -> Tensor:
        """Distance of each unit to the nearest kink, in units of the function's input, of the shape of its output.

        |x − b| to the nearest breakpoint b; for a maximum, the difference between the two largest numbers.
        """
        return self._call.distance()


def check_numbers(names: Sequence[str], are_nan: Sequence[Tensor]) -> None:
    """Check that no layer had a NaN input; the host waits once for a GPU.

    Args:
        names: names of the layers.
        are_nan: whether the input of each was NaN, bool ().

    Raises:
        PatternError: the input of a layer was NaN.
    """
    for name, is_nan in zip(names, fetched(*are_nan), strict=True):
        if is_nan:
            raise PatternError(f"the input of {name} contains NaN: a pattern is defined for numbers only")


class KinkTrace:
    """A context that passes each kink call of a forward pass to a function: ``with trace: module(inputs)`` per pass.

    A ``TorchFunctionMode`` catches calls in any form: modules, functions and methods of tensors. Modules compiled by
    ``torch.compile`` run as they were written. Nothing remains on the module afterwards. The trace cannot see inside
    fused operations of torch (``nn.RNN`` with ReLU), scripted modules, custom autograd functions, code within
    ``torch.vmap``, and kinks that come from comparisons. Calls inside metrics of torchmetrics are ignored.

    Args:
        module: the module; the names of its submodules give the names of the layers.
        on_kink: is called with each :class:`Kink`, without a gradient, before the function runs.
        modules: names or patterns (``*``, ``?``) of the layers to trace, or of modules that contain them; None: all.
        on_output: is called with each :class:`Kink` and what its function returned, without a gradient; None: nothing.
        replace: runs each function instead, with a gradient, and returns the result: it is called with the
            :class:`Kink`, the function of torch, its positional and its keyword arguments. None: functions run as
            usual.

    Attributes:
        names: layers found so far, in the order of the forward pass, without those that ``modules`` leaves out.
        left_out: layers found that ``modules`` leaves out.
        smooth: smooth nonlinear functions found: with them the module is not linear between its kinks.
        opaque: functions and modules found whose kinks cannot be seen.

    >>> found = []
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.Tanh())
    >>> with KinkTrace(net, lambda kink: found.append(kink.pieces().shape)) as trace:
    ...     _ = net(torch.randn(5, 2))
    >>> trace.names, found, trace.smooth
    (['1'], [torch.Size([5, 3])], {'tanh'})
    """

    def __init__(
        self,
        module: nn.Module,
        on_kink: Callable[[Kink], None],
        modules: Names = None,
        on_output: Callable[[Kink, Any], None] | None = None,
        replace: Replace | None = None,
    ) -> None:
        self.names: list[str] = []
        self.left_out: list[str] = []
        self.smooth: set[str] = set()
        self.opaque: set[str] = set()
        self._on_kink = on_kink
        self._on_output = on_output
        self._replace = replace
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
        """Start a pass."""
        self._within, self._output = [], None
        self._calls.clear()
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for part in self._parts:
                stack.callback(part.register_forward_pre_hook(self._enter_module).remove)
                stack.callback(part.register_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(_Mode(self._on_call, self._on_output, self._replace))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the pass, and remove all hooks and modes."""
        stack, self._stack, self._output = self._stack, None, None
        if stack is not None:
            stack.close()

    def _enter_module(self, module: nn.Module, _inputs: Any) -> None:
        self._within.append(module)

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        while self._within and self._within.pop() is not module:  # modules that an exception left on the stack
            pass
        self._output = (module, inputs[0] if len(inputs) == 1 else None, output)

    @torch.no_grad()
    def _on_call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Kink | None:
        """Inspect a call of torch, and pass it to ``on_kink`` if it has kinks; return what was passed."""
        if self._metrics and any(id(part) in self._metrics for part in self._within):
            return None
        if is_smooth(name, args, kwargs):
            self.smooth.add(name)
        if has_unseen_kinks(name, args, kwargs):
            self.opaque.add(name)
        if has_kinks(name) and any(map(_is_wrapped, (*args, *kwargs.values()))):
            self.opaque.add(f"{self._layer(name)} (within torch.vmap or torch.func)")
            return None
        call = function_of(name, args, kwargs)
        if call is None:
            return None
        layer = self._layer(name)
        if not self._wanted(layer):
            _note(self.left_out, layer)
            return None
        _note(self.names, layer)
        source = None
        if self._output is not None and self._output[2] is call.input:
            source = self._output[:2]
        kink = Kink(layer, name, call, source)
        self._on_kink(kink)
        return kink

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
    """Reports each call of torch before it runs, and what a kink call returns."""

    def __init__(
        self,
        on_call: Callable[[str, Sequence[Any], dict[str, Any]], Kink | None],
        on_output: Callable[[Kink, Any], None] | None,
        replace: Replace | None,
    ) -> None:
        super().__init__()
        self._on_call = on_call
        self._on_output = on_output
        self._replace = replace

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kink = self._on_call(getattr(func, "__name__", "").strip("_"), args, kwargs)
        if kink is not None and self._replace is not None:
            output = self._replace(kink, func, args, kwargs)
        else:
            output = func(*args, **kwargs)
        if kink is not None and self._on_output is not None:
            with torch.no_grad():
                self._on_output(kink, output)
        return output


def _is_wrapped(value: Any) -> bool:
    """Whether a tensor wraps another, as within ``torch.vmap``, so that its numbers cannot be read."""
    return isinstance(value, torch.Tensor) and is_functorch_tensor(value)


def _is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, tested without an import of torchmetrics."""
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(module).__mro__)


def _note(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
