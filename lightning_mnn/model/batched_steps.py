"""Optimiser steps of many networks at a time, as batched products, with the optimiser and the rates of each.

Shapes: C networks of a batch, B samples, d0 inputs, d1 (d2, …) hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mnn.landscape.labels import wrong
from lightning_mnn.model.gradients import SquaredErrorGradient
from lightning_mnn.model.optim import build_optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_CACHE = 1 << 20  # bytes that a batch's activations and samples should need, so that they stay in a core's cache


@dataclass(eq=False)
class Steps:
    """The optimiser steps that one network needs next.

    Attributes:
        hidden_weights: W, …; the steps change them.
        output_weights: z.
        negative_slope: ρ.
        optimizer: of the weights that are trained; its state is updated.
        options: the optimiser's name and arguments.
        schedule: of the learning rate; None: the rate is constant.
        schedule_key: what determines the schedule, beside the number of its steps.
        full_batch: the samples of all steps; None: they differ.
        batches: the samples of each step, if they differ.
        left: number of steps.
        done: number of the network's steps before these.
        log_every: how often to record errors, in steps; 0: never.
        threshold: of the labels; None: no classification error.
        errors: found: number of steps before, MSE, and MCE if there is one.
        failure: an error, because of which no more steps were done.
    """

    hidden_weights: list[nn.Parameter]
    output_weights: nn.Parameter
    negative_slope: float
    optimizer: torch.optim.Optimizer
    options: Mapping[str, Any]
    schedule: Any
    schedule_key: str
    full_batch: tuple[Tensor, Tensor] | None
    batches: Iterator[tuple[Tensor, Tensor]]
    left: int
    done: int
    log_every: int
    threshold: float | None
    errors: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        """Derive what the weights determine."""
        self.weights = [*self.hidden_weights, self.output_weights]
        trained = {id(weights) for group in self.optimizer.param_groups for weights in group["params"]}
        self.trained = [index for index, weights in enumerate(self.weights) if id(weights) in trained]
        inputs = self.hidden_weights[0]
        samples = None if self.full_batch is None else (self.full_batch[0].shape, self.full_batch[0].dtype)
        self.shape_key = (
            tuple(weights.shape for weights in self.weights),
            inputs.dtype,
            inputs.device,
            tuple(self.trained),
            samples,
            self.threshold,
            self.log_every,
        )

    @property
    def bytes(self) -> int:
        """Approximate memory that one step passes through."""
        samples = self.full_batch[1].shape[-1] if self.full_batch is not None else 64
        units = sum(len(weights) for weights in self.hidden_weights)
        inputs = self.hidden_weights[0].shape[1]
        return self.output_weights.element_size() * samples * (3 * units + inputs)

    def optimizer_key(self) -> tuple[Any, ...]:
        """Equal for networks whose weights one optimiser can move together."""
        group = {name: value for name, value in self.optimizer.param_groups[0].items() if name != "params"}
        numbers = [
            (name, float(value) if torch.is_tensor(value) else value)
            for name, value in sorted(self.state(0).items())
            if not torch.is_tensor(value) or value.ndim == 0
        ]
        position = None if self.schedule is None else self.schedule.last_epoch
        return repr((sorted(group.items()), sorted(self.state(0)), numbers)), self.schedule_key, position

    def state(self, index: int) -> dict[str, Any]:
        """The optimiser's state of a trained parameter."""
        found: dict[str, Any] = self.optimizer.state.get(self.weights[self.trained[index]], {})
        return found


