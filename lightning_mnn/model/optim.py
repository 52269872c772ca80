"""Optimisers and learning-rate schedules by name, from plain values that configs and checkpoints can contain."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
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


_WHOLE_NUMBERS = ("max_iter", "max_eval", "history_size")
_SWITCHES = (
    *("amsgrad", "nesterov", "maximize", "differentiable", "capturable", "decoupled_weight_decay", "foreach", "fused"),
)

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": Adam,
    "sgd": torch.optim.SGD,
    "lbfgs": torch.optim.LBFGS,
}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser ``options["name"]`` (adam, sgd or lbfgs) with the other options as its arguments.

    Raises:
        ArgumentError: an unknown name or argument, or a value out of its range.

    >>> weights = [torch.nn.Parameter(torch.zeros(2))]
    >>> build_optimizer(weights, {"name": "sgd", "lr": 0.1, "momentum": 0.9}).defaults["momentum"]
    0.9
    """
    name, arguments = _split("optimizer", options, OPTIMIZERS)
    for key, value in arguments.items():
        _check_option(key, value, inspect.signature(OPTIMIZERS[name]).parameters[key].default)
    if arguments.get("nesterov") and (not arguments.get("momentum") or arguments.get("dampening")):
        raise ArgumentError(
            "optimizer.nesterov", arguments["nesterov"], "needs a momentum above 0, and no dampening", "or choose false"
        )
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return OPTIMIZERS[name](parameters, **arguments)


def _check_option(key: str, value: Any, default: Any) -> None:
    """Check an argument of an optimiser. Where torch's default is None (torch chooses), None is also allowed here."""
    name = f"optimizer.{key}"
    if value is None and default is None:
        return
    if key == "betas":
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise ArgumentError(name, value, "must be two numbers, at least 0 and below 1", "as [0.9, 0.999]")
        for beta in value:
            real_number(name, beta, at_least=0, below=1)
    elif key == "line_search_fn":
        one_of(name, value, (None, "strong_wolfe"))
    elif key in _WHOLE_NUMBERS:
        positive_integer(name, value)
    elif key in _SWITCHES:
        truth_value(name, value)
    elif key != "params":
        real_number(name, value, at_least=0)


def build_schedule(optimizer: torch.optim.Optimizer, options: Mapping[str, Any], total_steps: float) -> LambdaLR | None:
    """The learning-rate schedule ``options["name"]``, stepped once per optimiser step; None for a constant rate.

    Args:
        optimizer: the optimiser whose learning rate is the peak rate.
        options: ``name`` (constant, exponential_tail or one_cycle) and the arguments of that function.
        total_steps: length of the run in optimiser steps.

    Raises:
        ArgumentError: an unknown name or argument, a value out of its range, or a schedule that needs the run's length
            when that is not known.
    """
    name, arguments = _split("schedule", options, SCHEDULES)
    factor = SCHEDULES[name](**arguments)
    if name == "constant":
        return None
    if not math.isfinite(total_steps):
        problem, remedy = (
            "needs the length of the run",
            "set max_epochs or max_steps of the Trainer, or choose constant",
        )
        raise ArgumentError("schedule.name", name, problem, remedy)
    return LambdaLR(optimizer, lambda step: factor(min(step / max(total_steps, 1), 1.0)))


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
    arguments = dict(options)
    name = arguments.pop("name", None)
    if name not in known:
        raise ArgumentError(f"{kind}.name", name, f"must be one of {', '.join(sorted(known))}")
    known_arguments = [key for key in inspect.signature(known[name]).parameters if key != "params"]
    for key, value in arguments.items():
        if key not in known_arguments:
            remedy = f"leave it out; it has {', '.join(known_arguments) or 'none'}"
            raise ArgumentError(f"{kind}.{key}", value, f"is no argument of {name}", remedy)
    return name, arguments
