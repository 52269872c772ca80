"""Optimisers and learning-rate schedules by name, from plain values that configs and checkpoints can contain."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from typing_extensions import override

from lightning_mnn.utilities.validation import ArgumentError, one_of, positive_integer, real_number, truth_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class Adam(torch.optim.Adam):
    """torch's Adam, whose fused step on a CPU calls the kernel directly: half the time for small weights.

    State, arguments and numbers are torch's. It leaves out the checks, at each step, on which device the weights are
    and whether an accelerator is capturing a graph.
    """

    @torch.no_grad()
    @override
    def step(self, closure: Any = None) -> Any:
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        direct = closure is None and not scaled and all(map(self._can_call_kernel, self.param_groups))
        if not direct:
            return _without_hooks(torch.optim.Adam.step)(self, closure)
        for group in self.param_groups:
            weights = group["params"]
            if not weights:
                continue
            states = [self.state[p] for p in weights]
            counts = [state["step"] for state in states]
            torch._foreach_add_(counts, 1)
            torch._fused_adam_(
                weights,
                [p.grad for p in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                counts,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
                grad_scale=None,
                found_inf=None,
            )
        return None

    def _can_call_kernel(self, group: dict[str, Any]) -> bool:
        return (
            bool(group["fused"])
            and not group["amsgrad"]
            and not group["differentiable"]
            and not group.get("decoupled_weight_decay", False)  # torch's fused step uses another kernel for it
            and isinstance(group["lr"], float)
            and all(p.device.type == "cpu" and p.grad is not None and p in self.state for p in group["params"])
        )


def _without_hooks(step: Any) -> Any:
    """Torch's step without its hooks: the step that calls it has them."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam)  # which needs sparse gradients
} | {"adam": Adam}

_ELEMENTWISE = frozenset(
    ("adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd")
)


def is_elementwise(name: str) -> bool:
    """Whether an optimiser moves each weight by its own gradients alone, so that replicas do not affect one another."""
    return name.lower() in _ELEMENTWISE


def needs_closure(name: str) -> bool:
    """Whether a step of an optimiser evaluates the loss itself."""
    return name.lower() == "lbfgs"


def build_optimizer(parameters: Iterable[torch.nn.Parameter], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser of ``torch.optim`` that ``options["name"]`` names, with the other options as its arguments.

    Capitals do not matter: "adamw" is ``torch.optim.AdamW``. Parameters that require no gradient are left out.

    Raises:
        ArgumentError: an unknown name or argument, or a value out of its range.

    >>> weights = [torch.nn.Parameter(torch.zeros(2))]
    >>> build_optimizer(weights, {"name": "sgd", "lr": 0.1, "momentum": 0.9}).defaults["momentum"]
    0.9
    """
    name, arguments = _split("optimizer", options, OPTIMIZERS)
    known = inspect.signature(OPTIMIZERS[name]).parameters
    for key, value in arguments.items():
        arguments[key] = _checked_option(key, value, known[key].default)
    if name == "sgd" and arguments.get("nesterov") and (not arguments.get("momentum") or arguments.get("dampening")):
        raise ArgumentError(
            "optimizer.nesterov", arguments["nesterov"], "needs a momentum above 0, and no dampening", "or choose false"
        )
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        return OPTIMIZERS[name](trained, **arguments)
    except (ValueError, RuntimeError) as error:  # torch's own checks of the values and of the shapes
        remedy = 'or freeze the others, as in model.frozen=["output_weights"]' if name == "muon" else "or leave it out"
        raise ArgumentError("optimizer", dict(options), f"is refused by torch: {error}", remedy) from error


def _checked_option(key: str, value: Any, default: Any) -> Any:
    """An argument of an optimiser, of the type of torch's default; where that is None, None is also allowed."""
    name = f"optimizer.{key}"
    if value is None and default is None:
        return None
    if isinstance(default, tuple):
        return _checked_numbers(name, value, default)
    if key in _WORDS:
        return one_of(name, value, _WORDS[key])
    if key in _WHOLE_NUMBERS:
        return positive_integer(name, value)
    if isinstance(default, bool) or key in _SWITCHES:
        return truth_value(name, value)
    return real_number(name, value) if key in _SIGNED else real_number(name, value, at_least=0)


_WORDS = {
    "line_search_fn": (None, "strong_wolfe"),
    "adjust_lr_fn": (None, "original", "match_rms_adamw"),
}
_SIGNED = ("beta2_decay",)
_WHOLE_NUMBERS = ("max_iter", "max_eval", "history_size", "ns_steps")
_SWITCHES = ("foreach", "fused")  # torch's default for them is None


def _checked_numbers(name: str, value: Any, default: tuple[Any, ...]) -> tuple[Any, ...]:
    betas = name.endswith("betas")
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(default):
        problem = f"must be {_COUNTS[len(default)]} numbers" + (", at least 0 and below 1" if betas else "")
        raise ArgumentError(name, value, problem, f"as {list(default)}")
    for number, usual in zip(value, default, strict=True):
        if betas:
            real_number(name, number, at_least=0, below=1)
        elif not (number is None and usual is None):
            real_number(name, number)
    return tuple(value)


_COUNTS = {2: "two", 3: "three"}


def build_schedule(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], total_steps: float
) -> LRScheduler | None:
    """The learning-rate schedule ``options["name"]``, stepped once per optimiser step; None for a constant rate.

    Args:
        optimizer: the optimiser whose learning rate is the peak rate.
        options: ``name`` and the arguments of that schedule: constant, exponential_tail, one_cycle, or a class of
            ``torch.optim.lr_scheduler`` (capitals do not matter), as "CosineAnnealingLR". A length that such a class
            needs (``T_max``, ``total_steps``, ``total_iters``) is that of the run, unless it is given.
        total_steps: length of the run in optimiser steps.

    Raises:
        ArgumentError: an unknown name or argument, a value out of its range, or a schedule that needs the run's length
            when that is not known.

    >>> optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], {"name": "sgd", "lr": 0.1})
    >>> build_schedule(optimizer, {"name": "CosineAnnealingLR"}, total_steps=50).T_max
    50
    """
    name, arguments = _split("schedule", options, SCHEDULES | _torch_schedules())
    if name not in SCHEDULES:
        return _torch_schedule(optimizer, name, arguments, total_steps)
    factor = SCHEDULES[name](**arguments)
    if name == "constant":
        return None
    _check_length(name, total_steps)
    return LambdaLR(optimizer, lambda step: factor(min(step / max(total_steps, 1), 1.0)))