def take_together(waiting: Sequence[Steps]) -> Iterator[list[int]]:
    """Do the steps of all networks, in batches of equal shapes; yield the indices of those that have none left.

    Networks of a batch do as many steps as the one with the fewest left, so that some may have steps left in the end.
    """
    keys = [(repr(steps.shape_key), steps.negative_slope, steps.optimizer_key(), steps.left) for steps in waiting]
    order = sorted(range(len(waiting)), key=lambda index: repr(keys[index]))
    for _, same in groupby(order, key=lambda index: keys[index][0]):
        indices = list(same)
        size = max(1, _CACHE // waiting[indices[0]].bytes)
        pieces = -(-len(indices) // size)
        for piece in range(pieces):
            together = indices[piece * len(indices) // pieces : (piece + 1) * len(indices) // pieces]
            team = [waiting[index] for index in together]
            try:
                _take(team)
            except Exception as error:  # noqa: BLE001 (each of them raises it in its own run)
                for steps in team:
                    steps.failure, steps.left = error, 0
            yield [index for index in together if not waiting[index].left]


def _take(team: Sequence[Steps]) -> None:
    """Do steps of networks of equal shapes."""
    number = min(steps.left for steps in team)
    weights = [
        nn.Parameter(torch.stack([steps.weights[j].detach() for steps in team])) for j in range(len(team[0].weights))
    ]
    for j, parameter in enumerate(weights):
        parameter.requires_grad_(j in team[0].trained)
    slopes = [(len(list(same)), slope) for slope, same in groupby(steps.negative_slope for steps in team)]
    gradient = SquaredErrorGradient(weights[:-1], weights[-1], slopes)
    groups = _groups(team, weights, gradient)
    samples: tuple[Tensor, Tensor] | None = None
    if team[0].full_batch is not None:
        samples = _stacked([steps.full_batch for steps in team])  # type: ignore[misc]
    errors = []
    for step in range(number):
        inputs, targets = samples or _stacked([next(steps.batches) for steps in team])
        predictions, residual = gradient(inputs, targets)
        if team[0].log_every and any((steps.done + step + 1) % steps.log_every == 0 for steps in team):
            errors.append((step, _errors(predictions, residual, targets, team[0].threshold)))
        for group in groups:
            group.step()
    with torch.no_grad():
        for j in team[0].trained:
            torch._foreach_copy_([steps.weights[j].detach() for steps in team], list(weights[j].unbind()))
    for group in groups:
        group.give_back()
    _record(team, errors)
    for steps in team:
        steps.left -= number
        steps.done += number


def _stacked(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([inputs for inputs, _ in samples]), torch.stack([targets for _, targets in samples])


def _errors(predictions: Tensor, residual: Tensor, targets: Tensor, threshold: float | None) -> Tensor:
    """MSE, and MCE if there is a threshold, of each network: (1 or 2, C)."""
    found = [residual.square().sum(-1) / targets.shape[-1]]
    if threshold is not None:
        found.append(wrong(predictions, targets, threshold).sum(-1).to(residual.dtype) / targets.shape[-1])
    return torch.stack(found)


def _record(team: Sequence[Steps], errors: Sequence[tuple[int, Tensor]]) -> None:
    if not errors:
        return
    found = torch.stack([values for _, values in errors]).tolist()  # the only wait for the device
    for (step, _), values in zip(errors, found, strict=True):
        for index, steps in enumerate(team):
            if (steps.done + step + 1) % steps.log_every == 0:
                steps.errors.append((steps.done + step, tuple(value[index] for value in values)))


class _Group:
    """Neighbours in a batch that one optimiser moves; their weights are a part of the batch's.

    Args:
        members: the networks; the first one's schedule is followed.
        weights: the parts of the batch's weights that are trained.
    """

    def __init__(self, members: Sequence[Steps], weights: Sequence[nn.Parameter]) -> None:
        self._members, self._weights = members, weights
        lead = members[0]
        self._optimizer = build_optimizer(weights, lead.options)
        self._follow(lead)
        for j, part in enumerate(weights):
            states = [steps.state(j) for steps in members]
            if states[0]:
                self._optimizer.state[part] = {name: _joined([one[name] for one in states]) for name in states[0]}
        self._schedule = lead.schedule
        if self._schedule is not None:
            lead.optimizer.zero_grad()
            lead.optimizer.step()  # without gradients: the schedule would warn if its optimiser had never taken a step

    def step(self) -> None:
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
            self._follow(self._members[0])

    def _follow(self, lead: Steps) -> None:
        """Take the rate, and what else a schedule may have changed, from the first network's optimiser."""
        now = lead.optimizer.param_groups[0]
        self._optimizer.param_groups[0].update((name, now[name]) for name in now if name != "params")

    def give_back(self) -> None:
        """Write each network's state and schedule."""
        lead = self._members[0]
        for j, part in enumerate(self._weights):
            for name, value in self._optimizer.state[part].items():
                _give_back(
                    [steps.optimizer.state[steps.weights[steps.trained[j]]] for steps in self._members],
                    name,
                    value,
                    part,
                )
        for steps in self._members[1:]:
            if self._schedule is not None:
                steps.schedule.load_state_dict(self._schedule.state_dict())
            now = lead.optimizer.param_groups[0]
            steps.optimizer.param_groups[0].update((name, now[name]) for name in now if name != "params")


def _groups(team: Sequence[Steps], weights: Sequence[nn.Parameter], gradient: SquaredErrorGradient) -> list[_Group]:
    groups, first = [], 0
    for _, same in groupby(team, key=Steps.optimizer_key):
        members = list(same)
        last = first + len(members)
        parts = []
        for j in team[0].trained:
            part = nn.Parameter(weights[j].detach()[first:last])
            part.grad = gradient.gradients[j][first:last]
            parts.append(part)
        groups.append(_Group(members, parts))
        first = last
    return groups


def _joined(values: Sequence[Any]) -> Any:
    """A state of several networks in one: tensors of weights are stacked, numbers are equal."""
    first = values[0]
    if not torch.is_tensor(first):
        return first
    return first.clone() if first.ndim == 0 else torch.stack(list(values))


def _give_back(states: Sequence[dict[str, Any]], name: str, value: Any, part: Tensor) -> None:
    if torch.is_tensor(value) and value.shape == part.shape:
        own = list(value.unbind())
        if name in states[0]:
            torch._foreach_copy_([state[name] for state in states], own)
        else:
            for state, one in zip(states, own, strict=True):
                state[name] = one.clone()
        return
    for state in states:
        state[name] = value.clone() if torch.is_tensor(value) else value