def _torch_schedules() -> dict[str, type[LRScheduler]]:
    """The schedules of torch that plain values describe and that need no metric."""
    others = ("LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
    return {
        name.lower(): kind
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and not name.startswith("_") and name not in others
    }


def _torch_schedule(
    optimizer: torch.optim.Optimizer, name: str, arguments: dict[str, Any], total_steps: float
) -> LRScheduler:
    kind = _torch_schedules()[name]
    known = inspect.signature(kind).parameters
    for length in ("T_max", "total_steps", "total_iters"):
        if length in known and length not in arguments and "epochs" not in arguments:
            _check_length(name, total_steps)
            arguments[length] = max(int(total_steps), 1)
    if "max_lr" in known:
        arguments.setdefault("max_lr", optimizer.param_groups[0]["lr"])
    try:
        return kind(optimizer, **arguments)
    except (ValueError, TypeError) as error:
        raise ArgumentError("schedule", {"name": name, **arguments}, f"is refused by torch: {error}") from error


def _check_length(name: str, total_steps: float) -> None:
    if not math.isfinite(total_steps):
        remedy = "set max_epochs or max_steps of the Trainer, or choose constant"
        raise ArgumentError("schedule.name", name, "needs the length of the run", remedy)


def constant() -> Callable[[float], float]:
    """The peak rate throughout."""
    return lambda _: 1.0


def exponential_tail(hold: float = 0.5, final_factor: float = 1e-5) -> Callable[[float], float]:
    """The peak rate for the fraction ``hold`` of the run, then exponential decay to ``final_factor`` times it.

    With ``hold`` = 0.5 this is the schedule of the paper's Figure 5.2.

    >>> [round(exponential_tail()(t), 6) for t in (0.0, 0.5, 0.6, 1.0)]
    [1.0, 1.0, 0.1, 1e-05]
    """
    real_number("hold", hold, at_least=0, below=1)
    real_number("final_factor", final_factor, above=0, at_most=1)
    return lambda t: final_factor ** max(0.0, (t - hold) / (1 - hold))


def one_cycle(warmup: float = 0.1, start_factor: float = 0.1, final_factor: float = 0.0) -> Callable[[float], float]:
    """Linear rise from ``start_factor`` to 1 over the fraction ``warmup``, then a half cosine down to ``final_factor``.

    >>> [round(one_cycle()(t), 3) for t in (0.0, 0.1, 0.55, 1.0)]
    [0.1, 1.0, 0.5, 0.0]
    """
    real_number("warmup", warmup, at_least=0, below=1)
    real_number("start_factor", start_factor, at_least=0)
    real_number("final_factor", final_factor, at_least=0)

    def factor(t: float) -> float:
        if t < warmup:
            return start_factor + (1 - start_factor) * t / warmup
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup))) / 2

    return factor


SCHEDULES: dict[str, Callable[..., Callable[[float], float]]] = {
    "constant": constant,
    "exponential_tail": exponential_tail,
    "one_cycle": one_cycle,
}


def _split(kind: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name, in lower case, and arguments; both are known."""
    arguments = dict(options)
    given = arguments.pop("name", None)
    name = given.lower() if isinstance(given, str) else given
    if name not in known:
        raise ArgumentError(f"{kind}.name", given, f"must be one of {', '.join(sorted(known))}")
    known_arguments = [
        key for key in inspect.signature(known[name]).parameters if key not in ("params", "optimizer", "last_epoch")
    ]
    for key, value in arguments.items():
        if key not in known_arguments:
            remedy = f"leave it out; it has {', '.join(known_arguments) or 'none'}"
            raise ArgumentError(f"{kind}.{key}", value, f"is no argument of {name}", remedy)
    return name, arguments
